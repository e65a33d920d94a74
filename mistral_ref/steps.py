"""Step: one named value of the forward pass. The catalogue lists all steps.

The forward pass is a generator. It yields a Step for every value worth looking at. When it is resumed, it goes on with
the value that the Step then holds. The catalogue below fixes the name, the axes and the formula of each step.

Letters in shapes, here and in the names of variables everywhere: T tokens in this pass, S keys visible, D model width,
H query heads, G key/value heads, K head width, F feed-forward width, V vocabulary, E experts, N (token, expert) pairs,
R rank of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.display import Statistics, size_text, statistics
from mistral_ref.errors import InputError, short_repr
from mistral_ref.notebook import step_html


class StepKind(NamedTuple):
    """The catalogue's entry for a step: the names of its axes, its formula, and one sentence."""

    axes: tuple[str, ...]
    formula: str
    sentence: str


_RMS_NORM = "y = x / sqrt(mean(x²) + eps) * weight"
_SCALED = "scaled to unit RMS, then each dimension times its weight."
_QUERY_HEADS = ("token", "head", "head_dim")
_KV_HEADS = ("token", "kv_head", "head_dim")
_SCORES = ("head", "query", "key")

_STEPS: dict[str, StepKind] = {
    "embedding": StepKind(("token", "dim"), "x = tok_embeddings[token]", "Each token's row of the embedding matrix."),
    "attention_norm": StepKind(("token", "dim"), _RMS_NORM, f"The residual stream, {_SCALED}"),
    "q": StepKind(_QUERY_HEADS, "q = y · wqᵀ", "What each token asks for; pairs that RoPE turns are neighbours."),
    "k": StepKind(_KV_HEADS, "k = y · wkᵀ", "What each token offers to be found by; pairs are neighbours."),
    "v": StepKind(_KV_HEADS, "v = y · wvᵀ", "What each token hands over once it is found."),
    "q_rotated": StepKind(
        _QUERY_HEADS, "q' = t(p) · R(p) q", "Queries turned by their position p; t is the query temperature, mostly 1."
    ),
    "k_rotated": StepKind(_KV_HEADS, "k' = R(p) k", "Keys turned by their position; this is what the cache holds."),
    "scores": StepKind(
        _SCORES, "s[h,i,j] = q'[i,h] · k'[j, h // (H/G)] / sqrt(K)", "How well key j answers query i; -inf if unseen."
    ),
    "attention_weights": StepKind(_SCORES, "w = softmax(s) over keys", "How much of each key's value a query takes."),
    "heads": StepKind(
        _QUERY_HEADS, "heads[i,h] = sum over j of w[h,i,j] v[j, h // (H/G)]", "The values that each head has gathered."
    ),
    "attention_out": StepKind(("token", "dim"), "o = concat(heads) · woᵀ", "All heads, brought back to width D."),
    "residual_after_attention": StepKind(("token", "dim"), "x = x + o", "The residual stream after attention."),
    "ffn_norm": StepKind(("token", "dim"), _RMS_NORM, f"The residual stream, {_SCALED}"),
    "router_logits": StepKind(("token", "expert"), "r = y · gateᵀ", "How much each expert suits each token."),
    "expert_weights": StepKind(
        ("token", "expert"), "e = softmax(top-k of r), 0 elsewhere", "The chosen experts' shares; 0 means not chosen."
    ),
    "gate": StepKind(("token", "ffn"), "g = y · w1ᵀ", "Decides how far each hidden unit opens."),
    "up": StepKind(("token", "ffn"), "u = y · w3ᵀ", "What passes where the gate is open."),
    "ffn_hidden": StepKind(("token", "ffn"), "h = g · sigmoid(g) · u", "SwiGLU: the gated hidden units."),
    "ffn_out": StepKind(("token", "dim"), "z = h · w2ᵀ", "The hidden units, brought back to width D."),
    "residual_after_ffn": StepKind(("token", "dim"), "x = x + z", "The residual stream after the block."),
    "norm": StepKind(("token", "dim"), _RMS_NORM, f"The last residual stream, {_SCALED}"),
    "logits": StepKind(("token", "vocabulary"), "l = y · outputᵀ", "A score for every possible next token."),
}

# With experts the steps gate, up and ffn_hidden have a row for each pair of a token and an expert chosen for it. The
# pairs are sorted by token, then by expert.
_PAIRS = ("pair", "ffn")
_EXPERT_STEPS: dict[str, StepKind] = _STEPS | {
    "gate": StepKind(_PAIRS, "g[n] = y[token n] · w1[expert n]ᵀ", "Decides how far each hidden unit opens."),
    "up": StepKind(_PAIRS, "u[n] = y[token n] · w3[expert n]ᵀ", "What passes where the gate is open."),
    "ffn_hidden": StepKind(_PAIRS, "h = g · sigmoid(g) · u", "SwiGLU: the gated hidden units of each pair."),
    "ffn_out": StepKind(
        ("token", "dim"), "z[t] = sum over experts of e[t] · (h · w2ᵀ)", "The experts' outputs, mixed by their shares."
    ),
}

# The matrix, and with experts the matrices, whose product with the inputs makes a step. Adapters add to these steps.
MATRIX_OF = {
    "q": "attention.wq",
    "k": "attention.wk",
    "v": "attention.wv",
    "attention_out": "attention.wo",
    "router_logits": "feed_forward.gate",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "ffn_out": "feed_forward.w2",
}
LORA_A, LORA_B = "_lora_a", "_lora_b"  # ends of the names of an adapter's steps


def _with_adapters(catalogue: dict[str, StepKind]) -> dict[str, StepKind]:
    """Return a catalogue in which the two steps of an adapter stand before each step that it may add to."""
    every: dict[str, StepKind] = {}
    for name, kind in catalogue.items():
        if name in MATRIX_OF:
            # ffn_out mixes the experts of each token; what is added there has a row for each pair, as the step before
            rows = catalogue["ffn_hidden" if name == "ffn_out" else name].axes[0]
            expert = "[expert n]" if rows == "pair" else ""
            every[name + LORA_A] = StepKind(
                (rows, "rank"),
                f"a = x · A{expert}ᵀ",
                f"The inputs of {name}, brought to an adapter's rank.",
            )
            every[name + LORA_B] = StepKind(
                (rows, *kind.axes[1:]), f"b = scale · a · B{expert}ᵀ", f"What the adapter adds to {name}."
            )
        every[name] = kind
    return every


CATALOGUE = _with_adapters(_STEPS)
EXPERT_CATALOGUE = _with_adapters(_EXPERT_STEPS)

_ATTENTION = ("attention_norm", "q", "k", "v", "q_rotated", "k_rotated", "scores", "attention_weights", "heads")
_BLOCK = (*_ATTENTION, "attention_out", "residual_after_attention", "ffn_norm")
_ROUTING = ("router_logits", "expert_weights")
_FEED_FORWARD = ("gate", "up", "ffn_hidden", "ffn_out", "residual_after_ffn")


def catalogue_of(config: ModelConfig) -> dict[str, StepKind]:
    """Return the catalogue of a model's steps: a map from the name of each kind of step to its StepKind."""
    return EXPERT_CATALOGUE if config.moe else CATALOGUE


def step_names(config: ModelConfig) -> Iterator[str]:
    """Yield the full name of every step of a pass in order: "embedding", "layers.0.attention_norm", ...

    The names of "scores" and "attention_weights" are among them. A pass yields these two only if it is asked to,
    by `observe_attention` in transformer.py.
    """
    block, adapted = (*_BLOCK, *(_ROUTING if config.moe else ()), *_FEED_FORWARD), dict(config.adapted)
    yield "embedding"
    for name in (f"layers.{layer}.{short}" for layer in range(config.n_layers) for short in block):
        yield from (name + LORA_A, name + LORA_B, name) if name in adapted else (name,)
    yield from ("norm", "logits")


def axis_sizes(config: ModelConfig, name: str, n_tokens: int, start: int = 0) -> dict[str, int]:
    """Return the names and sizes of a step's axes, in a pass of n_tokens from position `start`.

    Layers with windows have as many keys as if each had the longest of them.
    """
    window = max((start + n_tokens if window is None else window) for window in config.sliding_window)
    per_token, n_experts = (1, 0) if config.moe is None else (config.moe.num_experts_per_tok, config.moe.num_experts)
    sizes = {
        "token": n_tokens, "query": n_tokens, "key": min(start + n_tokens, window + n_tokens - 1),
        "pair": n_tokens * per_token, "dim": config.dim, "head": config.n_heads, "kv_head": config.n_kv_heads,
        "head_dim": config.head_dim, "ffn": config.hidden_dim, "expert": n_experts, "vocabulary": config.vocab_size,
    }  # fmt: skip
    sizes["rank"] = dict(config.adapted).get(name.removesuffix(LORA_A), 0)
    return {axis: sizes[axis] for axis in catalogue_of(config)[name.rpartition(".")[2]].axes}


def count_values(config: ModelConfig, n_tokens: int, start: int, names: Iterable[str]) -> int:
    """Return how many values these steps have together, in a pass of n_tokens from position `start`, or a few more."""
    return sum(math.prod(axis_sizes(config, name, n_tokens, start).values()) for name in names)


class Step:
    """One value of the forward pass. The pass waits while you look at it.

    name            "layers.3.q_rotated", "logits", ...
    value           the array; assign another array of the same shape and dtype, and the pass goes on with that one
    axes            the names of its axes
    formula         how it is computed
    sentence        what it means
    source          file and line that yielded it: "file:line"; "" outside a walk
    key_positions   for scores and attention_weights the positions of their keys, else None
    is_edited       whether another array has been assigned to `value`
    rounding        the largest relative error from storing the value in a file of 16 bits; 0 for a computed value
    """

    # Set on the class, not for each step: a pass without a reader makes many steps, and nobody reads these attributes.
    source = ""
    is_edited = False
    is_past = False  # the pass has gone on from here
    rounding = 0.0

    def __init__(self, name: str, kind: StepKind, value: np.ndarray, key_positions: range | None = None) -> None:
        self.name = name
        self.kind = kind
        self._value = value
        self.key_positions = key_positions

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes of `value`."""
        return self.kind.axes

    @property
    def formula(self) -> str:
        """How the value is computed."""
        return self.kind.formula

    @property
    def sentence(self) -> str:
        """What the value means."""
        return self.kind.sentence

    @property
    def value(self) -> np.ndarray:
        """The array that the pass goes on with; read-only in a walk."""
        return self._value

    @value.setter
    def value(self, new: np.ndarray) -> None:
        """Replace the value by an array of the same shape and dtype.

        Raises InputError for another shape or dtype, or if the pass has gone on from this step.
        """
        if self.is_past:
            raise InputError(f"the pass has gone past {self.name}; assign to its value before you take the next step")
        try:
            new = np.array(new)
        except ValueError:  # rows of different lengths
            raise InputError(f"step {self.name} was given {short_repr(new)}; expected an array") from None
        if new.shape != self._value.shape or new.dtype != self._value.dtype:
            raise InputError(
                f"step {self.name} was given {new.dtype} of shape {new.shape}; "
                f"expected {self._value.dtype} of shape {self._value.shape}"
            )
        new.flags.writeable = False
        self._value, self.is_edited = new, True

    @property
    def statistics(self) -> Statistics:
        """Minimum, maximum, mean and root mean square of the finite values; numbers of NaN and infinite values."""
        return statistics(self.value)

    def __repr__(self) -> str:
        return f"<Step {self.name} ({size_text(self.axes, self.value.shape)}) {self.value.dtype}: {self.formula}>"

    def _repr_html_(self) -> str:
        return step_html(self)


# A generator for a part of the forward pass: it yields steps, receives the value to go on with, and returns the result.
Steps = Generator[Step, np.ndarray, np.ndarray]


class StepFactory(Protocol):
    """A function that makes a step of one layer, or one of the steps outside the layers, from its short name."""

    def __call__(self, name: str, value: np.ndarray, key_positions: range | None = None) -> Step: ...


def step_factory(config: ModelConfig, layer: int | None = None) -> StepFactory:
    """Return the function that makes the steps of one layer; for None those of embedding, norm and logits."""
    catalogue = catalogue_of(config)
    prefix = "" if layer is None else f"layers.{layer}."

    def step(name: str, value: np.ndarray, key_positions: range | None = None) -> Step:
        return Step(prefix + name, catalogue[name], value, key_positions)

    return step
