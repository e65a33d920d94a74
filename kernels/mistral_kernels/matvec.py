"""Matrix times vector, for decoding: y[o] = sum over i of W[o, i] x[i], with W as it lies in the file.

The memory's speed is the limit, so all that counts is to read W once, in long streams, and to be done with each number
before the next arrives. Eight rows are read at once: eight streams, eight sums that do not wait for each other, and each
vector of x loaded once for all of them. Meanwhile the next eight rows are asked for, since a stream that has just begun
is slow.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
from numba import types

from mistral_kernels.compiling import kernel, part
from mistral_kernels.simd import LANES, load, load_part, row_sums

ROWS = 8
FP8_BLOCK = 128  # fp8 matrices have a scale for every 128 x 128 weights

BYTES = types.Array(types.uint8, 1, "C", readonly=True)
VECTOR_IN = types.Array(types.float32, 1, "C", readonly=True)
VECTOR_OUT = types.Array(types.float32, 1, "C")
SCALES = types.Array(types.float32, 2, "C", readonly=True)


@functools.cache
def matvec(kind: str) -> Any:
    """Return the kernel matvec(W, scales, x, y, n_threads) for matrices of a kind.

    W           O * I numbers of the kind, row after row, as bytes (uint8)
    scales      what fp8 weights are multiplied by, float32 (1, 1) or (ceil(O/128), ceil(I/128)); else not read
    x, y        (I,) and (O,) float32
    """
    no_sums, add_products, add_products_part, prefetch, totals = row_sums(kind, ROWS)
    is_scaled = kind == "fp8"

    @part
    def multiply_rows(W: Any, scales: Any, x: Any, y: Any, first: int, last: int) -> None:
        n_in = len(x)
        block = FP8_BLOCK if is_scaled else n_in  # inputs that share a scale
        for o in range(first, last, ROWS):
            rows = (o * n_in, n_in, (last - 1) * n_in)
            for start in range(0, n_in, block):
                stop = min(start + block, n_in)
                sums = no_sums()
                for i in range(start, stop - 2 * LANES + 1, 2 * LANES):
                    prefetch(W, rows, i)
                    sums = add_products(sums, W, rows, i, load(x, i))
                    sums = add_products(sums, W, rows, i + LANES, load(x, i + LANES))
                for i in range(start + (stop - start) // (2 * LANES) * (2 * LANES), stop, LANES):
                    n = min(stop - i, LANES)
                    sums = add_products_part(sums, W, rows, i, load_part(x, i, n), n)
                y_rows = totals(sums)
                for row in range(min(ROWS, last - o)):
                    if is_scaled:
                        scale = scales[min(o // FP8_BLOCK, len(scales) - 1), min(start // FP8_BLOCK, scales.shape[1] - 1)]
                        y[o + row] = y_rows[row] * scale + (y[o + row] if start else numba.float32(0.0))
                    else:
                        y[o + row] = y_rows[row]

    @kernel(types.void(BYTES, SCALES, VECTOR_IN, VECTOR_OUT, types.intp), variant=kind)
    def matvec(W: Any, scales: Any, x: Any, y: Any, n_threads: int) -> None:
        if n_threads == 1:
            multiply_rows(W, scales, x, y, 0, len(y))
        else:
            groups = (len(y) + ROWS - 1) // ROWS
            for t in numba.prange(n_threads):
                first, last = groups * t // n_threads * ROWS, groups * (t + 1) // n_threads * ROWS
                multiply_rows(W, scales, x, y, first, min(last, len(y)))

    return matvec
