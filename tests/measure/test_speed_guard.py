"""The two products that nearly all time goes into, held against what this machine can do: no factor of two gets lost.

On a busy machine, several threads are held against one.

Kernel and limit are measured in turn within one run, so that a slow machine slows down both; and so that a busy one
does no harm, the best samples are compared, or processor time. 70% and more have been seen, mostly 90%; half of that
fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import pytest

from mistral_kernels import limits, threads
from mistral_kernels.processor import LANES
from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.measure.benchmark import Candidate, alternate, ratios, read_limit
from mistral_ref.measure.machine import cache_bytes
from mistral_ref.weights import Matrix

LEAST = 0.5  # of the limit
REPEATS, TRIES = 7, 3  # whoever shares the machine comes and goes


def product(ops: CompiledOps, n_tokens: int, n_out: int, n_in: int) -> tuple[Callable[[], object], Matrix]:
    """Return a function that multiplies ones with a bf16 matrix of ones, and that matrix."""
    weight = Matrix("ones", "bf16", np.full((n_out, n_in), 0x3F80, np.uint16))
    x_TI = np.ones((n_tokens, n_in), np.float32)
    return lambda: ops.linear(x_TI, weight), weight


def check(share: Callable[[], float], of: str, least: float = LEAST) -> None:
    """Fail if every try falls short of the least share."""
    best = 0.0
    for _ in range(TRIES):
        best = max(best, share())
        if best >= least:
            return
    raise AssertionError(f"{100 * best:.0f}% of {of}; expected {100 * least:.0f}% at least")


def test_a_product_with_one_vector_keeps_up_with_plain_reads() -> None:
    ops, n_in = CompiledOps(threads=min(2, threads.performance_cores())), 4096
    run, weight = product(ops, 1, max(2**27, 2 * cache_bytes()) // (2 * n_in), n_in)
    candidate = Candidate("product", run, weight.nbytes / 1e9, read_limit(ops.threads, weight.nbytes))

    def share() -> float:
        (measured,) = alternate([candidate], repeats=REPEATS, seconds=0)
        return max(measured.rates) / max(measured.limits)

    with ops.running():
        check(share, "plain reads")


def test_a_product_with_many_vectors_keeps_up_with_multiply_adds() -> None:
    n_tokens, n_out, n_in, rounds = 256, 1024, 1024, 10**6
    ops, peak = CompiledOps(threads=1), limits.multiply_add_peak()
    run, _ = product(ops, n_tokens, n_out, n_in)

    def rate(work: float, run: Callable[[], object]) -> float:
        start = time.thread_time()
        run()
        return work / (time.thread_time() - start)

    def share() -> float:
        samples = [
            (
                rate(2 * n_tokens * n_out * n_in, run),
                rate(2 * limits.N_CHAINS * LANES * rounds, lambda: peak(rounds, 1)),
            )
            for _ in range(REPEATS + 1)
        ]
        return median(ratios(*zip(*samples[1:], strict=True)))  # the first loads kernels

    with ops.running():
        check(share, "the multiply-add peak")


BUSY_LEAST = 0.4  # of one thread's speed; 0.9 and more were measured, and 0.04 where threads wait for each other


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """Keep every core busy meanwhile with a process that computes."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_cores)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("busy_cores")
@pytest.mark.parametrize("n_tokens", [1, 64])
def test_several_threads_are_no_slower_than_one_where_others_compute(n_tokens: int) -> None:
    n_threads = max(2, threads.performance_cores())
    runs = {n: product(CompiledOps(threads=n), n_tokens, 2048, 1024)[0] for n in (1, n_threads)}

    def seconds(run: Callable[[], object]) -> float:
        start = time.perf_counter()
        for _ in range(200 if n_tokens == 1 else 20):
            run()
        return time.perf_counter() - start

    def share() -> float:
        alone, together = ([seconds(runs[n]) for _ in range(3)] for n in runs)
        return min(1.0, median(alone) / median(together))

    check(share, "one thread's speed", BUSY_LEAST)
