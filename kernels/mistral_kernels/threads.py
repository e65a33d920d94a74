"""How many threads this process should run. team.py has the threads; who calls kernels says how many it wants."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

from mistral_kernels.caches import CPUS
from mistral_kernels.quota import processors


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
