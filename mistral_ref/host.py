"""The machine that this process runs on: how many threads and how much memory the process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mistral_kernels import quota
from mistral_ref.errors import InputError, MistralRefError, checked_int, size

THREADS_VARIABLE = "MISTRAL_REF_THREADS"
_MUCH = 2**26  # bytes


def chosen_threads(threads_asked: int | None) -> int:
    """Return the number of threads to use.

    It is `threads_asked`; without it the number in MISTRAL_REF_THREADS; without both the number of performance cores.
    Raises InputError unless the first two are whole numbers from 1 to 1024.
    """
    if threads_asked is not None:
        return checked_int("threads", threads_asked, least=1, most=1024)
    found = os.environ.get(THREADS_VARIABLE)
    if not found:
        from mistral_kernels.threads import performance_cores  # noqa: PLC0415 (the import of Numba is slow)

        return performance_cores()
    number = int(found) if found.isdecimal() and len(found) < 10 else found
    return checked_int(THREADS_VARIABLE, number, least=1, most=1024)


def available_memory() -> int | None:
    """Return the bytes of memory that this process can still get; None if unknown.

    A container's limit counts. macOS does not tell, so there it is all memory of the machine.
    """
    if sys.platform == "darwin":
        found = command_output("/usr/sbin/sysctl", "-n", "hw.memsize")
        return int(found) if found and found.isdecimal() else None
    sizes = bytes_told(Path("/proc/meminfo"), "MemAvailable:"), quota.memory()
    return min((size for size in sizes if size is not None), default=None)


def lacking_memory(n_bytes: int) -> int | None:
    """Return how many bytes this process can still get, if they are less than `n_bytes`; else None, as if unknown.

    Small amounts are not looked up: that takes longer than a token of a small model.
    """
    left = available_memory() if n_bytes >= _MUCH else None
    return left if left is not None and n_bytes > left else None


def require_memory(n_bytes: int, what: str, hint: str = "", kind: type[MistralRefError] = InputError) -> None:
    """Raise an error of this kind if `what` takes more memory than this process can still get."""
    left = lacking_memory(n_bytes)
    if left is not None:
        raise kind(
            f"{what} would take {size(n_bytes)} of memory, and {size(left)} are left" + (f"; {hint}" if hint else "")
        )


def process_memory(pid: int) -> dict[str, int | None]:
    """Return two sizes of a process's memory in bytes; None for a size that the system does not give.

    peak_resident   the most memory that the process has had
    anonymous       the memory now that is not mapped from a file
    """
    folder = Path("/proc") / str(pid)
    return {
        "peak_resident": bytes_told(folder / "status", "VmHWM:"),
        "anonymous": bytes_told(folder / "smaps_rollup", "Anonymous:"),
    }


def bytes_told(path: Path, name: str) -> int | None:
    """Return the size in a line "Name:  123 kB" of a system file, in bytes; None without such a file or line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(name)]
    return int(found[0]) * 2**10 if found else None


def command_output(*command: str) -> str | None:
    """Return the output of a system command, stripped; None if the command cannot be run, fails or takes over 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
