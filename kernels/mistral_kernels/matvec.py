"""Matrix times vector, for decoding: y[o] = sum over i of W[o, i] x[i], with W as it lies in the file.

The memory's speed is the limit, so all that counts is to read W once, in long streams, and to be done with each number
before the next arrives. Each thread reads its rows in eight streams, an eighth of them each, one row after the other:
eight sums that do not wait for each other, each vector of x loaded once for all of them, and streams that hardly ever
end, since one that has just begun is slow; what comes next in each is asked for ahead of time.

A matrix of bf16 may be taken as pairs of its numbers, and x rounded to bf16: half the work for processors that multiply
and add up pairs (pairs.pair_products).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.instructions import LANES
from mistral_kernels.layout import TILE
from mistral_kernels.rows import TILE_INPUTS, row_sums, tile_sums
from mistral_kernels.simd import load, load_part, store_rounded

ROWS = 8
FP8_BLOCK = 128  # fp8 matrices have a scale for every 128 x 128 weights

BYTES = types.Array(types.uint8, 1, "C", readonly=True)
VECTOR_IN = types.Array(types.float32, 1, "C", readonly=True)
VECTOR_OUT = types.Array(types.float32, 1, "C")
SCALES = types.Array(types.float32, 2, "C", readonly=True)


@part()
def scale_of(scales: Any, o: int, i: int) -> float:
    """Return the scale of the fp8 weight W[o, i]."""
    return scales[min(o // FP8_BLOCK, len(scales) - 1), min(i // FP8_BLOCK, scales.shape[1] - 1)]


@part()
def round_to_pairs(x: Any, start: int, n: int, pairs: Any, at: int) -> None:
    """Put n numbers of x from a flat offset on, rounded to bf16, into pairs[at:], which ends at a whole vector."""
    for i in range(0, n, LANES):
        store_rounded(pairs, 2 * at + i, load_part(x, start + i, min(n - i, LANES)))


@part()
def in_pairs(x: Any) -> Any:
    """Return x, of an even length, rounded to bf16, as len(x) // 2 pairs."""
    pairs = np.empty((len(x) + LANES - 1) // LANES * LANES // 2, np.float32)
    round_to_pairs(x, 0, len(x), pairs, 0)
    return pairs[: len(x) // 2]


@part()
def as_it_is(x: Any) -> Any:
    """Return x."""
    return x


@made_once
def matvec(kind: str) -> Any:
    """Return a kernel: matvec(W, scales, x, y, n_threads), for matrices of a kind.

    W           O * I numbers of the kind, row after row, as bytes (uint8); "pairs" are bf16, and I is even
    scales      what fp8 weights are multiplied by, float32 (1, 1) or (ceil(O/128), ceil(I/128)); else not read
    x, y        (I,) and (O,) float32
    """
    inputs = in_pairs if kind == "pairs" else as_it_is
    no_sums, add_products, add_products_part, totals = row_sums(kind, ROWS)
    is_scaled = kind == "fp8"

    @part(kind)
    def multiply_rows(W: Any, scales: Any, x: Any, y: Any, first: int, last: int) -> None:
        n_in, apart = len(x), (last - first + ROWS - 1) // ROWS
        block = FP8_BLOCK if is_scaled else n_in  # inputs that share a scale
        for o in range(first, first + apart):
            rows = (o * n_in, apart * n_in, (last - 1) * n_in)
            for start in range(0, n_in, block):
                stop = min(start + block, n_in)
                sums = no_sums()
                for i in range(start, stop - 2 * LANES + 1, 2 * LANES):
                    sums = add_products(sums, W, rows, i, load(x, i))
                    sums = add_products(sums, W, rows, i + LANES, load(x, i + LANES))
                for i in range(start + (stop - start) // (2 * LANES) * (2 * LANES), stop, LANES):
                    n = min(stop - i, LANES)
                    sums = add_products_part(sums, W, rows, i, load_part(x, i, n), n)
                y_rows = totals(sums)
                for number in range(ROWS):
                    row = o + number * apart
                    if row >= last:
                        continue
                    if is_scaled:
                        before = y[row] if start else numba.float32(0.0)
                        y[row] = y_rows[number] * scale_of(scales, row, start) + before
                    else:
                        y[row] = y_rows[number]

    @kernel(types.void(BYTES, SCALES, VECTOR_IN, VECTOR_OUT, types.intp), kind)
    def matvec(W: Any, scales: Any, x: Any, y: Any, n_threads: int) -> None:
        q = inputs(x)
        if n_threads == 1:
            multiply_rows(W, scales, q, y, 0, len(y))
        else:
            for t in numba.prange(n_threads):
                multiply_rows(W, scales, q, y, len(y) * t // n_threads, len(y) * (t + 1) // n_threads)

    return matvec


TILES = 4  # read at once
PART = 512  # inputs that are summed up by themselves, so that long sums lose less


@made_once
def matvec_tiled(kind: str) -> Any:
    """Return a kernel: matvec_tiled(W, x, y, n_threads), as matvec, for matrices in tile order (layout.py).

    The length of x is even; for "pairs", which are bf16 in tile order, a multiple of four.
    """
    inputs = in_pairs if kind == "pairs" else as_it_is
    no_tile_sums, add_tile_products, store_tile_sums = tile_sums(kind, TILES)

    @part(kind)
    def multiply_tiles(W: Any, x: Any, y: Any, first: int, last: int) -> None:
        """Compute the rows of the tiles first, ..., last - 1, in streams as above."""
        n_in, apart = len(x), (last - first + TILES - 1) // TILES
        totals = np.empty(TILES * TILE, np.float32)
        for tile in range(first, first + apart):
            tiles = (tile * TILE * n_in, apart * TILE * n_in, (last - 1) * TILE * n_in)
            totals[:] = 0
            for start in range(0, n_in, PART):
                sums = no_tile_sums()
                for i in range(start, min(start + PART, n_in), TILE_INPUTS):
                    sums = add_tile_products(sums, W, tiles, i, x)
                store_tile_sums(sums, totals, 0)
            for number in range(TILES):
                if tile + number * apart < last:
                    o = (tile + number * apart) * TILE
                    n = min(TILE, len(y) - o)
                    y[o : o + n] = totals[number * TILE : number * TILE + n]

    @kernel(types.void(BYTES, VECTOR_IN, VECTOR_OUT, types.intp), kind)
    def matvec_tiled(W: Any, x: Any, y: Any, n_threads: int) -> None:
        q, n_tiles = inputs(x), (len(y) + TILE - 1) // TILE
        if n_threads == 1:
            multiply_tiles(W, q, y, 0, n_tiles)
        else:
            for t in numba.prange(n_threads):
                multiply_tiles(W, q, y, n_tiles * t // n_threads, n_tiles * (t + 1) // n_threads)

    return matvec_tiled
