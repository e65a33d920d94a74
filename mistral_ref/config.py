"""ModelConfig: the architecture of a model, for all Mistral models.

All of these models have the same kind of block. They differ in five points: `head_dim` (it need not be D / H), the
window of each layer, the kind of RoPE (theta, YaRN, and the row order in the checkpoint), a query temperature, and a
mixture of experts. `files/config_files.py` reads a configuration from a model's files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from mistral_ref.errors import ConfigError, Field, short_repr

RowOrder = Literal["interleaved", "halves"]

# Every published model is far below these maxima. A larger number means that the file is broken. Such a file is refused
# before any memory is allocated.
MAX_VALUES = {
    "dim": 2**20,
    "n_layers": 2**10,
    "n_heads": 2**12,
    "n_kv_heads": 2**12,
    "head_dim": 2**14,
    "hidden_dim": 2**22,
    "vocab_size": 2**24,
    "max_seq_len": 2**40,
    "sliding_window": 2**40,
    "original_max_position_embeddings": 2**40,
    "num_experts": 2**12,
    "num_experts_per_tok": 2**12,
}


def checked_count(field: str, value: object) -> int:
    """Return `value` if it is an integer from 1 to the field's maximum in MAX_VALUES; otherwise raise ConfigError.

    field   the name in the message; it may be dotted: "yarn.original_max_position_embeddings"
    """
    limit = MAX_VALUES[field.rpartition(".")[2]]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ConfigError(Field(field), f" is {short_repr(value)}; expected a whole number from 1 to {limit}")
    return value


def checked_number(field: str, value: object, *, zero: bool = False) -> float:
    """Return `value` as a float if it is above 0 and finite; otherwise raise ConfigError. `zero` allows 0 too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(Field(field), f" is {short_repr(value)}; expected a number")
    # The value is compared before it is converted, because float() of a very large integer raises OverflowError.
    if not (0 <= value <= 1e30) or (value == 0 and not zero) or not math.isfinite(float(value)):
        bound = "of at least" if zero else "above"
        raise ConfigError(Field(field), f" is {short_repr(value)}; expected a finite number {bound} 0")
    return float(value)


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN: RoPE for longer texts than those that a model was first trained on (arXiv:2309.00071).

    RoPE turns pairs of numbers. Count the turns of a pair within `original_max_position_embeddings` positions. A pair
    that turns more than `beta_fast` times keeps its frequency. For a pair that turns less than `beta_slow` times the
    frequency is divided by `factor`. A linear ramp joins the two ranges. rope.py has the formulas.

    attention_factor    cosines and sines are multiplied by it; files/config_files.py computes it from mscale or
                        apply_scale
    truncate            whether the ends of the ramp are rounded outwards, to whole pairs
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool = True

    def __post_init__(self) -> None:
        for field in ("factor", "beta_fast", "beta_slow", "attention_factor"):
            object.__setattr__(self, field, checked_number(f"yarn.{field}", getattr(self, field)))
        checked_count("yarn.original_max_position_embeddings", self.original_max_position_embeddings)
        if self.factor < 1:
            raise ConfigError(Field("yarn.factor"), f" is {self.factor}; expected at least 1")
        if self.beta_fast < self.beta_slow:
            raise ConfigError(
                Field("yarn.beta_fast"),
                f" is {self.beta_fast}; expected at least ",
                Field("yarn.beta_slow"),
                f", {self.beta_slow}",
            )


@dataclass(frozen=True, kw_only=True)
class QueryTemperature:
    """Queries at position p are multiplied by 1 + beta * ln(1 + floor(p / original_max_position_embeddings)).

    The temperature keeps attention sharp in long texts. Ministral 3 has it; its files call it llama_4_scaling.
    """

    beta: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", checked_number("query_temperature.beta", self.beta))
        checked_count("query_temperature.original_max_position_embeddings", self.original_max_position_embeddings)


@dataclass(frozen=True, kw_only=True)
class MixtureOfExperts:
    """Each token's feed-forward is the weighted sum of `num_experts_per_tok` out of `num_experts` networks."""

    num_experts: int
    num_experts_per_tok: int

    def __post_init__(self) -> None:
        checked_count("num_experts", self.num_experts)
        checked_count("num_experts_per_tok", self.num_experts_per_tok)
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                Field("num_experts_per_tok"),
                f" is {self.num_experts_per_tok}; expected at most ",
                Field("num_experts"),
                f", {self.num_experts}",
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The architecture of one model. The field names are Mistral's own. Every field is checked at creation.

    dim                 D, width of the residual stream
    n_layers            L, number of blocks
    n_heads             H, number of query heads
    n_kv_heads          G, number of key/value heads; query head h reads key/value head h // (H / G)
    head_dim            K, width of one head, even; H * K may differ from D
    hidden_dim          F, width of the feed-forward network (in a mixture of experts: of one expert)
    vocab_size          V, number of token ids
    norm_eps            epsilon inside RMSNorm's square root
    rope_theta          base of RoPE's frequencies
    sliding_window      for each layer the number of keys that a query sees, itself included; None: all keys
    rope_row_order      which rows of wq and wk form a pair: "interleaved" (0,1), (2,3), ... in Mistral's own files,
                        "halves" (0,K/2), (1,K/2+1), ... in Hugging Face's
    yarn, query_temperature, moe    None if the model does not have it
    tied_embeddings     whether the embedding matrix is also the output matrix; if the files hold an output matrix
                        all the same, that one is used
    max_seq_len         length of the longest sequence that the model is meant for; None if the files do not say it
    adapted             the steps that adapters add to, each with the rank of what is added: (("layers.0.q", 16), ...);
                        files/adapters.py sets it together with the weights

    Raises ConfigError. The message names the field, its value and the expected value.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    sliding_window: tuple[int | None, ...]
    rope_row_order: RowOrder
    yarn: Yarn | None = None
    query_temperature: QueryTemperature | None = None
    moe: MixtureOfExperts | None = None
    tied_embeddings: bool = False
    max_seq_len: int | None = None
    adapted: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        for field in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
            checked_count(field, getattr(self, field))
        for field in ("norm_eps", "rope_theta"):
            object.__setattr__(self, field, checked_number(field, getattr(self, field)))
        if self.rope_theta <= 1:
            raise ConfigError(
                Field("rope_theta"), f" is {self.rope_theta}; expected above 1, so that later pairs turn slower"
            )
        if self.max_seq_len is not None:
            checked_count("max_seq_len", self.max_seq_len)
        if not isinstance(self.tied_embeddings, bool):
            raise ConfigError(
                Field("tied_embeddings"), f" is {short_repr(self.tied_embeddings)}; expected true or false"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                Field("n_kv_heads"),
                f" is {self.n_kv_heads}; expected a divisor of ",
                Field("n_heads"),
                f", {self.n_heads}",
            )
        if self.head_dim % 2:
            raise ConfigError(
                Field("head_dim"), f" is {self.head_dim}; expected an even number, because RoPE turns pairs"
            )
        if self.rope_row_order not in get_args(RowOrder):
            raise ConfigError(
                Field("rope_row_order"), f" is {short_repr(self.rope_row_order)}; expected one of {get_args(RowOrder)}"
            )
        if not isinstance(self.sliding_window, tuple) or len(self.sliding_window) != self.n_layers:
            raise ConfigError(
                Field("sliding_window"),
                f" is {short_repr(self.sliding_window)}; expected one entry for each of {self.n_layers} layers",
            )
        for window in self.sliding_window:
            if window is not None:
                checked_count("sliding_window", window)

    @property
    def n_parameters(self) -> int:
        """Number of weights in all tensors that `tensor_shapes` yields."""
        return sum(math.prod(shape) for _, shape in tensor_shapes(self))

    def replace(self, **changes: object) -> ModelConfig:
        """Return a copy with some fields changed. All fields are checked again; raises ConfigError."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


def tensor_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield Mistral's own name and the shape of every tensor of a model, in the order of the pass.

    A matrix has the shape (O, I): O outputs, I inputs. A norm's weight has the shape (D,). A model with tied_embeddings
    has no output matrix.

        tok_embeddings.weight                       (V, D)
        layers.N.attention_norm.weight              (D,)
        layers.N.attention.wq.weight                (H*K, D)
        layers.N.attention.wk.weight, wv            (G*K, D)
        layers.N.attention.wo.weight                (D, H*K)
        layers.N.ffn_norm.weight                    (D,)
        layers.N.feed_forward.w1.weight, w3         (F, D)
        layers.N.feed_forward.w2.weight             (D, F)
        norm.weight                                 (D,)
        output.weight                               (V, D)

    With E experts a layer has feed_forward.gate.weight, (E, D), and w1, w2 and w3 of feed_forward.experts.M for each
    expert M.
    """
    dim, hidden = config.dim, config.hidden_dim
    q_out, kv_out = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield "tok_embeddings.weight", (config.vocab_size, dim)
    for layer in (f"layers.{number}" for number in range(config.n_layers)):
        yield f"{layer}.attention_norm.weight", (dim,)
        yield f"{layer}.attention.wq.weight", (q_out, dim)
        yield f"{layer}.attention.wk.weight", (kv_out, dim)
        yield f"{layer}.attention.wv.weight", (kv_out, dim)
        yield f"{layer}.attention.wo.weight", (dim, q_out)
        yield f"{layer}.ffn_norm.weight", (dim,)
        networks: Iterable[str] = [f"{layer}.feed_forward"]
        if config.moe is not None:
            yield f"{layer}.feed_forward.gate.weight", (config.moe.num_experts, dim)
            networks = (f"{layer}.feed_forward.experts.{expert}" for expert in range(config.moe.num_experts))
        for network in networks:
            yield f"{network}.w1.weight", (hidden, dim)
            yield f"{network}.w2.weight", (dim, hidden)
            yield f"{network}.w3.weight", (hidden, dim)
    yield "norm.weight", (dim,)
    if not config.tied_embeddings:
        yield "output.weight", (config.vocab_size, dim)
