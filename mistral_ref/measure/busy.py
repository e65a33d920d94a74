"""How busy other programs keep the processors while something is measured. Only Linux tells."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

_STAT = Path("/proc/stat")
_LEAST_SECONDS = 0.1  # the system counts in hundredths of a second, so a shorter time says nothing


class ProcessorTime(NamedTuple):
    """Seconds since the machine started, summed over the processors on which this process may run.

    busy    used by all programs, and by other virtual machines
    total   passed
    own     used by this process
    """

    busy: float
    total: float
    own: float


def processor_time() -> ProcessorTime | None:
    """Return the ProcessorTime of now; None where the system does not tell."""
    try:
        lines = _STAT.read_text(encoding="ascii").splitlines()
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        ticks = os.sysconf("SC_CLK_TCK")
        own, busy, total = time.process_time(), 0, 0
        for name, *fields in map(str.split, lines):
            if name in allowed:
                user, nice, system, idle, waiting, *interrupts_and_stolen = map(int, fields[:8])  # user has the guests
                used = user + nice + system + sum(interrupts_and_stolen)
                busy, total = busy + used, total + used + idle + waiting
    except (OSError, ValueError, AttributeError):
        return None
    return ProcessorTime(busy / ticks, total / ticks, own) if total else None


def share_of_others(before: ProcessorTime | None, after: ProcessorTime | None) -> float | None:
    """Return the share of the processors' time that went to others between two moments, from 0 to 1; None: not known.

    >>> share_of_others(ProcessorTime(5, 20, 1), ProcessorTime(9, 30, 2))
    0.3
    """
    if before is None or after is None or after.total - before.total < _LEAST_SECONDS:
        return None
    busy, total, own = (later - earlier for later, earlier in zip(after, before, strict=True))
    return min(max(0.0, (busy - own) / total), 1.0)
