"""The host of this process: how many threads and how much memory it may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mistral_ref.errors import InputError, checked_int, short_repr

THREADS_VARIABLE = "MISTRAL_REF_THREADS"


def chosen_threads(threads_asked: int | None) -> int:
    """Return how many threads to use: as asked, or as MISTRAL_REF_THREADS says, or one for each performance core."""
    if threads_asked is not None:
        return checked_int("threads", threads_asked, least=1, most=1024)
    found = os.environ.get(THREADS_VARIABLE)
    if not found:
        from mistral_kernels.threads import performance_cores  # noqa: PLC0415 (imports Numba)

        return performance_cores()
    if not (found.isdecimal() and len(found) < 10):
        raise InputError(f"{THREADS_VARIABLE} is {short_repr(found)}; expected a whole number of at least 1")
    return checked_int(THREADS_VARIABLE, int(found), least=1, most=1024)


def available_memory() -> int | None:
    """Return the bytes of memory that programs can still have; of macOS, which does not tell, all there is."""
    if sys.platform == "darwin":
        found = command_output("/usr/sbin/sysctl", "-n", "hw.memsize")
        return int(found) if found and found.isdecimal() else None
    return bytes_told(Path("/proc/meminfo"), "MemAvailable:")


def process_memory(pid: int) -> dict[str, int | None]:
    """Return a process's bytes that were resident at most, and that are of no file now; None where nobody tells."""
    folder = Path("/proc") / str(pid)
    return {
        "peak_resident": bytes_told(folder / "status", "VmHWM:"),
        "anonymous": bytes_told(folder / "smaps_rollup", "Anonymous:"),
    }


def bytes_told(path: Path, name: str) -> int | None:
    """Return the bytes that a line "Name:  123 kB" of a file of the system's tells of; None where there is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name)]
    return int(found[0]) * 2**10 if found else None


def command_output(*command: str) -> str | None:
    """Return what a command of the system prints; None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
