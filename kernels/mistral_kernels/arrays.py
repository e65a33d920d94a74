"""The arrays that kernels take: what annotations call them, and their Numba types.

Arrays that are only read are read-only, so mapped files fit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types

Bytes = np.ndarray  # of uint8
Floats = np.ndarray  # of float32
Integers = np.ndarray

Kernel = Callable[..., Any]  # compiled for one signature
Part = Callable[..., Any]  # compiled into the kernels that call it
Operation = Callable[..., Any]  # writes its instructions itself (value.operation)


def read_only(element: Any, n_axes: int) -> Any:
    """Return the type of an array that a kernel only reads."""
    return types.Array(element, n_axes, "C", readonly=True)


def written(element: Any, n_axes: int) -> Any:
    """Return the type of an array that a kernel writes to."""
    return types.Array(element, n_axes, "C")


BYTES = read_only(types.uint8, 1)  # a matrix's numbers, row after row or tile after tile
VECTOR_IN, MATRIX_IN, HEADS_IN = (read_only(types.float32, n_axes) for n_axes in (1, 2, 3))
VECTOR_OUT, MATRIX_OUT, HEADS_OUT = (written(types.float32, n_axes) for n_axes in (1, 2, 3))
INDICES = read_only(types.int64, 1)
