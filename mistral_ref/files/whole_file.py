"""Write a file or a directory completely or not at all: it gets its name only when it is complete.

It is written beside its place, under a new name of its own: `.mistral_ref-RANDOM.partial`. So no other file is touched,
and several writers of one name do not disturb each other.

A writer holds a lock on what it writes. The system releases the lock when the process ends, even if it is killed. The
next writer in the same folder removes everything of such a name that is not locked.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from mistral_ref.errors import CheckpointError, InputError, MistralRefError
from mistral_ref.files.paths import local_path

try:
    import fcntl
except ImportError:  # Windows has other locks; there nothing is removed
    fcntl = None  # type: ignore[assignment]

_NAME = re.compile(r"\.mistral_ref-[0-9a-f]{16}\.partial")
_LOCKED_AFTER = 1.0  # seconds; what is younger may not be locked yet
Made = TypeVar("Made")


@contextmanager
def whole_file(path: str | os.PathLike[str], error: type[MistralRefError] = CheckpointError) -> Iterator[BinaryIO]:
    """Give an open file to write to; at the end it gets the name `path` and replaces the file of that name.

    It has the permissions of the file that it replaces, or those that open() gives to a new file. A symbolic link is
    replaced, not followed. If the writing stops early, nothing of it is left, after Ctrl-C too. Raises `error` if
    writing fails, or if the name belongs to a directory, a device or a pipe.
    """
    target = local_path(path)
    found = _mode_of(target, error)
    if found is not None and not stat.S_ISREG(found):
        what = "a directory" if stat.S_ISDIR(found) else "not a regular file"
        raise error(f"{target}: cannot be written: it is there already, and it is {what}")
    with _partial(target, lambda partial: open(partial, "xb"), error) as (partial, file), file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        if found is not None:
            partial.chmod(stat.S_IMODE(found))


@contextmanager
def whole_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new directory to fill with files; at the end it gets the name `path`. If the filling fails, it is deleted.

    Raises InputError if the directory cannot be written, or if something has got its name meanwhile.
    """
    target = local_path(path)
    _mode_of(target, InputError)
    with _partial(target, Path.mkdir, InputError) as (directory, _):
        yield directory
        for written in directory.rglob("*"):
            if written.is_file():
                with open(written, "r+b") as file:
                    os.fsync(file.fileno())
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "it exists by now; another program has written it")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers have left in a folder: partial files and directories that no process has locked."""
    for path in folder.glob(".mistral_ref-*.partial"):
        with suppress(OSError):
            if _NAME.fullmatch(path.name) and os.lstat(path).st_mtime < time.time() - _LOCKED_AFTER:
                lock = _locked(path, wait=False)
                _remove(path)
                os.close(lock)


def _mode_of(target: Path, error: type[MistralRefError]) -> int | None:
    """Return the mode of the file or directory at `target`; None if there is nothing, or a link to nothing.

    Raises `error` if nothing can be there.
    """
    try:
        return os.stat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        if os.path.isdir(target.parent):
            return None
        raise error(f"{target}: cannot be written: there is no directory {target.parent}") from None
    except (OSError, ValueError) as caught:
        raise error(f"{target}: cannot be written: {getattr(caught, 'strerror', caught)}") from None


@contextmanager
def _partial(target: Path, make: Callable[[Path], Made], error: type[MistralRefError]) -> Iterator[tuple[Path, Made]]:
    """Make something beside `target`; give its path and what `make` returned; at the end rename it to `target`."""
    partial = target.parent / f".mistral_ref-{secrets.token_hex(8)}.partial"
    lock = None
    try:
        remove_leftovers(target.parent)
        made = make(partial)
        with suppress(OSError):  # a file system without locks: nothing is removed there
            lock = _locked(partial, wait=True)
        yield partial, made
        os.replace(partial, target)
    except OSError as caught:
        raise error(f"{target}: cannot be written: {caught.strerror or caught}") from None
    finally:
        _remove(partial)
        if lock is not None:
            os.close(lock)


def _locked(path: Path, *, wait: bool) -> int:
    """Lock a file or directory; return the descriptor that holds the lock.

    wait    whether to wait for a lock that another process holds; without it, OSError is raised

    Raises OSError also if there are no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(path: Path) -> None:
    """Remove a file or a directory with all that is in it, as far as possible."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
