"""Threads that share out the work of kernels: each piece is done once, whoever does it."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from numba import types

from mistral_kernels import team
from mistral_kernels.arrays import written
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.sharing import OWNER, shared_out


@made_once
def counted() -> Any:
    """Return a kernel: counted(counts, rounds, threads) adds 1 to each of counts, and that `rounds` times."""

    @part()
    def count(first: int, last: int, counts: Any) -> None:
        for i in range(first, last):
            counts[i] += 1

    @kernel(types.void(written(types.int64, 1), types.intp, types.intp))
    def counted(counts: Any, rounds: int, threads: int) -> None:
        for _ in range(rounds):
            shared_out(count, len(counts), threads, (counts,))

    return counted


@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 1000])
@pytest.mark.parametrize("n_threads", [1, 2, 3, 7])
def test_each_unit_of_work_is_done_once(n_threads: int, n: int) -> None:
    counts = np.zeros(n, np.int64)
    counted()(counts, 100, team.team(n_threads))
    assert (counts == 100).all()


def test_threads_that_call_kernels_at_once_do_not_wait_for_each_other() -> None:
    """One has the team, and the others do their work alone."""
    all_counts = [np.zeros(100, np.int64) for _ in range(4)]
    callers = [
        threading.Thread(target=lambda counts=counts: counted()(counts, 5000, team.team(3))) for counts in all_counts
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert all((counts == 5000).all() for counts in all_counts)


def test_work_is_done_without_helpers_and_while_another_kernel_has_the_team() -> None:
    alone, counts = team.Team(), np.zeros(10, np.int64)
    counted()(counts, 1, alone.sized(4))
    alone._memory[OWNER] = 1
    counted()(counts, 1, alone.sized(4))
    assert (counts == 2).all()


def test_a_helper_sleeps_when_there_is_nothing_to_do_and_wakes_for_work() -> None:
    crew = team.Team()
    crew.grow(2)
    (helper,) = crew.helpers
    for _ in range(3):
        deadline = time.monotonic() + 20
        while not helper.sleeps and time.monotonic() < deadline:
            time.sleep(0.001)
        used = time.process_time()
        time.sleep(0.1)
        assert helper.sleeps
        assert time.process_time() - used < 0.05
        crew.wake(2)
        counts = np.zeros(1000, np.int64)
        counted()(counts, 10, crew.sized(2))
        assert (counts == 10).all()


@made_once
def without_memory() -> Any:
    """Return a kernel whose work asks for more memory than there is."""

    @part()
    def ask(first: int, last: int, n: int) -> None:
        np.empty(n, np.float64)[0] = 1

    @kernel(types.void(types.intp, types.intp))
    def without_memory(n: int, threads: int) -> None:
        shared_out(ask, 4, threads, (n,))

    return without_memory


@pytest.mark.parametrize("n_threads", [1, 2])
def test_missing_memory_is_an_error(n_threads: int) -> None:
    with pytest.raises(MemoryError):
        without_memory()(2**58, team.team(n_threads))
