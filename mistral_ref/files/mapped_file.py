"""A file whose bytes are mapped into memory: the system reads a page of it when a byte of the page is used."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import numpy as np

from mistral_ref.errors import CheckpointError


class MappedFile:
    """The bytes of a file, mapped read-only.

    path    the file
    bytes   uint8, read-only. Arrays that are made of it are views of the file

    If a file becomes shorter while it is mapped, the system ends the process (SIGBUS) when a byte beyond the file's new
    end is used. `is_cut` tells before.
    """

    def __init__(self, path: Path) -> None:
        """Map a file; raise CheckpointError if it is not a regular file, is empty or cannot be read."""
        require_regular_file(path)  # before open(), because open() of a named pipe waits for its other end
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        except ValueError:
            raise CheckpointError(f"{path}: is empty") from None
        self.path, self.bytes = path, np.ndarray(len(self._map), np.uint8, buffer=self._map)

    @property
    def is_cut(self) -> bool:
        """Whether the file is shorter now than when it was mapped. A new file under its name does not count."""
        return self._map.size() < len(self._map)

    def holds(self, array: np.ndarray) -> bool:
        """Return whether an array is a view of this file."""
        return bool(np.may_share_memory(self.bytes, array))


def require_regular_file(path: Path) -> int:
    """Return the size of the file at `path` in bytes. Links are followed.

    Raises CheckpointError if there is no file, or if it is not a regular file.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status.st_size
