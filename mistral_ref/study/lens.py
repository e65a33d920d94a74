"""Lenses: three ways to read a trace.

    trace = model.trace("Once upon a time")
    lens.attention(trace, layer=2, head=3)          # how much each token attends to each other token
    lens.logit_lens(model, trace)                   # the likeliest next tokens if the model ended after each layer
    lens.attribution(model, trace, token=1234)      # what embedding, heads and feed-forwards added to a logit

The last two use the residual stream: each layer adds the outputs of its attention and of its feed-forward to the
stream (Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mistral_ref import sampling
from mistral_ref.config import ModelConfig
from mistral_ref.display import html_table, markdown_table
from mistral_ref.errors import InputError, checked_int
from mistral_ref.heat_map import HeatMap, heat_image, heat_map, heat_text, legend
from mistral_ref.model import Model
from mistral_ref.reference_ops import attends, blocks
from mistral_ref.sampling import log_softmax
from mistral_ref.steps import Step
from mistral_ref.trace import Trace
from mistral_ref.weights import Layer

_N_SHOWN = 20  # how many parts of a logit a table shows
_SUM_TOLERANCE = 1e-3  # as a share of the sum of all |parts|; in float32 passes the error is below 1e-5
_BLOCK_ELEMENTS = 2**20  # how many elements of a weight matrix are converted to float64 at once


@dataclass(frozen=True)
class AttentionMap:
    """The attention weights (T, S) of one head: a row for each query, a column for each key.

    name            the step and the head
    weights_TS      the weights
    queries, keys   the pieces of the queries and of the keys
    """

    name: str
    weights_TS: np.ndarray
    queries: list[str]
    keys: list[str]

    def heat(self) -> HeatMap:
        """Return the weights as a heat map of at most 64 by 64 cells."""
        return heat_map(self.weights_TS, 64, 64, is_root=True)

    def top(self, query: int, n: int = 5) -> list[tuple[str, float]]:
        """Return the n keys to which a query attends most, with their weights; queries count from 0, the first row."""
        query = checked_int("query", query, -len(self.queries), len(self.queries) - 1)
        order = np.argsort(-self.weights_TS[query], kind="stable")[:n]
        return [(self.keys[key], float(self.weights_TS[query, key])) for key in order]

    def __str__(self) -> str:
        heat = self.heat()
        label = self.queries if len(heat.cells) == len(self.queries) else [""] * len(heat.cells)
        rows = [[piece, line] for piece, line in zip(label, heat_text(heat), strict=True)]
        return f"{self.name}\n{markdown_table(['query', 'keys, oldest first'], rows)}\n{legend(heat)}"

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows: a picture, and the strongest keys of each query."""
        rows = [
            [piece, ", ".join(f"{key} {weight:.2f}" for key, weight in self.top(query))]
            for query, piece in enumerate(self.queries)
        ]
        return f"<div>{heat_image(self.heat(), 8)}{html_table(['query', 'attends to'], rows, caption=self.name)}</div>"


def attention(trace: Trace, layer: int, head: int) -> AttentionMap:
    """Return the attention weights of one query head; the trace must hold the layer's `attention_weights`."""
    name = f"layers.{layer}.attention_weights"
    weights_HTS = trace[name]
    head = checked_int("head", head, 0, len(weights_HTS) - 1)
    end = trace.start + weights_HTS.shape[1]
    positions = range(end - weights_HTS.shape[2], end)
    return AttentionMap(
        f"{name}, head {head}",
        weights_HTS[head],
        [trace.label(position) for position in range(trace.start, end)],
        [trace.label(position) for position in positions],
    )


def visible_keys(step: Step, config: ModelConfig) -> np.ndarray:
    """Return for each query and key whether the query sees the key, (T, S); the step is scores or attention weights."""
    assert step.key_positions is not None
    window = config.sliding_window[int(step.name.split(".")[1])]
    queries_T = step.key_positions.stop + np.arange(-step.value.shape[1], 0)
    sees_TS: np.ndarray = attends(queries_T[:, np.newaxis], np.array(step.key_positions), window)
    return sees_TS


@dataclass(frozen=True)
class LogitLens:
    """For each of T tokens, the likeliest next tokens if the model ended after each of R steps of the residual stream.

    names           the names of the R steps, in the order of the pass
    ids_RTN         the N likeliest next tokens, the likeliest first
    logprobs_RTN    their log-probabilities
    final_RT        at each step, the log-probability of the token that is the likeliest one at the last step
    pieces          token id -> piece, for the tokens of `ids_RTN`
    labels          the pieces of the T tokens
    """

    names: list[str]
    ids_RTN: np.ndarray
    logprobs_RTN: np.ndarray
    final_RT: np.ndarray
    pieces: dict[int, str]
    labels: list[str]

    def rows(self, token: int = -1) -> list[list[str]]:
        """Return the table of one token: a row for each step, with the likeliest pieces and their probabilities."""
        return [
            [name, *(f"{self.pieces[int(i)]} {np.exp(p):.2f}" for i, p in zip(ids_TN[token], p_TN[token], strict=True))]
            for name, ids_TN, p_TN in zip(self.names, self.ids_RTN, self.logprobs_RTN, strict=True)
        ]

    def _headings(self) -> list[str]:
        return [f"after {self.labels[-1]}", *(f"choice {n + 1}" for n in range(self.ids_RTN.shape[2]))]

    def __str__(self) -> str:
        return markdown_table(self._headings(), self.rows())

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows: the table of the last token."""
        return html_table(self._headings(), self.rows(), caption="logit lens")


def logit_lens(model: Model, trace: Trace, *, top: int = 5) -> LogitLens:
    """Return what the model would predict if it ended after a step of the residual stream (nostalgebraist, 2020).

    The value x of each step goes through norm and output, as the last one does: logits = RMSNorm(x) · outputᵀ. The RMS
    is that of x itself, not that of the last step. The trace must hold `embedding` or at least one of the steps
    `residual_after_...`. If it holds the last of them, its row is the model's own prediction.
    """
    top = checked_int("top", top, least=1, most=model.config.vocab_size)
    names = residual_names(trace)
    winners_T1, rows = None, []
    for name in reversed(names):  # the last step first: its likeliest token is looked up at all steps
        logprobs_TV = log_softmax(residual_logits(model, _value(trace, name, model.config.dim)))
        ids_TN = np.stack([sampling.likeliest(logprobs_V, top) for logprobs_V in logprobs_TV])
        winners_T1 = ids_TN[:, :1] if winners_T1 is None else winners_T1
        taken = [np.take_along_axis(logprobs_TV, ids, axis=-1) for ids in (ids_TN, winners_T1)]
        rows.append((ids_TN, taken[0], taken[1][:, 0]))
    ids_RTN, logprobs_RTN, final_RT = (np.stack(parts) for parts in zip(*reversed(rows), strict=True))
    pieces = {int(token): model.piece(int(token)) for token in np.unique(ids_RTN)}
    labels = [trace.label(trace.start + token) for token in range(trace.n_tokens)]
    return LogitLens(names, ids_RTN, logprobs_RTN, final_RT, pieces, labels)


def residual_names(trace: Trace) -> list[str]:
    """Return the names of a trace's steps that belong to the residual stream; raise InputError if it holds none."""
    names = [name for name in trace if name == "embedding" or ".residual_after_" in name]
    if not names:
        raise InputError(
            "this trace holds no residual stream; expected keep=['embedding', 'layers.*.residual_after_*']"
        )
    return names


def _value(trace: Trace, name: str, *sizes: int) -> np.ndarray:
    """Return a value of a trace; raise InputError if its shape is not (tokens of the trace, *sizes)."""
    value = trace[name]
    if value.shape != (trace.n_tokens, *sizes):
        expected = (trace.n_tokens, *sizes)
        raise InputError(f"{name} has shape {value.shape}; expected {expected} of a trace of this model")
    return value


def residual_logits(model: Model, x_TD: np.ndarray) -> np.ndarray:
    """Return the logits (T, V) that the model would compute if these values were its last residual."""
    ops, weights = model.ops, model.weights
    with ops.running():
        return ops.linear(ops.rms_norm(x_TD.astype(ops.dtype), weights.norm, model.config.norm_eps), weights.output)


def likeliest(model: Model, logits_V: np.ndarray, n: int = 5) -> list[tuple[str, float]]:
    """Return the pieces of the n likeliest next tokens, with their probabilities."""
    logprobs_V = log_softmax(logits_V)
    order = sampling.likeliest(logprobs_V, min(n, len(logprobs_V)))
    return [(model.piece(int(token)), float(np.exp(logprobs_V[token]))) for token in order]


def contributions(
    model: Model, trace: Trace, *, tokens: slice | Sequence[int] = slice(None)
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, x_TD) for everything that is added to the residual stream. Their sum is the last residual.

    "embedding"             the embedding
    "layers.0.heads.3"      for each layer and head h: heads[:, h] · wo[:, columns of h]ᵀ, in float64; what an adapter
                            adds to wo is a part of it
    "layers.0.ffn_out"      for each layer: the output of its feed-forward

    The trace must hold `embedding`, every `heads` and every `ffn_out`. No step between them may have been edited.
    `tokens` chooses rows, by default all.
    """
    config = model.config
    yield "embedding", _value(trace, "embedding", config.dim)[tokens]
    for index, layer in enumerate(model.weights.layers):
        heads_THK = _value(trace, f"layers.{index}.heads", config.n_heads, config.head_dim)[tokens]
        for head, x_TD in enumerate(_heads_out(heads_THK, layer)):
            yield f"layers.{index}.heads.{head}", x_TD
        name = f"layers.{index}.ffn_out"
        yield name, _value(trace, name, config.dim)[tokens]


def _heads_out(heads_THK: np.ndarray, layer: Layer) -> np.ndarray:
    """Return what each head adds to the residual stream, (H, T, D); computed for a block of wo's rows at a time."""
    n_tokens, n_heads, head_dim = heads_THK.shape
    n_out, n_in = layer.wo.shape
    lora = layer.lora.get("attention_out")
    out_HTD = np.empty((n_heads, n_tokens, n_out))
    heads_HTK = heads_THK.astype(np.float64).transpose(1, 0, 2)
    for rows in blocks(n_out, n_in, _BLOCK_ELEMENTS):
        wo_BI = layer.wo.rows(rows, np.float64)
        wo_BI = wo_BI if lora is None else wo_BI + lora.rows(rows, np.float64)
        wo_HKB = wo_BI.T.reshape(n_heads, head_dim, -1)
        out_HTD[:, :, rows] = heads_HTK @ wo_HKB
    return out_HTD


@dataclass(frozen=True)
class Attribution:
    """What each part of the model added to one logit. `embedding`, `heads_LH` and `ffn_L` add up to `logit`.

    token, piece    the token whose logit it is
    label           the token after which it is predicted
    """

    token: int
    piece: str
    label: str
    embedding: float
    heads_LH: np.ndarray
    ffn_L: np.ndarray
    logit: float

    def rows(self) -> list[tuple[str, float]]:
        """Return the names of all parts and what they added, the largest |value| first."""
        parts = [("embedding", self.embedding)]
        parts += [(f"layers.{layer}.heads.{head}", float(x)) for (layer, head), x in np.ndenumerate(self.heads_LH)]
        parts += [(f"layers.{layer}.ffn_out", float(x)) for layer, x in enumerate(self.ffn_L)]
        return sorted(parts, key=lambda part: -abs(part[1]))

    def _top_rows(self) -> list[list[str]]:
        """Return the rows of a table: the parts with the largest |value|, and the sum of the others."""
        parts = self.rows()
        rest = parts[_N_SHOWN:]
        rows = [[name, f"{x:+.4g}"] for name, x in parts[:_N_SHOWN]]
        return rows + ([[f"{len(rest)} others", f"{sum(x for _, x in rest):+.4g}"]] if rest else [])

    def _caption(self) -> str:
        return f"logit of {self.piece} after {self.label}: {self.logit:.4g}, of which"

    def __str__(self) -> str:
        return f"{self._caption()}\n{markdown_table(['part', 'added'], self._top_rows())}"

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows: the parts with the largest |value|."""
        return html_table(["part", "added"], self._top_rows(), caption=self._caption())


def attribution(model: Model, trace: Trace, *, token: int | None = None, index: int = -1) -> Attribution:
    """Return what embedding, heads and feed-forwards added to a logit (direct logit attribution).

    Let x be the last residual of one of the trace's tokens. Then the logit of a next token is
    x · (weight * output[token]) / RMS(x). If RMS(x) is taken as a constant, this is linear in x. So the logit is the
    sum of what each contribution to x gives by itself.

    token   the id of the next token; None: the likeliest one
    index   the index of the trace's token after which it is predicted; by default the last

    Raises InputError if the parts do not add up to the logit, or if the trace's own logits differ. This happens if a
    step outside the parts has been edited.
    """
    weights, config = model.weights, model.config
    last_TD = _value(trace, f"layers.{config.n_layers - 1}.residual_after_ffn", config.dim)
    index = checked_int("index", index, -trace.n_tokens, trace.n_tokens - 1)
    last_D = last_TD[index].astype(np.float64)
    if token is None:
        token = int(residual_logits(model, last_D[np.newaxis])[0].argmax())
    token = checked_int("token", token, 0, config.vocab_size - 1)
    rms = np.sqrt(np.mean(last_D * last_D) + config.norm_eps)
    direction_D = weights.norm.astype(np.float64) * weights.output.rows(np.array([token]), np.float64)[0] / rms
    heads_LH = np.zeros((config.n_layers, config.n_heads))
    ffn_L, embedding = np.zeros(config.n_layers), 0.0
    for name, x_1D in contributions(model, trace, tokens=[index]):
        added = float(x_1D[0].astype(np.float64) @ direction_D)
        match name.split("."):
            case ["layers", layer, "heads", head]:
                heads_LH[int(layer), int(head)] = added
            case ["layers", layer, _]:
                ffn_L[int(layer)] = added
            case _:
                embedding = added
    label = trace.label(trace.start + index % trace.n_tokens)
    found = Attribution(token, model.piece(token), label, embedding, heads_LH, ffn_L, float(last_D @ direction_D))
    _check_sum(found, trace, index)
    return found


def _check_sum(found: Attribution, trace: Trace, index: int) -> None:
    parts = [part for _, part in found.rows()]
    logits = [sum(parts), float(trace["logits"][index, found.token]) if "logits" in trace else found.logit]
    off = max(abs(logit - found.logit) for logit in logits)
    if not off <= _SUM_TOLERANCE * (1 + sum(map(abs, parts))):
        raise InputError(
            f"the parts add up to {logits[0]:.4g}, the residual gives a logit of {found.logit:.4g}, and the logit of "
            f"the pass is {logits[1]:.4g}; expected equal numbers: an edit outside embedding, heads and ffn_out, or "
            "NaN, makes them differ"
        )
