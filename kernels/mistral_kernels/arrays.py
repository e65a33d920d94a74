"""The Numba types of the arrays that kernels take. Arrays that are only read are read-only, so mapped files fit."""

from __future__ import annotations

from typing import Any

from numba import types


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
