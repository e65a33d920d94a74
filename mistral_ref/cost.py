"""What every step of a forward pass costs: counted, predicted from the machine's limits, and measured.

A step can be done no faster than its arithmetic at the machine's peak, nor than its bytes at the machine's bandwidth:
the roofline model (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785). Which of the two holds it back
is a matter of its intensity, FLOP per byte: decoding one token is bound by memory, since each weight is read for two
operations, and a long prompt by arithmetic, since each weight that was read serves all of its tokens.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from mistral_ref.cache import KVCache, Ring
from mistral_ref.config import ModelConfig
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_whole, shown
from mistral_ref.generation import Progress
from mistral_ref.model import Model, Prompt
from mistral_ref.weights import ExpertFeedForward, FeedForward, Layer, Matrix, Weights

_CACHE_DTYPES = ("float32", "float16", "float64")
_N_SAMPLES = 5  # of each limit
_LARGEST_READ = 2**30  # bytes


class Limits(NamedTuple):
    """What a machine can do in a second: bytes read from memory, and floating-point operations."""

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class StepCost:
    """What one step takes, at least.

    flops           additions, multiplications, divisions and exponentials, each counted as one
    weight_bytes    of the weights that must be read, as stored
    other_bytes     of activations, and of keys and values in the cache, read and written
    """

    name: str
    flops: int
    weight_bytes: int
    other_bytes: int

    @property
    def bytes(self) -> int:
        """All bytes that are read or written."""
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
        """Return which of the two takes longer."""
        return "arithmetic" if self.flops / limits.peak > self.bytes / limits.bandwidth else "memory"


def visible_pairs(n_tokens: int, start: int, window: int | None) -> int:
    """Return how many (query, key) pairs `cache.attends` lets through, for queries start to start + n_tokens - 1.

    The query at position p sees min(p + 1, W) keys: p + 1 while the window fills, which sum to a difference of two
    triangular numbers, then W.

    >>> visible_pairs(5, 0, window=3)  # 1 + 2 + 3 + 3 + 3
    12
    """
    stop = start + n_tokens
    filled = stop if window is None else min(stop, max(start, window))
    pairs = (filled * (filled + 1) - start * (start + 1)) // 2
    return pairs if window is None else pairs + (stop - filled) * window


def step_costs(
    config: ModelConfig, weights: Weights, n_tokens: int, start: int = 0, *,
    cache_dtype: str = "float32", activation_bytes: int = 4,
) -> list[StepCost]:  # fmt: skip
    """Return the cost of every step of one unobserved pass, in its order: T = n_tokens from position `start`.

    A step reads what it is made of once and writes its value once. In one layer, with S keys visible to any query and P
    pairs of a query and a key that it sees:

        step                FLOPs       weights         activations             cache
        embedding                       T rows          T D
        norms               4 T D       D float32       2 T D
        products (O, I)     2 T O I     O I, scales     T (I + O)
        q_rotated           3 T H K                     2 T H K                 (k_rotated: G for H)
        heads               4 P H K                     2 T H K + 2 T G K       2 S G K read, 2 T G K written
        ffn_hidden          5 T F                       3 T F
        residuals           T D                         3 T D

    `heads` is all of attention. A pair takes 2 K for its score and 2 K to gather its value, in each query head; softmax
    adds little and is left out, as are scores in memory, which need not be there. The pass writes its keys and values
    to the cache between `k_rotated` and `heads`, so they count in `heads`. Making RoPE's cosines and sines, once a
    pass, is not counted. Logits are those of all T tokens.

    With experts, gate, up, ffn_hidden and ffn_out have a row for each of N = T * (experts per token) pairs; ffn_out
    mixes them besides (2 N D FLOPs, N D + T D activations); expert_weights takes 4 N FLOPs and 2 T E activations. At
    most min(E, N) experts' weights are read, and that is what counts: exact for one token, above that an upper bound,
    since tokens may share experts.
    """
    if cache_dtype not in _CACHE_DTYPES:
        raise InputError(f"cache_dtype is {shown(cache_dtype)}; expected one of {', '.join(_CACHE_DTYPES)}")
    this_pass = _Pass(
        config,
        checked_whole("n_tokens", n_tokens, least=1),
        checked_whole("start", start, least=0),
        cached_bytes=np.dtype(cache_dtype).itemsize,
        activation_bytes=checked_whole("activation_bytes", activation_bytes, least=1),
    )
    rows_read = min(this_pass.n_tokens, config.vocab_size)
    row_bytes = weights.tok_embeddings.nbytes * rows_read // config.vocab_size
    costs = [this_pass.elementwise("embedding", config.dim, 0, 1, row_bytes)]
    for index, (layer, window) in enumerate(zip(weights.layers, config.sliding_window, strict=True)):
        costs += [replace(cost, name=f"layers.{index}.{cost.name}") for cost in this_pass.block(layer, window)]
    return [*costs, this_pass.norm("norm", weights.norm), this_pass.product("logits", weights.output)]


@dataclass(frozen=True)
class _Pass:
    """The counts of one pass, laid out as in transformer.py; their formulas stand in `step_costs`."""

    config: ModelConfig
    n_tokens: int
    start: int
    cached_bytes: int  # of a number in the cache
    activation_bytes: int  # of any other

    def elementwise(self, name: str, width: int, flops: int, arrays: int, weight_bytes: int = 0) -> StepCost:
        """So many FLOPs for each number of (T, width), and so many arrays of that shape read and written."""
        size = self.n_tokens * width
        return StepCost(name, flops * size, weight_bytes, arrays * size * self.activation_bytes)

    def norm(self, name: str, weight_D: np.ndarray) -> StepCost:
        return self.elementwise(name, self.config.dim, 4, 2, weight_D.nbytes)

    def product(self, name: str, matrix: Matrix) -> StepCost:
        n_out, n_in = matrix.shape
        activations = self.n_tokens * (n_in + n_out)
        return StepCost(name, 2 * self.n_tokens * n_out * n_in, matrix.nbytes, activations * self.activation_bytes)

    def block(self, layer: Layer, window: int | None) -> Iterator[StepCost]:
        config = self.config
        yield self.norm("attention_norm", layer.attention_norm)
        yield self.product("q", layer.wq)
        yield self.product("k", layer.wk)
        yield self.product("v", layer.wv)
        yield self.elementwise("q_rotated", config.n_heads * config.head_dim, 3, 2)
        yield self.elementwise("k_rotated", config.n_kv_heads * config.head_dim, 3, 2)
        yield self.heads(window)
        yield self.product("attention_out", layer.wo)
        yield self.elementwise("residual_after_attention", config.dim, 1, 3)
        yield self.norm("ffn_norm", layer.ffn_norm)
        if isinstance(layer.feed_forward, FeedForward):
            yield self.product("gate", layer.feed_forward.w1)
            yield self.product("up", layer.feed_forward.w3)
            yield self.elementwise("ffn_hidden", config.hidden_dim, 5, 3)
            yield self.product("ffn_out", layer.feed_forward.w2)
        else:
            yield from self.experts(layer.feed_forward)
        yield self.elementwise("residual_after_ffn", config.dim, 1, 3)

    def heads(self, window: int | None) -> StepCost:
        q_width, kv_width = (n * self.config.head_dim for n in (self.config.n_heads, self.config.n_kv_heads))
        n_keys = self.start + self.n_tokens - Ring(window, None, 1).first_visible(self.start)
        activations, cached = 2 * self.n_tokens * (q_width + kv_width), 2 * (n_keys + self.n_tokens) * kv_width
        other_bytes = activations * self.activation_bytes + cached * self.cached_bytes
        return StepCost("heads", 4 * visible_pairs(self.n_tokens, self.start, window) * q_width, 0, other_bytes)

    def experts(self, weights: ExpertFeedForward) -> Iterator[StepCost]:
        config, moe = self.config, self.config.moe
        assert moe is not None
        pairs = replace(self, n_tokens=self.n_tokens * moe.num_experts_per_tok)

        def product(name: str, matrices: Sequence[Matrix]) -> StepCost:
            sizes = sorted(matrix.nbytes for matrix in matrices)
            return replace(pairs.product(name, matrices[0]), weight_bytes=sum(sizes[-pairs.n_tokens :]))

        yield self.product("router_logits", weights.gate)
        yield replace(self.elementwise("expert_weights", moe.num_experts, 0, 2), flops=4 * pairs.n_tokens)
        yield product("gate", [expert.w1 for expert in weights.experts])
        yield product("up", [expert.w3 for expert in weights.experts])
        yield pairs.elementwise("ffn_hidden", config.hidden_dim, 5, 3)
        down = product("ffn_out", [expert.w2 for expert in weights.experts])
        mixed = [pairs.elementwise("pairs", config.dim, 2, 1), self.elementwise("tokens", config.dim, 0, 1)]
        yield _sum("ffn_out", [down, *mixed])


def _sum(name: str, costs: Sequence[StepCost]) -> StepCost:
    counts = [(cost.flops, cost.weight_bytes, cost.other_bytes) for cost in costs]
    return StepCost(name, *map(sum, zip(*counts, strict=True)))


def measure(
    model: Model, tokens: Prompt, cache: KVCache | None = None, *, repeats: int = 5, progress: Progress | None = None
) -> list[list[float]]:
    """Return for each repeat the seconds of every step of one unobserved pass, in its order; one pass before warms up.

    A step's time goes from sending back the value before it to receiving it, so what happens between two steps counts
    with the later one: RoPE's cosines and sines with the embedding, writing to the cache with `heads`.

    No pass goes beyond its logits, so none counts: all do the same, and `cache.length` and all that later queries see
    stay as they were. The tokens must fit the cache's chunk. `progress` is called with (passes done, passes in all).
    """
    repeats = checked_whole("repeats", repeats, least=1)
    ids = model.token_ids(tokens, cache)
    cache = model.new_cache(max_tokens=len(ids), chunk=len(ids)) if cache is None else cache
    report = progress or (lambda done, total: None)
    runs = []
    for done in range(repeats + 1):
        report(done, repeats + 1)
        runs.append(_timed_pass(model, np.array(ids), cache))
    report(repeats + 1, repeats + 1)
    return runs[1:]


def _timed_pass(model: Model, tokens_T: np.ndarray, cache: KVCache) -> list[float]:
    seconds: list[float] = []
    name, value = "", cast(Any, None)  # None starts a generator
    steps = model.transformer.forward_steps(tokens_T, cache.begin(len(tokens_T)))
    with model.ops.running(), closing(steps):
        while name != "logits":
            begin = time.perf_counter()
            step = steps.send(value)
            seconds.append(time.perf_counter() - begin)
            name, value = step.name, step.value
    return seconds


def machine_limits(n_threads: int, weights_bytes: int) -> Limits:
    """Measure what so many threads can do right now: the best of a few plain reads, and of float32 multiply-adds.

    What is read is as large as the weights within 1 GiB, but four times the largest cache at least. So weights that fit
    the caches beat this limit: a small model may take less time than is predicted.
    """
    # Here, since they import Numba, and counting goes without.
    from mistral_ref.benchmark import multiply_add_limit, read_limit  # noqa: PLC0415
    from mistral_ref.machine import cache_bytes  # noqa: PLC0415

    read = read_limit(n_threads, max(4 * cache_bytes(), min(weights_bytes, _LARGEST_READ)))
    peak = multiply_add_limit(n_threads)
    bandwidth, flops = (max(limit.measure() for _ in range(_N_SAMPLES)) for limit in (read, peak))
    return Limits(1e9 * bandwidth, 1e9 * flops)


class CostRow(NamedTuple):
    """One step, or several done one after the other.

    predicted   seconds by the machine's limits, of several the sum
    bound       what the step is bound by, of several the one that is predicted to take longest
    seconds     measured in each repeat
    """

    cost: StepCost
    predicted: float
    bound: str
    seconds: list[float]

    @property
    def ratio(self) -> float:
        """Median of the seconds measured over the seconds predicted."""
        return median(self.seconds) / self.predicted


@dataclass(frozen=True)
class CostTable:
    """Costs, predictions and measurements of a pass.

    costs       of each step, in the order of the pass
    runs        the seconds of each step, for each repeat
    limits      what the predictions are made from
    by_kind     whether `str` shows a row for each kind of step, or for each step
    """

    costs: list[StepCost]
    runs: list[list[float]]
    limits: Limits
    by_kind: bool = True

    def rows(self, *, by_kind: bool) -> list[CostRow]:
        """Return a row for each step, or for each kind ("gate", "heads", ...) over all layers; the last is "total"."""
        groups = defaultdict(list)
        for step, cost in enumerate(self.costs):
            groups[cost.name.rpartition(".")[2] if by_kind else cost.name].append(step)
        return [*(self._row(name, steps) for name, steps in groups.items()), self._row("total", range(len(self.costs)))]

    def _row(self, name: str, steps: Sequence[int]) -> CostRow:
        costs, limits = [self.costs[step] for step in steps], self.limits
        longest = max(costs, key=lambda cost: cost.predicted(limits))
        predicted = sum(cost.predicted(limits) for cost in costs)
        seconds = [sum(run[step] for step in steps) for run in self.runs]
        return CostRow(_sum(name, costs), predicted, longest.bound(limits), seconds)

    def __str__(self) -> str:
        def cells(row: CostRow) -> list[str]:
            cost, us = row.cost, [1e6 * seconds for seconds in row.seconds]
            counts = [f"{cost.flops:,}", f"{cost.bytes:,}", f"{cost.intensity:.2f}", row.bound]
            times = [f"{1e6 * row.predicted:.1f}", f"{median(us):.1f}", f"{min(us):.1f} to {max(us):.1f}"]
            return [cost.name, *counts, *times, f"{row.ratio:.2f}"]

        headings = ["step", "FLOP", "bytes", "FLOP/byte", "bound by", "predicted us", "measured us", "min to max"]
        rows = [cells(row) for row in self.rows(by_kind=self.by_kind)]
        limits = f"limits: {self.limits.bandwidth / 1e9:.1f} GB/s, {self.limits.peak / 1e9:.1f} GFLOP/s"
        return f"{limits}\n\n{markdown_table([*headings, 'measured/predicted'], rows)}"


def cost_table(
    model: Model, tokens: Prompt, cache: KVCache | None = None, *,
    repeats: int = 5, by_kind: bool = True, limits: Limits | None = None, progress: Progress | None = None,
) -> CostTable:  # fmt: skip
    """Return what a pass of these tokens costs, predicted and measured; the arguments are those of `measure`.

    limits      of the machine; None: measured first, with the threads of the model's operations. NumPy's leave theirs
                to BLAS: the limits are then those of the threads that compiled operations would use
    """
    ids, ops = model.token_ids(tokens, cache), model.ops
    start, dtype = (0, ops.dtype.name) if cache is None else (cache.length, cache.dtype)
    costs = step_costs(
        model.config, model.weights, len(ids), start, cache_dtype=dtype, activation_bytes=ops.dtype.itemsize
    )
    if limits is None:
        from mistral_ref.compiled_ops import chosen_threads  # noqa: PLC0415 (imports Numba)

        n_threads = chosen_threads(getattr(ops, "threads", None))
        limits = machine_limits(n_threads, sum(cost.weight_bytes for cost in costs))
    return CostTable(costs, measure(model, ids, cache, repeats=repeats, progress=progress), limits, by_kind)
