"""What every step of a forward pass costs: counted, and predicted from the machine's limits.

A machine has two limits: its peak (arithmetic per second) and its bandwidth (bytes per second). A step takes at least
as long as its arithmetic takes at the peak, and at least as long as its bytes take at the bandwidth. This is the
roofline model (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785).

The intensity of a step, FLOP per byte, decides which of the two takes longer. Decoding one token is bound by memory:
each weight is read for only two operations. A long prompt is bound by arithmetic: each weight is read once and serves
all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from mistral_ref.cache import SCALE_BYTES
from mistral_ref.config import ModelConfig
from mistral_ref.errors import checked_choice, checked_int
from mistral_ref.ring import Ring
from mistral_ref.weights import ExpertFeedForward, FeedForward, Layer, Lora, Matrix, Weights

_CACHE_DTYPES = ("float32", "float16", "float64", "int8")


class Limits(NamedTuple):
    """What a machine can do per second at most: bytes read from memory, and floating-point operations."""

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class StepCost:
    """The least that one step must compute, read and write.

    flops           additions, multiplications, divisions and exponentials, each counted as one
    weight_bytes    bytes of the weights that the step reads, as they are stored
    other_bytes     bytes that the step reads and writes of activations, and of keys and values in the cache
    """

    name: str
    flops: int
    weight_bytes: int
    other_bytes: int

    @property
    def bytes(self) -> int:
        """All bytes that the step reads or writes."""
        return self.weight_bytes + self.other_bytes

    @property
    def intensity(self) -> float:
        """FLOP per byte."""
        return self.flops / self.bytes

    def predicted(self, limits: Limits) -> float:
        """Return max(flops / peak, bytes / bandwidth), in seconds.

        >>> StepCost("gate", flops=600, weight_bytes=90, other_bytes=10).predicted(Limits(bandwidth=50, peak=200))
        3.0
        """
        return max(self.flops / limits.peak, self.bytes / limits.bandwidth)

    def bound(self, limits: Limits) -> Literal["arithmetic", "memory"]:
        """Return which takes longer at the machine's limits: the step's arithmetic, or its bytes ("memory")."""
        return "arithmetic" if self.flops / limits.peak > self.bytes / limits.bandwidth else "memory"


def visible_pairs(n_tokens: int, start: int, window: int | None) -> int:
    """Return for how many (query, key) pairs `attends` is true, for the queries start to start + n_tokens - 1.

    The query at position p sees min(p + 1, W) keys. While the window fills, the counts are p + 1, and their sum is a
    difference of two triangular numbers. After that, every query sees W keys.

    >>> visible_pairs(5, 0, window=3)  # 1 + 2 + 3 + 3 + 3
    12
    """
    stop = start + n_tokens
    filled = stop if window is None else min(stop, max(start, window))
    pairs = (filled * (filled + 1) - start * (start + 1)) // 2
    return pairs if window is None else pairs + (stop - filled) * window


def step_costs(
    config: ModelConfig, weights: Weights, n_tokens: int, start: int = 0, *,
    last_only: bool = False, cache_dtype: str = "float32", activation_bytes: int = 4,
) -> list[StepCost]:  # fmt: skip
    """Return the cost of every step of a pass of T = n_tokens from position `start`, in the order of the pass.

    The pass is one that nobody observes, so all of attention is one step, `heads`. A step reads each of its inputs once
    and writes its value once. In one layer, S is the number of keys that at least one query sees, and P is the number
    of pairs of a query and a key that it sees:

        step                FLOPs       weights         activations             cache
        embedding                       T rows          T D
        norms               4 T D       D float32       2 T D
        products (O, I)     2 T O I     O I, scales     T (I + O)
        q_rotated           3 T H K                     2 T H K                 (k_rotated: G for H)
        heads               4 P H K                     2 T H K + 2 T G K       2 S G K read, 2 T G K written
        ffn_hidden          5 T F                       3 T F
        residuals           T D                         3 T D

    Attention: in each query head a pair takes 2 K FLOPs for its score and 2 K to gather its value. Softmax adds little
    and is not counted. Scores are not counted as memory, since a kernel need not store them. The pass writes its keys
    and values to the cache between `k_rotated` and `heads`; these bytes count in `heads`. RoPE's cosines and sines are
    computed once per pass and are not counted. Logits are computed for all T tokens. With `last_only` only the last
    token has logits. Then T is 1 in the last layer and after it, except in the steps that lead to keys and values.

    Adapters: where one of rank R touches a product (O, I), it has two steps, the products (R, I) and (O, R); the scale
    takes T R FLOPs in the second one. What it adds takes T O FLOPs and T O activations in the product's own step.

    Experts: a pair is a token and one of its experts, and there are N = T * (experts per token) pairs. gate, up,
    ffn_hidden and ffn_out have a row for each pair. ffn_out also mixes the experts of a token: 2 N D FLOPs, N D + T D
    activations. expert_weights takes 4 N FLOPs and 2 T E activations. The weights of min(E, N) experts are counted as
    read. This is exact for one token. For several tokens it is a maximum, since tokens may share experts.
    """
    checked_choice("cache_dtype", cache_dtype, _CACHE_DTYPES)
    this_pass = _PassCost(
        config,
        checked_int("n_tokens", n_tokens, least=1),
        checked_int("start", start, least=0),
        head_bytes=config.head_dim * np.dtype(cache_dtype).itemsize + (SCALE_BYTES if cache_dtype == "int8" else 0),
        activation_bytes=checked_int("activation_bytes", activation_bytes, least=1),
    )
    rows_read = min(this_pass.n_tokens, config.vocab_size)
    row_bytes = weights.tok_embeddings.nbytes * rows_read // config.vocab_size
    costs = [this_pass.elementwise("embedding", config.dim, 0, 1, row_bytes)]
    n_last = 1 if last_only else n_tokens
    for index, (layer, window) in enumerate(zip(weights.layers, config.sliding_window, strict=True)):
        block = this_pass.block(layer, window, n_last if index == config.n_layers - 1 else n_tokens)
        costs += [replace(cost, name=f"layers.{index}.{cost.name}") for cost in block]
    end = replace(this_pass, n_tokens=n_last)
    return [*costs, end.norm("norm", weights.norm), end.product("logits", weights.output)]


@dataclass(frozen=True)
class _PassCost:
    """Counts the steps of one pass, in the order of transformer.py; the docstring of `step_costs` has the formulas."""

    config: ModelConfig
    n_tokens: int
    start: int
    head_bytes: int  # of one key of one head in the cache; a value takes the same
    activation_bytes: int  # of any other activation

    def elementwise(self, name: str, width: int, flops: int, arrays: int, weight_bytes: int = 0) -> StepCost:
        """Return the cost of a step with `flops` FLOPs for each number of an array (T, width).

        arrays      how many arrays of this shape the step reads and writes in all
        """
        size = self.n_tokens * width
        return StepCost(name, flops * size, weight_bytes, arrays * size * self.activation_bytes)

    def norm(self, name: str, weight_D: np.ndarray) -> StepCost:
        """Return the cost of an RMSNorm."""
        return self.elementwise(name, self.config.dim, 4, 2, weight_D.nbytes)

    def product(self, name: str, matrix: Matrix) -> StepCost:
        """Return the cost of a product with a weight matrix."""
        n_out, n_in = matrix.shape
        activations = self.n_tokens * (n_in + n_out)
        return StepCost(name, 2 * self.n_tokens * n_out * n_in, matrix.nbytes, activations * self.activation_bytes)

    def block(self, layer: Layer, window: int | None, n_asking: int) -> Iterator[StepCost]:
        """Yield the costs of all steps of one layer.

        n_asking    of so many tokens, the last ones, the layer computes more than keys and values
        """
        config, lora, asking = self.config, layer.lora, replace(self, n_tokens=n_asking)
        yield self.norm("attention_norm", layer.attention_norm)
        yield from asking.adapted(asking.product("q", layer.wq), lora)
        yield from self.adapted(self.product("k", layer.wk), lora)
        yield from self.adapted(self.product("v", layer.wv), lora)
        yield asking.elementwise("q_rotated", config.n_heads * config.head_dim, 3, 2)
        yield self.elementwise("k_rotated", config.n_kv_heads * config.head_dim, 3, 2)
        yield self.heads(window, n_asking)
        yield from asking.adapted(asking.product("attention_out", layer.wo), lora)
        yield asking.elementwise("residual_after_attention", config.dim, 1, 3)
        yield asking.norm("ffn_norm", layer.ffn_norm)
        if isinstance(layer.feed_forward, FeedForward):
            yield from asking.adapted(asking.product("gate", layer.feed_forward.w1), lora)
            yield from asking.adapted(asking.product("up", layer.feed_forward.w3), lora)
            yield asking.elementwise("ffn_hidden", config.hidden_dim, 5, 3)
            yield from asking.adapted(asking.product("ffn_out", layer.feed_forward.w2), lora)
        else:
            yield from asking.experts(layer.feed_forward, lora)
        yield asking.elementwise("residual_after_ffn", config.dim, 1, 3)

    def heads(self, window: int | None, n_queries: int) -> StepCost:
        """Return the cost of attention, from the last queries and all keys and values to `heads`."""
        q_width, kv_width = (n * self.config.head_dim for n in (self.config.n_heads, self.config.n_kv_heads))
        stop = self.start + self.n_tokens
        n_keys = stop - Ring(window, None, 1).first_visible(stop - n_queries)
        activations, cached = 2 * (n_queries * q_width + self.n_tokens * kv_width), 2 * (n_keys + self.n_tokens)
        other_bytes = activations * self.activation_bytes + cached * self.config.n_kv_heads * self.head_bytes
        return StepCost("heads", 4 * visible_pairs(n_queries, stop - n_queries, window) * q_width, 0, other_bytes)

    def expert_product(self, name: str, matrices: Sequence[Matrix]) -> StepCost:
        """Return the cost of a product of each row with the matrix of its expert."""
        sizes = sorted(matrix.nbytes for matrix in matrices)
        return replace(self.product(name, matrices[0]), weight_bytes=sum(sizes[-self.n_tokens :]))

    def adapted(self, cost: StepCost, loras: Mapping[str, Lora]) -> Iterator[StepCost]:
        """Yield the cost of a product, behind those of an adapter's two steps if one touches it."""
        if cost.name not in loras:
            yield cost
            return
        lora = loras[cost.name]
        yield self.expert_product(f"{cost.name}_lora_a", lora.a)
        up, size = self.expert_product(f"{cost.name}_lora_b", lora.b), self.n_tokens * lora.b[0].shape[0]
        yield replace(up, flops=up.flops + self.n_tokens * len(lora.scale_R))
        yield replace(cost, flops=cost.flops + size, other_bytes=cost.other_bytes + size * self.activation_bytes)

    def experts(self, weights: ExpertFeedForward, lora: Mapping[str, Lora]) -> Iterator[StepCost]:
        """Yield the costs of a feed-forward with experts, the router included."""
        config, moe = self.config, self.config.moe
        assert moe is not None
        pairs = replace(self, n_tokens=self.n_tokens * moe.num_experts_per_tok)
        yield from self.adapted(self.product("router_logits", weights.gate), lora)
        yield replace(self.elementwise("expert_weights", moe.num_experts, 0, 2), flops=4 * pairs.n_tokens)
        yield from pairs.adapted(pairs.expert_product("gate", [expert.w1 for expert in weights.experts]), lora)
        yield from pairs.adapted(pairs.expert_product("up", [expert.w3 for expert in weights.experts]), lora)
        yield pairs.elementwise("ffn_hidden", config.hidden_dim, 5, 3)
        down = pairs.expert_product("ffn_out", [expert.w2 for expert in weights.experts])
        mixed = [pairs.elementwise("pairs", config.dim, 2, 1), self.elementwise("tokens", config.dim, 0, 1)]
        yield from pairs.adapted(total_cost("ffn_out", [down, *mixed]), lora)


def total_cost(name: str, costs: Sequence[StepCost]) -> StepCost:
    """Return the sum of several steps' costs, under a new name."""
    counts = [(cost.flops, cost.weight_bytes, cost.other_bytes) for cost in costs]
    return StepCost(name, *map(sum, zip(*counts, strict=True)))
