"""How long each step of a pass takes, beside the time that the machine's limits predict."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple, cast

import numpy as np

from mistral_ref.cache import KVCache
from mistral_ref.display import markdown_table
from mistral_ref.errors import Progress, checked_int
from mistral_ref.host import chosen_threads
from mistral_ref.measure.cost import Limits, StepCost, step_costs, total_cost
from mistral_ref.model import Model
from mistral_ref.passes import begin_pass
from mistral_ref.prompt import Prompt

_N_SAMPLES = 5  # of each limit


def measure(
    model: Model, tokens: Prompt, cache: KVCache | None = None, *, repeats: int = 5, progress: Progress | None = None
) -> list[list[float]]:
    """Time several passes. Return a list for each: the seconds of every step, in the order of the pass.

    One more pass runs first, as a warm-up. A step's time begins when the value before it is sent back, and ends when
    the step's own value arrives. So work between two steps counts with the later step: computing RoPE's cosines and
    sines counts with the embedding, and writing to the cache counts with `heads`.

    Every pass stops at its logits, before the cache counts its tokens. So all passes do the same work, and both
    `cache.length` and the keys that later queries see stay unchanged. The tokens must fit the cache's chunk.
    `progress` is called with (passes done, passes in all).
    """
    repeats = checked_int("repeats", repeats, least=1)
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
    steps = model.transformer.forward_steps(tokens_T, begin_pass(model.transformer, cache, len(tokens_T)))
    with model.ops.running(), closing(steps):
        while name != "logits":
            begin = time.perf_counter()
            step = steps.send(value)
            seconds.append(time.perf_counter() - begin)
            name, value = step.name, step.value
    return seconds


def machine_limits(n_threads: int, weights_bytes: int) -> Limits:
    """Measure what this number of threads can do right now: the best of a few plain reads and of a few peaks.

    The peak is that of float32 multiply-adds. `uncached_bytes` says how many bytes are read: more than any cache holds.
    So a small model, whose weights fit the caches, may take less time than is predicted.
    """
    # Imported here, since they import Numba and counting costs does not need it.
    from mistral_ref.measure.benchmark import multiply_add_limit, read_limit  # noqa: PLC0415
    from mistral_ref.measure.machine import uncached_bytes  # noqa: PLC0415

    read = read_limit(n_threads, uncached_bytes(weights_bytes))
    peak = multiply_add_limit(n_threads)
    bandwidth, flops = (max(limit.measure() for _ in range(_N_SAMPLES)) for limit in (read, peak))
    return Limits(1e9 * bandwidth, 1e9 * flops)


class CostRow(NamedTuple):
    """The figures of one step, or of several steps together.

    predicted   seconds that the machine's limits predict; of several steps the sum
    bound       what bounds the step, "arithmetic" or "memory"; of several steps that of the one predicted to be longest
    seconds     the seconds measured in each repeat; of several steps the sum
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

    costs       the cost of each step, in the order of the pass
    runs        for each repeat, the seconds of each step
    limits      the machine's limits, from which the predictions are computed
    by_kind     True: `str` shows a row for each kind of step; False: a row for each step
    """

    costs: list[StepCost]
    runs: list[list[float]]
    limits: Limits
    by_kind: bool = True

    def rows(self, *, by_kind: bool) -> list[CostRow]:
        """Return a row for each step, or for each kind of step ("gate", ...) over all layers; the last is "total"."""
        groups = defaultdict(list)
        for step, cost in enumerate(self.costs):
            groups[cost.name.rpartition(".")[2] if by_kind else cost.name].append(step)
        return [*(self._row(name, steps) for name, steps in groups.items()), self._row("total", range(len(self.costs)))]

    def _row(self, name: str, steps: Sequence[int]) -> CostRow:
        costs, limits = [self.costs[step] for step in steps], self.limits
        longest = max(costs, key=lambda cost: cost.predicted(limits))
        predicted = sum(cost.predicted(limits) for cost in costs)
        seconds = [sum(run[step] for step in steps) for run in self.runs]
        return CostRow(total_cost(name, costs), predicted, longest.bound(limits), seconds)

    def __str__(self) -> str:
        return self.text()

    def text(self, width: int | None = None) -> str:
        """Return the limits and the table. If the table needs more than `width` columns, it becomes a list."""

        def cells(row: CostRow) -> list[str]:
            cost, us = row.cost, [1e6 * seconds for seconds in row.seconds]
            counts = [f"{cost.flops:,}", f"{cost.bytes:,}", f"{cost.intensity:.2f}", row.bound]
            times = [f"{1e6 * row.predicted:.1f}", f"{median(us):.1f}", f"{min(us):.1f} to {max(us):.1f}"]
            return [cost.name, *counts, *times, f"{row.ratio:.2f}"]

        headings = ["step", "FLOP", "bytes", "FLOP/byte", "bound by", "predicted us", "measured us", "min to max"]
        rows = [cells(row) for row in self.rows(by_kind=self.by_kind)]
        limits = f"limits: {self.limits.bandwidth / 1e9:.1f} GB/s, {self.limits.peak / 1e9:.1f} GFLOP/s"
        return f"{limits}\n\n{markdown_table([*headings, 'measured/predicted'], rows, width)}"


def cost_table(
    model: Model, tokens: Prompt, cache: KVCache | None = None, *,
    repeats: int = 5, by_kind: bool = True, limits: Limits | None = None, progress: Progress | None = None,
) -> CostTable:  # fmt: skip
    """Return what a pass of these tokens costs, predicted and measured; `measure` explains the other arguments.

    by_kind     True: the table is printed with a row for each kind of step; False: with a row for each step
    limits      the limits of the machine. None: they are measured first, with as many threads as the model uses. For
                the NumPy backend, which uses BLAS's threads, they are measured with as many as Numba would use.
    """
    ids, ops = model.token_ids(tokens, cache), model.ops
    start, dtype = (0, ops.dtype.name) if cache is None else (cache.length, cache.dtype)
    costs = step_costs(
        model.config, model.weights, len(ids), start, cache_dtype=dtype, activation_bytes=ops.dtype.itemsize
    )
    if limits is None:
        n_threads = chosen_threads(ops.threads)
        limits = machine_limits(n_threads, sum(cost.weight_bytes for cost in costs))
    return CostTable(costs, measure(model, ids, cache, repeats=repeats, progress=progress), limits, by_kind)
