"""Sweeps: change every head, every token or every part of a model by itself, and see what that does to the logits.

`patch` takes the numbers from another text's pass: activation patching (Vig and others, arXiv:2004.12265; Meng and
others, arXiv:2202.05262). `ablate` sets them to zero or to a mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypedDict, Unpack, get_args

import numpy as np

from mistral_ref.errors import InputError, Progress, checked_choice, checked_int, printable, short_repr
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt, of_prompt
from mistral_ref.steps import axis_sizes
from mistral_ref.study.broken import BrokenModel
from mistral_ref.study.edited import EditedTransformer
from mistral_ref.study.patching.places import Place
from mistral_ref.study.patching.result import Sweep
from mistral_ref.study.patching.variants import Variants
from mistral_ref.walk import matching_steps

By = Literal["head", "token", "step"]
Metric = Callable[[np.ndarray], float] | tuple[int, int]

_STEPS: dict[str, tuple[str, ...]] = {
    "head": ("layers.*.heads",),
    "token": ("embedding", "layers.*.residual_after_ffn"),
    "step": ("layers.*.attention_out", "layers.*.ffn_out"),
}


class Where(TypedDict, total=False):
    """Which places a sweep changes, and where it measures; `patch` explains each."""

    steps: str | Iterable[str] | None
    token: int | None
    head: int | None
    at: int


def patch(
    model: Model,
    prompt: Prompt,
    other: Prompt,
    *,
    by: By,
    metric: Metric,
    progress: Progress | None = None,
    **where: Unpack[Where],
) -> Sweep:
    """Return what becomes of a metric if numbers come from another text's pass, one place after the other.

    other       the other text, with as many tokens as the prompt; steps with a row for each token and expert cannot be
                taken from there
    by          what one place is. "head": a head of a step; "token": a token of a step; "step": a whole step
    metric      a function of the logits (V,) that returns a number; or two token ids: by how much the logit of the
                first is above that of the second
    progress    called with (places done, places in all)
    steps       names or globs of steps. None: by head layers.*.heads; by token the residual stream, which is embedding
                and layers.*.residual_after_ffn; by step layers.*.attention_out and layers.*.ffn_out. In scores and
                attention weights a token is a query
    token, head change the numbers of this token, or of this head, alone; None: of all
    at          the token after which the logits are taken; by default the last

    A changed pass begins at the layer and at the token that changes. What comes before is kept from one pass of the
    prompt. Several changed passes go through the model together. Raises InputError, also if the metric fails.
    """
    ids, other_ids = model.token_ids(prompt), model.token_ids(other)
    if len(other_ids) != len(ids):
        raise InputError(f"the other text has {len(other_ids)} tokens; expected {len(ids)}, as many as the prompt")
    grid = _Grid(model, ids, by, metric, **where)
    grid.check_steps("taken from another text", ("token", "query"))
    source = Variants(model, other_ids[: grid.n_tokens], grid.names)
    return grid.swept(lambda name, value: source.values[name], "taken from the other text", source, progress)


def ablate(
    model: Model,
    prompt: Prompt,
    *,
    by: By,
    metric: Metric,
    to: Literal["zero", "mean"] | Sequence[Prompt] = "zero",
    progress: Progress | None = None,
    **where: Unpack[Where],
) -> Sweep:
    """Return what becomes of a metric if numbers are set to zero or to a mean, one place after the other.

    to      "zero"; "mean": the mean over all tokens of the prompt, BOS included, wherever the logits are taken; a list
            of texts: the mean over all of their tokens. Scores cannot be set to zero, with which unseen keys would be
            seen; scores, attention weights and steps with a row for each token and expert have no mean

    The other arguments are those of `patch`. Raises InputError, also if the metric fails.
    """
    ids = model.token_ids(prompt)
    grid = _Grid(model, ids, by, metric, **where)
    if isinstance(to, str) and checked_choice("to", to, ("zero", "mean")) == "zero":
        grid.check_steps("set to zero", ("token", "query", "pair"), but="scores")
        return grid.swept(lambda name, value: np.zeros_like(value), "set to zero", None, progress)
    grid.check_steps("set to a mean over tokens", ("token",))
    means = _means(model, [ids] if isinstance(to, str) else to, grid.names)

    def mean(name: str, value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(means[name].astype(value.dtype), value.shape)

    return grid.swept(mean, f"set to the mean over {'tokens' if isinstance(to, str) else 'texts'}", None, progress)


def _means(model: Model, texts: Sequence[Prompt], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the mean of each step over the tokens of all texts, (...), in float64."""
    if not isinstance(texts, Sequence) or not texts:
        raise InputError(f"to is {short_repr(texts)}; expected 'zero', 'mean' or a list of texts")
    sums, n_tokens = dict.fromkeys(names, np.zeros(())), 0
    for number, text in enumerate(texts):
        with of_prompt(number):
            trace = model.trace(text, keep=names)
        sums = {name: sums[name] + trace[name].sum(axis=0, dtype=np.float64) for name in names}
        n_tokens += trace.n_tokens
    return {name: total / n_tokens for name, total in sums.items()}


class _Grid:
    """The places of a sweep, checked: `names` of steps, and for each step its `places`."""

    def __init__(
        self,
        model: Model,
        ids: Sequence[int],
        by: By,
        metric: Metric,
        *,
        steps: str | Iterable[str] | None = None,
        token: int | None = None,
        head: int | None = None,
        at: int = -1,
    ) -> None:
        if isinstance(model, BrokenModel):
            raise InputError(f"{model!r} has a bug; expected a model without a bug")
        for pattern, edit in model.transformer.edits if isinstance(model.transformer, EditedTransformer) else ():
            if not callable(edit):  # a sweep's passes begin in the middle of the text, and have fewer tokens
                raise InputError(f"the model's edit of {pattern} is an array; expected a function of the step's value")
        self.model, self.by = model, checked_choice("by", by, get_args(By))
        self.metric = _checked_metric(metric, model.config.vocab_size)
        self.n_tokens = checked_int("at", at, -len(ids), len(ids) - 1) % len(ids) + 1  # later ones do not matter
        self.ids = ids[: self.n_tokens]
        if token is not None:
            token = checked_int("token", token, -len(ids), len(ids) - 1) % len(ids)
            token = checked_int("token", token, 0, self.n_tokens - 1)
        self.names = matching_steps(_STEPS[by] if steps is None else steps, model.config)
        n_heads = {self._checked_heads(name, head) for name in self.names}
        if by == "head" and len(n_heads) > 1:
            raise InputError(
                f"the steps have {' and '.join(map(str, sorted(n_heads)))} heads; expected as many in each"
            )
        if (by == "head" and head is not None) or (by == "token" and token is not None):
            raise InputError(f"{by} is given, and the sweep goes by {by}; expected one of them")
        self.places = [Place(token, head)]
        if by == "head":
            self.places = [Place(token, number) for number in range(n_heads.pop())]
        elif by == "token":
            self.places = [Place(number, head) for number in range(self.n_tokens)]

    def check_steps(self, what: str, axes: Sequence[str], but: str = "") -> None:
        """Raise InputError for a step whose numbers cannot be changed so.

        axes    which axis of tokens, queries or pairs a step may have
        but     a kind of step that is refused nevertheless
        """
        for name in self.names:
            sizes = axis_sizes(self.model.config, name, self.n_tokens)
            if not sizes.keys() & set(axes) or name.rpartition(".")[2] == but:
                raise InputError(
                    f"{name} cannot be {what}; expected embedding, or a step of a layer with an axis of tokens"
                )

    def _checked_heads(self, name: str, head: int | None) -> int:
        """Return how many heads a step has, 0 if it has no such axis; raise InputError if it cannot be swept."""
        sizes = axis_sizes(self.model.config, name, self.n_tokens)
        if name in ("norm", "logits"):
            raise InputError(f"{name} cannot be swept; expected embedding, or a step of a layer")
        n_heads = sizes.get("head", sizes.get("kv_head", 0))
        if not n_heads and (self.by == "head" or head is not None):
            raise InputError(f"{name} has no heads; it has {', '.join(sizes)}")
        if head is not None:
            checked_int(f"head of {name}", head, 0, n_heads - 1)
        return n_heads

    def swept(
        self,
        new: Callable[[str, np.ndarray], np.ndarray],
        what: str,
        source: Variants | None,
        progress: Progress | None,
    ) -> Sweep:
        """Return the Sweep. `new(name, value)` is what a step's value becomes; `source` is the other text's pass."""
        variants = Variants(self.model, self.ids, self.names)
        base = self._measured(variants.logits_V)
        found: dict[tuple[str, Place], float] = {}
        n_places = len(self.names) * len(self.places)
        for name in self.names:
            for place, logits_V in variants.logits(name, self.places, new(name, variants.values[name])):
                found[name, place] = self._measured(logits_V)
                if progress is not None:
                    progress(len(found), n_places)
        computed = variants.computed + (0 if source is None else source.computed)
        whole = self.n_tokens * self.model.config.n_layers
        rows, columns, values_RC = self._arranged(found)
        return Sweep(
            rows, columns, values_RC, base, None if source is None else self._measured(source.logits_V), what,
            computed=computed, naive=(n_places + 1 + (source is not None)) * whole,
        )  # fmt: skip

    def _arranged(self, found: dict[tuple[str, Place], float]) -> tuple[list[str], list[str], np.ndarray]:
        """Return the names of rows and columns, and the values (R, C): NaN where there is no such step."""
        if self.by != "step":
            values = [[found[name, place] for place in self.places] for name in self.names]
            heads = [f"head {place.head}" for place in self.places]
            pieces = [f"{self.model.piece(token)} @{position}" for position, token in enumerate(self.ids)]
            return self.names, heads if self.by == "head" else pieces, np.array(values)
        parts = [(name.rpartition(".")[0] or name, name.rpartition(".")[2]) for name in self.names]
        rows, columns = list(dict.fromkeys(row for row, _ in parts)), list(dict.fromkeys(column for _, column in parts))
        values_RC = np.full((len(rows), len(columns)), np.nan)
        for (row, column), name in zip(parts, self.names, strict=True):
            values_RC[rows.index(row), columns.index(column)] = found[name, self.places[0]]
        return rows, columns, values_RC

    def _measured(self, logits_V: np.ndarray) -> float:
        if not callable(self.metric):
            first, second = self.metric
            return float(logits_V[first]) - float(logits_V[second])
        try:
            value = self.metric(logits_V.copy())
        except Exception as error:  # whatever a function of the user's raises
            raise InputError(f"the metric raised {type(error).__name__}: {printable(str(error))}") from error
        array = np.asarray(value)
        if array.shape != () or array.dtype.kind not in "fiu":
            raise InputError(f"the metric returned {short_repr(value)}; expected a number")
        return float(array)


def _checked_metric(metric: Metric, n_ids: int) -> Metric:
    if callable(metric):
        return metric
    if not isinstance(metric, Sequence) or len(metric) != 2:
        raise InputError(f"metric is {short_repr(metric)}; expected a function of the logits, or two token ids")
    first, second = (checked_int("token id of the metric", one, 0, n_ids - 1) for one in metric)
    return first, second
