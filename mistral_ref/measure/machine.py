"""A description of the machine: everything that a benchmark's figures depend on, from processor to versions."""

from __future__ import annotations

import datetime
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from threadpoolctl import threadpool_info

from mistral_kernels.caches import CPUS, data_caches
from mistral_kernels.processor import LANES
from mistral_ref.errors import InputError
from mistral_ref.files.paths import local_path
from mistral_ref.host import command_output

_LARGEST_READ = 2**30  # bytes
_POWER = Path("/sys/class/power_supply")


def _cpu_name() -> str | None:
    if sys.platform == "darwin":
        return command_output("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or None


def _physical_cores() -> int | None:
    if sys.platform == "darwin":
        found = command_output("/usr/sbin/sysctl", "-n", "hw.physicalcpu")
        return int(found) if found and found.isdecimal() else None
    siblings = {path.read_text() for path in CPUS.glob("cpu[0-9]*/topology/thread_siblings_list")}
    return len(siblings) or None


def cache_bytes() -> int:
    """Return the size of the largest cache that the system reports; 32 MiB where it reports none."""
    return max(data_caches())


def uncached_bytes(n_bytes: int) -> int:
    """Return how many bytes to read to measure the speed of memory and not that of the caches.

    It is the size of the weights (n_bytes) with a maximum of 1 GiB, and always at least four times the largest cache.
    Weights that fit the caches are read faster than the limit measured in this way.
    """
    return max(4 * cache_bytes(), min(n_bytes, _LARGEST_READ))


def _commit() -> str | None:
    """Return the commit of the checkout, marked "dirty" if files have changed since; None outside of a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    return command_output("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def work_folder(asked: str | None) -> Path:
    """Return the folder of files that can be made again: synthetic checkpoints, and their copies for other engines.

    It is the folder that was asked for, or else one in the user's cache folder. Raises InputError if there is neither.
    """
    if asked:
        return local_path(asked)
    parent = local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if parent.parts[0] == "~":
        raise InputError("there is no home folder to keep files in; expected --work-dir, or HOME or XDG_CACHE_HOME")
    return parent / "mistral_ref" / "benchmarks"


def power_source() -> str | None:
    """Return "mains" or "battery" (many laptops are slower on battery); None where the system does not report it."""
    if sys.platform == "darwin":
        found = command_output("/usr/bin/pmset", "-g", "batt") or ""
        return "mains" if "AC Power" in found else "battery" if "Battery Power" in found else None
    states = []
    for supply in _POWER.glob("*"):
        try:
            if (supply / "type").read_text().strip() == "Battery" and not (supply / "scope").exists():  # not a mouse's
                states.append((supply / "status").read_text().strip())
        except OSError:
            continue
    return None if not states else "battery" if "Discharging" in states else "mains"


def throttle_count() -> int | None:
    """Return how often heat has slowed down cores since the machine started; None where this is not known."""
    counts = []
    for path in CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"):
        try:
            counts.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return sum(counts) if counts else None


def machine(n_threads: int) -> dict[str, Any]:
    """Return what figures depend on: processor, threads, versions, date. A value that is not known is None."""
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
        "vector_lanes": LANES,
        "power_source": power_source(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "blas": blas,
        "mistral_ref": version("mistral-ref"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def machine_lines(description: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines "name: value" of a description.

    >>> list(machine_lines({"vector_lanes": 8, "blas": ["a", "b"], "commit": None}))
    ['vector lanes: 8', 'blas: a; b', 'commit: unknown']
    """
    for name, value in description.items():
        shown = "; ".join(value) if isinstance(value, list) else "unknown" if value is None else value
        yield f"{name.replace('_', ' ')}: {shown}"
