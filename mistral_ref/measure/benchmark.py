"""What the benchmarks share: the limits of the machine, fair timing, ratios of paired runs, and tables.

The speed of a machine drifts by tens of percent within minutes: it heats up, and other programs use it too. Therefore:

- Several candidates are measured in turn: one sample of each, then the next sample of each.
- A limit of the machine is measured just before each sample. The result is the share of that limit that the sample
  reached. This share drifts far less than the time does.
- A result is a median, with the smallest and the largest sample beside it. Every sample is kept.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import numpy as np

from mistral_kernels import limits
from mistral_kernels.processor import LANES
from mistral_kernels.team import team
from mistral_ref.errors import InputError, checked_int
from mistral_ref.files.whole_file import whole_file

_PEAK_SECONDS = 0.02  # about how long one measurement of the multiply-add peak takes


class Spread(NamedTuple):
    """Median, smallest and largest of some samples."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 1) -> tuple[str, str]:
        """Return two cells of a table: the median, and the range.

        >>> Spread(0.5, 0.25, 0.75).text(2)
        ('0.50', '0.25 to 0.75')
        """
        return f"{self.median:.{digits}f}", f"{self.low:.{digits}f} to {self.high:.{digits}f}"


def spread(samples: Sequence[float]) -> Spread:
    """Return the Spread of at least one sample.

    >>> spread([3, 1, 2])
    Spread(median=2, low=1, high=3)
    """
    return Spread(median(samples), min(samples), max(samples))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of each pair of samples: run i of one candidate over run i of the other.

    >>> ratios([2, 9], [1, 3])
    [2.0, 3.0]
    """
    return [numerator / denominator for numerator, denominator in zip(numerators, denominators, strict=True)]


@dataclass(frozen=True)
class Limit:
    """What the machine can do at most: `measure()` measures it now and returns an amount per second, in `unit`."""

    unit: str
    measure: Callable[[], float]


def read_limit(n_threads: int, n_bytes: int) -> Limit:
    """Return the limit in GB/s: plain reads of an array of n_bytes, which should be larger than all caches."""
    return read_limits([n_threads], n_bytes)[0]


def read_limits(counts: Sequence[int], n_bytes: int) -> list[Limit]:
    """Return the read limit for each number of threads in `counts`; all of them read the same array."""
    floats = np.ones(n_bytes // 4, np.float32)
    kernel = limits.plain_read()

    def measure(n_threads: int) -> float:
        start = time.perf_counter()
        kernel(floats, team(n_threads))
        return floats.nbytes / (time.perf_counter() - start) / 1e9

    return [Limit("GB/s", partial(measure, n_threads)) for n_threads in counts]


def multiply_add_limit(n_threads: int, kind: Literal["f32", "pairs"] = "f32") -> Limit:
    """Return the limit in GFLOP/s: vector multiply-adds on registers, each counted as two operations.

    In one instruction a lane does one multiply-add of float32 ("f32"), or two multiply-adds of bf16 ("pairs").
    """
    kernel = limits.multiply_add_peak(kind)
    rounds = 10**5

    def measure_rounds(n: int) -> float:
        start = time.perf_counter()
        kernel(n, team(n_threads))
        return time.perf_counter() - start

    measure_rounds(rounds)  # wakes the threads
    rounds = math.ceil(rounds * _PEAK_SECONDS / measure_rounds(rounds))
    in_a_lane = 2 if kind == "pairs" else 1
    billions = 2 * in_a_lane * limits.N_CHAINS * LANES * n_threads * rounds / 1e9
    return Limit("GFLOP/s", lambda: billions / measure_rounds(rounds))


@dataclass(frozen=True)
class Candidate:
    """Something to be measured.

    run     a function that does it once
    work    how much one run does, in the limit's unit times seconds: GB read, or GFLOP
    rest    seconds to wait after a sample; needed after BLAS, whose threads keep the cores busy for a while
    """

    name: str
    run: Callable[[], object]
    work: float
    limit: Limit
    rest: float = 0.0


@dataclass(frozen=True)
class Measurement:
    """All samples of one candidate: the seconds of a run, and the limit measured just before each sample."""

    name: str
    unit: str
    work: float
    seconds: list[float]
    limits: list[float]

    @property
    def rates(self) -> list[float]:
        """The work per second of each sample, in the unit of the limit."""
        return [self.work / seconds for seconds in self.seconds]

    @property
    def shares(self) -> list[float]:
        """Each rate as a share of its limit."""
        return ratios(self.rates, self.limits)

    def cells(self) -> list[str]:
        """Return one row of the table whose headings are HEADINGS."""
        milliseconds = spread([1e3 * seconds for seconds in self.seconds]).median
        rate, share = spread(self.rates), spread([100 * share for share in self.shares])
        limit = f"{median(self.limits):.1f} {self.unit}"
        return [self.name, f"{milliseconds:.3g}", *rate.text(), self.unit, limit, *share.text()]

    def as_json(self) -> dict[str, Any]:
        """Return every sample, and the figures computed from them."""
        figures = {name: getattr(self, name) for name in ("name", "unit", "work", "seconds", "limits")}
        return figures | {"rates": self.rates, "shares": self.shares, "median_share": median(self.shares)}


HEADINGS = ["what", "ms", "rate", "min to max", "unit", "limit", "% of it", "min to max %"]


def _runs_for(candidate: Candidate, seconds: float) -> int:
    """Warm up, and return how many runs a sample needs to last at least this number of seconds."""
    candidate.run()
    start = time.perf_counter()
    candidate.run()
    once = max(time.perf_counter() - start, 1e-9)
    time.sleep(candidate.rest)
    return max(1, math.ceil(seconds / once))


def alternate(
    candidates: Sequence[Candidate],
    *,
    repeats: int = 7,
    seconds: float = 0.1,
    progress: Callable[[str], None] | None = None,
) -> list[Measurement]:
    """Measure the candidates in turn, `repeats` samples of each; a sample lasts at least `seconds`.

    The limit of a candidate is measured just before each of its samples. `progress` is called with a text that says
    what is about to happen.
    """
    repeats = checked_int("repeats", repeats, least=1)
    report = progress or (lambda text: None)
    runs = []
    for candidate in candidates:
        report(f"warming up: {candidate.name}")
        runs.append(_runs_for(candidate, seconds))
    measured = [Measurement(candidate.name, candidate.limit.unit, candidate.work, [], []) for candidate in candidates]
    for repeat in range(repeats):
        for candidate, n_runs, measurement in zip(candidates, runs, measured, strict=True):
            report(f"{repeat + 1} of {repeats}: {candidate.name}")
            measurement.limits.append(candidate.limit.measure())
            start = time.perf_counter()
            for _ in range(n_runs):
                candidate.run()
            measurement.seconds.append((time.perf_counter() - start) / n_runs)
            time.sleep(candidate.rest)
    return measured


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write figures as a JSON file; raise InputError if the file cannot be written."""
    with whole_file(path, InputError) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")
