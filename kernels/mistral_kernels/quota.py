"""What a container may use: Linux limits a group of processes (cgroup), whatever the machine has.

A group lies in another one, and each of them may have a limit. The smallest limit counts. Version 2 has one tree of
groups, and version 1 a tree for processors and one for memory (the kernel's admin-guide, cgroup-v2 and cgroup-v1).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
_UNLIMITED = 2**60  # version 1 writes a number near 2**63 where there is no limit


def _folders(controller: str, groups: Path, own_groups: Path) -> Iterator[Path]:
    """Yield the folders of this process's groups and of the groups around them, in both versions.

    A container often sees its own group as the root, while /proc names the path outside. Such folders do not exist
    here, so each folder up to the root is looked at.
    """
    try:
        lines = own_groups.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError):
        lines = []
    paths = {"": "/", controller: "/"}  # "" is version 2
    for line in lines:
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        paths |= dict.fromkeys(set(controllers.split(",")) & set(paths), path)
    trees = [(groups, paths[""]), (groups / "unified", paths[""]), (groups / controller, paths[controller])]
    for root, path in trees:
        folder = root / path.strip("/")
        yield from (folder, *(parent for parent in folder.parents if parent.is_relative_to(root)))


def _numbers(path: Path) -> list[int]:
    """Return the whole numbers in a file's first line; [] for a file that is missing or holds other words first."""
    try:
        words = path.read_text(encoding="utf-8").split("\n", 1)[0].split()
        return [int(word) for word in words]
    except (OSError, ValueError):
        return []


def _droppable(folder: Path) -> int:
    """Return the bytes of files in a group's memory that the system can drop; 0 where it does not tell."""
    try:
        lines = [line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()]
        sizes = {name: int(size) for name, size in lines}
    except (OSError, ValueError):
        return 0
    return sizes.get("total_inactive_file", sizes.get("inactive_file", 0))  # "total": version 1, with inner groups


def processors(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> float | None:
    """Return how many processors' time this process may use; None without a limit."""
    found = []
    for folder in _folders("cpu", groups, own_groups):
        limit = _numbers(folder / "cpu.max")  # microseconds of work, in how many microseconds
        limit = limit or _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        if len(limit) == 2 and min(limit) > 0:  # no limit is "max", or -1
            found.append(limit[0] / limit[1])
    return min(found, default=None)


def memory(groups: Path = GROUPS, own_groups: Path = OWN_GROUPS) -> int | None:
    """Return the bytes that this process can still get before a limit is reached; None without a limit.

    Files that the system has read and can drop do not count as used.
    """
    found = []
    for folder in _folders("memory", groups, own_groups):
        limit = _numbers(folder / "memory.max") or _numbers(folder / "memory.limit_in_bytes")
        used = _numbers(folder / "memory.current") or _numbers(folder / "memory.usage_in_bytes") or [0]
        if limit and limit[0] < _UNLIMITED:
            found.append(max(0, limit[0] - max(0, used[0] - _droppable(folder))))
    return min(found, default=None)
