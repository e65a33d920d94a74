"""How fast a model is on this machine, and what limits it. The tests follow llama.cpp's llama-bench:

    pp512           prompt processing: 512 random tokens, 512 at a time, with the logits of the last one
    tg128           text generation: 128 random tokens, one at a time
    tg128 @ d4096   the same, after 4096 other tokens

Tokenizing, sampling and reading the file are not measured. Each test runs once as a warm-up, and then several times.
A limit of the machine is measured just before each run, and the run is compared with it. Generation reads every weight
once for each token, so its limit is plain reads of memory. A prompt multiplies all weights with many tokens, so its
limit is multiply-adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np

from mistral_ref import passes
from mistral_ref.cache import KVCache
from mistral_ref.errors import checked_int
from mistral_ref.measure.benchmark import Limit, ratios
from mistral_ref.measure.busy import processor_time, share_of_others
from mistral_ref.measure.cost import StepCost, step_costs
from mistral_ref.model import Model
from mistral_ref.passes import end_of_keys, pass_lengths

CHUNK = 512  # how many tokens of a prompt go through the model at a time
_SEED = 0


class SpeedTest(NamedTuple):
    """One test: n tokens after `depth` others. The n tokens are a prompt, or are generated one at a time."""

    n_prompt: int
    n_gen: int
    depth: int

    @property
    def n(self) -> int:
        """How many tokens one run of the test has."""
        return self.n_prompt or self.n_gen

    @property
    def name(self) -> str:
        """The name of the test in llama-bench.

        >>> SpeedTest(0, 128, 4096).name
        'tg128 @ d4096'
        """
        kind = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        return f"{kind} @ d{self.depth}" if self.depth else kind


def speed_tests(n_prompt: Sequence[int], n_gen: Sequence[int], depths: Sequence[int]) -> list[SpeedTest]:
    """Return a test for each number of tokens at each depth. For 0 tokens there is no test.

    >>> [test.name for test in speed_tests([512], [0, 8], [0, 64])]
    ['pp512', 'tg8', 'pp512 @ d64', 'tg8 @ d64']
    """
    numbers = {"n-prompt": n_prompt, "n-gen": n_gen, "n-depth": depths}
    for name, values in numbers.items():
        for value in values:
            checked_int(name, value, least=0, most=2**24)
    tests = [SpeedTest(*((n, 0) if kind == "pp" else (0, n)), depth)
             for depth in depths for kind, several in (("pp", n_prompt), ("tg", n_gen)) for n in several]  # fmt: skip
    return [test for test in tests if test.n]


@dataclass(frozen=True)
class SpeedResult:
    """Every sample of one test.

    unit        the unit of the limit: GB/s for generation, GFLOP/s for a prompt
    work        the least that one run must do: the GB that it reads to generate its tokens, or the GFLOP of its prompt
    seconds     the time of each run
    limits      the limit of the machine in `unit`, measured just before each run
    others      the share of the processors' time that other programs took meanwhile; None: not known
    """

    test: SpeedTest
    unit: str
    work: float
    seconds: list[float] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    others: float | None = None

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each run."""
        return [self.test.n / seconds for seconds in self.seconds]

    @property
    def mean(self) -> float:
        """Tokens per second: the mean over the runs."""
        return mean(self.rates)

    @property
    def deviation(self) -> float:
        """Tokens per second: the standard deviation over the runs; 0 for a single run."""
        return stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def work_rates(self) -> list[float]:
        """GB/s or GFLOP/s of each run."""
        return [self.work / seconds for seconds in self.seconds]

    @property
    def shares(self) -> list[float]:
        """The share of its limit that each run reached."""
        return ratios(self.work_rates, self.limits)


def work_of(model: Model, test: SpeedTest, cache_dtype: str) -> tuple[int, int]:
    """Return how many FLOP a run needs, and how many bytes it reads and writes at least; see cost.py.

    A prompt is counted as it is read (passes.last_logits): in the last layer only the last token is more than its keys
    and values, and a chunk that is not the last one ends there. For generation, every token is counted as if it were
    the one in the middle of the run, that is, with as many tokens before it.
    """

    def costs(n_tokens: int, start: int) -> list[StepCost]:
        return step_costs(model.config, model.weights, n_tokens, start, last_only=True, cache_dtype=cache_dtype)

    if test.n_gen:
        counted = costs(1, test.depth + test.n_gen // 2)
        return test.n_gen * sum(cost.flops for cost in counted), test.n_gen * sum(cost.bytes for cost in counted)
    counted, end = [], end_of_keys(model.config)
    for start in range(0, test.n_prompt, CHUNK):
        chunk = costs(min(CHUNK, test.n_prompt - start), test.depth + start)
        counted += chunk if start + CHUNK >= test.n_prompt else takewhile(lambda cost: cost.name != end, chunk)
    return sum(cost.flops for cost in counted), sum(cost.bytes for cost in counted)


def prepare(model: Model, tests: Sequence[SpeedTest], cache_dtype: str | None = None) -> None:
    """Compile every kernel that the tests need."""
    counts = {n for test in tests for n in (test.depth, test.n_prompt)}
    lengths = {1, *(length for n in counts for length in pass_lengths(n, CHUNK))}
    passes.prepare(model.transformer, model.new_cache(dtype=cache_dtype), lengths, last_only=True)


def measure_speed(
    model: Model,
    tests: Sequence[SpeedTest],
    *,
    repeats: int,
    read: Limit,
    peak: Limit,
    cache_dtype: str | None = None,
    seconds: float | None = None,
    warm_up: bool = True,
    progress: Callable[[str], object] | None = None,
) -> list[SpeedResult]:
    """Run the tests one after the other, in the order given, and return their results.

    repeats         how many runs of each test are measured
    read, peak      the limits in GB/s and in GFLOP/s, made by benchmark.py
    cache_dtype     the dtype of keys and values in the cache; None: the cache's default
    seconds         about how long all runs of one test may take; if runs are long, fewer are measured, but at least one
    warm_up         whether each test first runs once without being measured
    progress        called with a text that says what is about to happen
    """
    repeats = checked_int("repeats", repeats, least=1)
    report = progress or (lambda text: None)
    results = []
    for test in tests:
        cache = model.new_cache(chunk=CHUNK, dtype=cache_dtype)
        flops, n_bytes = work_of(model, test, cache.dtype)
        limit, work = (read, n_bytes / 1e9) if test.n_gen else (peak, flops / 1e9)
        rng = np.random.default_rng(_SEED)
        if test.depth:
            report(f"{test.name}: the {test.depth} tokens before")
            model.forward(rng.integers(0, model.config.vocab_size, test.depth), cache, last_only=True)
        ids = rng.integers(0, model.config.vocab_size, test.n)
        n_runs, took = repeats, 0.0
        if warm_up:
            report(f"{test.name}: warming up")
            first = ids if test.n_prompt else ids[:2]
            took = _run(model, cache, test, first) * test.n / len(first)
        if seconds is not None and took:
            n_runs = min(repeats, max(1, int(seconds / took)))
        limits, times, before = [], [], processor_time()
        for number in range(n_runs):
            report(f"{test.name}: {number + 1} of {n_runs}")
            limits.append(limit.measure())
            times.append(_run(model, cache, test, ids))
        others = share_of_others(before, processor_time())
        results.append(SpeedResult(test, limit.unit, work, times, limits, others))
    return results


def _run(model: Model, cache: KVCache, test: SpeedTest, ids: np.ndarray) -> float:
    """Return the seconds that a run takes; after the run the cache is as long as before it."""
    used = cache if len(ids) <= cache.chunk else cache.copy()  # a ring can take back at most one chunk of tokens
    start = time.perf_counter()
    for part in [ids] if test.n_prompt else ids.reshape(-1, 1):
        model.forward(part, used, last_only=True)
    took = time.perf_counter() - start
    if used is cache:
        cache.truncate(test.depth)
    return took
