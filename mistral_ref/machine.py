"""The machine, described: what every figure of a benchmark depends on, from the processor to the versions."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from threadpoolctl import threadpool_info

import mistral_ref
from mistral_kernels import threads
from mistral_kernels.instructions import LANES

_CPUS = Path("/sys/devices/system/cpu")


def _output_of(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str | None:
    if sys.platform == "darwin":
        return _output_of("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _physical_cores() -> int | None:
    if sys.platform == "darwin":
        found = _output_of("/usr/sbin/sysctl", "-n", "hw.physicalcpu")
        return int(found) if found and found.isdecimal() else None
    siblings = {path.read_text() for path in _CPUS.glob("cpu[0-9]*/topology/thread_siblings_list")}
    return len(siblings) or None


def cache_bytes() -> int:
    """Return the size of the largest cache that the system tells of; 32 MiB where it tells of none."""
    sizes = []
    for path in _CPUS.glob("cpu0/cache/index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdecimal():
            sizes.append(int(text[:-1]) * 2**10)
    return max(sizes, default=2**25)


def _commit() -> str | None:
    """Return the checkout's commit, with a mark if files have changed since; None outside of a checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    return _output_of("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def machine(n_threads: int) -> dict[str, Any]:
    """Return what figures depend on: processor, threads, versions, date. What the system does not tell is None."""
    libraries = [info for info in threadpool_info() if info["user_api"] == "blas"]
    blas = [
        f"{info['internal_api']} {info['version']} ({info.get('architecture') or 'unknown'}), "
        f"{info['num_threads']} threads"
        for info in libraries
    ]
    return {
        "cpu": _cpu_name(),
        "logical_cpus": os.cpu_count(),
        "physical_cores": _physical_cores(),
        "largest_cache_mib": cache_bytes() / 2**20,
        "threads": n_threads,
        "threading_layer": threads.layer(),
        "vector_lanes": LANES,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "blas": blas,
        "mistral_ref": mistral_ref.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine_lines(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield a description as lines of "name: value".

    >>> list(machine_lines({"vector_lanes": 8, "blas": ["a", "b"], "commit": None}))
    ['vector lanes: 8', 'blas: a; b', 'commit: unknown']
    """
    for name, value in description.items():
        shown = "; ".join(value) if isinstance(value, list) else "unknown" if value is None else value
        yield f"{name.replace('_', ' ')}: {shown}"
