"""Large arrays whose memory is used again.

The system maps new memory when it is first touched, 4 KiB at a time. A prompt's arrays are megabytes that live for a
step or two. With new memory for each, prompts of a small model take twice as long.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from mistral_kernels.processor import LINE

MIN_BYTES = 2**16  # bytes; smaller arrays are left to NumPy
MAX_KEPT_BYTES = 2**28  # bytes that are kept while nobody holds them


def aligned(n_bytes: int, make: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
    """Return an array of n bytes, made by np.empty or np.zeros, that begins where a cache line does.

    >>> aligned(100).ctypes.data % 64, aligned(100, np.zeros).sum().item()
    (0, 0)
    """
    memory = make(n_bytes + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + n_bytes]


class _Lease:
    """Memory of an array and its views; it is given back when the last of them is gone."""

    def __init__(self, memory: np.ndarray, give_back: Callable[[np.ndarray], None]) -> None:
        self._memory, self._give_back = memory, give_back
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._give_back(self._memory)


class ArrayPool:
    """A source of arrays, for any number of threads."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []  # what came back last is at the end
        self._taking = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
        """Return an array of any content, like np.empty.

        >>> pool = ArrayPool()
        >>> first = pool.empty((1000, 100))
        >>> place = first.ctypes.data
        >>> del first
        >>> pool.empty((900, 100)).ctypes.data == place
        True
        """
        n_bytes = math.prod(shape) * np.dtype(dtype).itemsize
        if n_bytes < MIN_BYTES:
            return np.empty(shape, dtype)
        array = np.asarray(_Lease(self._take(n_bytes), self._free.append))
        return array[:n_bytes].view(dtype).reshape(shape)

    def _take(self, n_bytes: int) -> np.ndarray:
        """Return at least n bytes: the smallest free memory that is less than twice as large, or new memory."""
        quarter = 1 << n_bytes.bit_length() - 3
        size = -(-n_bytes // quarter) * quarter  # one of four sizes from 2^n on, so that what grows finds memory, too
        with self._taking:  # memory may come back meanwhile, at the end
            places = [i for i in reversed(range(len(self._free))) if size <= len(self._free[i]) < 2 * size]
            if places:
                return self._free.pop(min(places, key=lambda i: len(self._free[i])))
            while sum(map(len, self._free)) > MAX_KEPT_BYTES:
                self._free.pop(0)
        return aligned(size)
