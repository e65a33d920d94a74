"""Paths that a user gave: `~` is the user's home, and what lies there instead of a model is told by name."""

from __future__ import annotations

import os
from pathlib import Path

from mistral_ref.errors import InputError, MistralRefError


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path as a Path. `~` at its beginning becomes the user's home, if the user has one."""
    return Path(os.path.expanduser(os.fspath(path)))


def checked_directory(path: str | os.PathLike[str]) -> Path:
    """Return the path of a model's directory as a Path; raise InputError unless it is a directory that can be read."""
    directory = local_path(path)
    try:
        names = os.listdir(os.path.join(directory, "."))  # the dot: files in it can be opened, too
    except FileNotFoundError:
        raise InputError(f"{directory}: no such directory") from None
    except (OSError, ValueError) as error:
        if os.path.isfile(directory):
            raise InputError(f"{directory}: a file, not a directory; give the directory that holds it") from None
        raise InputError(f"{directory}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if "snapshots" in names and not {"params.json", "config.json"} & set(names):
        snapshot = _snapshot(directory)
        raise InputError(f"{directory}: a folder of the hub's cache, not a model's directory; expected {snapshot}")
    return directory


def refuse_pointer(path: Path, beginning: bytes, error: type[MistralRefError]) -> None:
    """Raise `error` if a file that begins with these bytes is a pointer of Git LFS, in place of the file itself."""
    if beginning.startswith(b"version https://git-lfs.github.com/spec/"):
        raise error(f"{path}: a pointer of Git LFS, not the file itself; expected the file: `git lfs pull` fetches it")


def _snapshot(repository: Path) -> Path:
    """Return the snapshot in a repository's folder of the hub's cache: the one of its branch main, or else the newest.

    The hub keeps files as snapshots/COMMIT/NAME, and the commit of main in refs/main.
    """
    snapshots = [path for path in (repository / "snapshots").glob("*") if os.path.isdir(path)]
    try:
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    newest_last = sorted(snapshots, key=lambda path: (path.name == main, path.stat().st_mtime))
    return newest_last[-1] if snapshots else repository / "snapshots" / "COMMIT"
