"""How many threads this process should run, and what Numba has to run them. Who calls kernels says how many it wants.

Numba runs parallel loops on one of three layers: OpenMP or TBB where their libraries are installed, else its own,
"workqueue", which takes fifty times as long to start a loop and must not be entered by two Python threads at once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import numba

from mistral_kernels import KernelWarning
from mistral_kernels.caches import CPUS
from mistral_kernels.forks import open_in_children
from mistral_kernels.quota import processors

_TURN = open_in_children(threading.RLock())


def _listed(text: str) -> set[int]:
    """Return the numbers of a list such as Linux writes it.

    >>> sorted(_listed("0-2,5"))
    [0, 1, 2, 5]
    """
    numbers: set[int] = set()
    for entry in text.strip().split(","):
        first, _, last = entry.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _performance_cores_of_linux(allowed: set[int], root: Path = CPUS) -> int:
    """Return how many cores the allowed logical CPUs belong to; of cores of several kinds only the fastest count."""
    capacities = {}
    for cpu in allowed:
        try:
            capacities[cpu] = int((root / f"cpu{cpu}/cpu_capacity").read_text())  # ARM tells
        except (OSError, ValueError):
            capacities[cpu] = 0
    try:
        fast = _listed((root.parent / "../cpu_core/cpus").resolve().read_text())  # Intel's hybrids do
    except (OSError, ValueError):
        fast = allowed
    fast = (fast & allowed) or allowed
    fast = {cpu for cpu in fast if capacities[cpu] == max(capacities[other] for other in fast)}
    cores = set()
    for cpu in fast:
        try:
            cores.add(frozenset(_listed((root / f"cpu{cpu}/topology/thread_siblings_list").read_text())))
        except (OSError, ValueError):
            cores.add(frozenset([cpu]))
    return len(cores)


@cache
def performance_cores() -> int:
    """Return how many threads to run: the number of cores, or less where a container's quota allows less.

    Counted are the physical cores of the fastest kind that this process may run on. Two logical CPUs of one core share
    its arithmetic, and slow cores make the fast ones wait for them. Where the system does not tell, all logical CPUs
    are counted. A quota of 2.5 processors lets two threads run without a pause.
    """
    quota = processors()
    cores = _cores()
    return cores if quota is None else max(1, min(cores, int(quota)))


def _cores() -> int:
    """Return the number of physical cores of the fastest kind that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return _performance_cores_of_linux(os.sched_getaffinity(0))
    if sys.platform == "darwin":
        try:
            asked = ["/usr/sbin/sysctl", "-n", "hw.perflevel0.physicalcpu"]
            return int(subprocess.run(asked, capture_output=True, check=True, timeout=5).stdout)
        except (OSError, ValueError, subprocess.SubprocessError):
            pass
    return os.cpu_count() or 1


@cache
def layer() -> str:
    """Return the threading layer that this process uses: "omp", "tbb" or "workqueue"; warn if it is the last."""
    numba.set_num_threads(numba.get_num_threads())  # starts it
    name = numba.threading_layer()
    if name == "workqueue":
        warnings.warn(
            "Numba has only its own threading layer, workqueue: starting a loop takes 0.1 ms, and passes take turns; "
            "install OpenMP (libgomp1, or libomp on macOS) or the package tbb",
            KernelWarning,
            stacklevel=2,
        )
    return name


@cache
def _first_process() -> int:
    """Return the process that started the layer. A child that it forks has the layer's memory, but not its threads."""
    layer()
    return os.getpid()


def usable(n_threads: int) -> int:
    """Return how many threads a kernel may use: n, or 1 in a child that was forked after the layer had started.

    There a parallel loop would wait for threads that do not exist, or OpenMP would end the process.
    """
    if n_threads == 1 or os.getpid() == _first_process():
        return n_threads
    _warn_of_fork(os.getpid())
    return 1


@cache
def _warn_of_fork(pid: int) -> None:
    warnings.warn(
        f"process {pid} was forked after kernels had started their threads, so its kernels run on one thread; "
        "processes started by multiprocessing's 'spawn' have all threads",
        KernelWarning,
        stacklevel=2,
    )


@contextmanager
def using(n_threads: int) -> Iterator[None]:
    """Let the kernels that this Python thread starts meanwhile use n threads."""
    with _TURN if layer() == "workqueue" else nullcontext():
        before = numba.get_num_threads()
        try:
            numba.set_num_threads(min(n_threads, numba.config.NUMBA_NUM_THREADS))
            yield
        finally:
            numba.set_num_threads(before)
