"""The sizes of the processor's caches, as the system reports them. Kernels cut their work to fit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

CPUS = Path("/sys/devices/system/cpu")
_UNKNOWN = 2**15, 2**25


def _data_caches_of_linux(root: Path = CPUS) -> tuple[int, ...]:
    found = {}
    for folder in root.glob("cpu0/cache/index*"):
        try:
            level, holds, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
            if holds != "Instruction":
                found[int(level)] = int(size.removesuffix("K")) * 2**10
        except (OSError, ValueError):
            continue
    return tuple(found[level] for level in sorted(found))


@cache
def data_caches() -> tuple[int, ...]:
    """Return the bytes of each cache for data, nearest first; 32 KiB and 32 MiB where the system reports none."""
    return _data_caches_of_linux() or _UNKNOWN
