"""Matrix times matrix, for prompts: y[t, o] = sum over i of x[t, i] W[o, i], with W as it lies in the file.

A block of W (WIDTH rows, DEPTH inputs) is widened to float32 and transposed into a panel that stays in the cache next
to the core, and all rows of x are multiplied with it, tile by tile. Widening costs about 1/T of the whole, and reading
x again for every block 1/WIDTH.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.instructions import LANES
from mistral_kernels.layout import TILE
from mistral_kernels.matvec import BYTES, MATRIX_IN, MATRIX_OUT, SCALES, round_to_pairs, scale_of
from mistral_kernels.pairs import PAIRS_ARE_FASTER
from mistral_kernels.simd import load_part, rounded, store
from mistral_kernels.tile import ROWS, VECTORS, WIDTH, tile, transpose, widen

DEPTH = 256  # of a panel: WIDTH * DEPTH float32 are 48 KiB at most
KEPT = 2**20  # numbers of x that all blocks go through before the next ones: what stays in a last cache that others use

FLOATS = types.Array(types.float32, 1, "C")


def _takes_pairs(kind: str) -> bool:
    return kind == "pairs" and PAIRS_ARE_FASTER


def slab_numbers(kind: str, n_tokens: int, n_in: int) -> int:
    """Return how many numbers a product's workspace has: x, or pairs of it, cut into slabs of DEPTH."""
    n_counted = n_in // 2 if _takes_pairs(kind) else n_in
    return -(-n_counted // DEPTH) * DEPTH * n_tokens


@part()
def _copy(x: Any, start: int, n: int, slabs: Any, at: int) -> None:
    """Put n numbers of x from a flat offset on into slabs[at:], which ends at a whole vector."""
    for i in range(0, n, LANES):
        store(slabs, at + i, load_part(x, start + i, min(n - i, LANES)))


@part()
def _copy_rounded(x: Any, start: int, n: int, slabs: Any, at: int) -> None:
    """As _copy, with x rounded to bf16."""
    for i in range(0, n, LANES):
        store(slabs, at + i, rounded(load_part(x, start + i, min(n - i, LANES))))


def _way(kind: str) -> tuple[Any, int, str, str]:
    """Return what copies x, how many inputs are counted as one, and what numbers of a panel and of W are taken for."""
    if _takes_pairs(kind):
        return round_to_pairs, 2, "pairs", "pairs"
    if kind == "pairs":
        return _copy_rounded, 1, "f32", "bf16"
    return _copy, 1, "f32", kind


def _panel_filler(kind: str, is_tiled: bool) -> Any:
    """Return the part of a kernel that widens a block of W into a panel."""
    transpose_whole, transpose_part = transpose(kind, ahead=DEPTH)
    widen_tile = widen(kind)
    is_scaled = kind == "fp8"

    @part(kind, is_tiled)
    def fill_from_tiles(W: Any, scales: Any, panel: Any, o: int, n_out: int, start: int, stop: int, n_in: int) -> None:
        """panel[k - start, r] = W[o + r, k], and any numbers where r is past the last row."""
        for r in range(0, WIDTH, TILE):
            tile = min(o + r, n_out - 1) // TILE
            for k in range(start, stop):
                widen_tile(W, (tile * n_in + k) * TILE, panel, (k - start) * WIDTH + r)

    @part(kind, is_tiled)
    def fill_from_rows(W: Any, scales: Any, panel: Any, o: int, n_out: int, start: int, stop: int, n_in: int) -> None:
        """As fill_from_tiles, for a matrix as it is stored."""
        for r in range(0, WIDTH, 8):
            first = min(o + r, n_out - 1)
            rows = (first * n_in, n_in, (n_out - 1) * n_in)
            for k in range(start, stop, 8):
                scale = scale_of(scales, first, k) if is_scaled else numba.float32(1.0)
                offset = (k - start) * WIDTH + r
                if k + 8 <= stop:
                    transpose_whole(W, rows, k, scale, panel, offset, WIDTH)
                else:
                    transpose_part(W, rows, k, scale, panel, offset, WIDTH, stop - k)

    return fill_from_tiles if is_tiled else fill_from_rows


def over_blocks(multiply_block: Any, new_panel: Any, *variant: object) -> Any:
    """Return the part of a kernel that takes all inputs through some blocks of WIDTH outputs.

    multiply_block(W, x, n_in, start, stop, y, o, n_out, column, panel) adds what the inputs start, ..., stop - 1 give
    to WIDTH outputs from o on, to y from `column` on. What W and x are is its business; new_panel() is its workspace.
    """

    @part(*variant)
    def multiply_blocks(W: Any, x: Any, n_in: int, y: Any, first: int, last: int) -> None:
        """Compute the blocks first, ..., last - 1."""
        n_tokens, n_out = y.shape
        panel = new_panel()
        # Tiles are whole: the last block, if it is not, goes into an array of its own.
        is_cut = last * WIDTH > n_out
        edge = np.empty((n_tokens if is_cut else 0, WIDTH), np.float32)
        chunk = max(KEPT // n_tokens // DEPTH, 1) * DEPTH
        for start in range(0, n_in, chunk):
            for block in range(first, last):
                o, stop = block * WIDTH, min(start + chunk, n_in)
                is_edge = is_cut and block == last - 1
                target, column = (edge, 0) if is_edge else (y, o)
                multiply_block(W, x, n_in, start, stop, target, o, n_out, column, panel)
        if is_cut:
            o = (last - 1) * WIDTH
            y[:, o:] = edge[:, : n_out - o]

    return multiply_blocks


@made_once
def matmul(kind: str, is_tiled: bool = False) -> Any:
    """Return a kernel: matmul(W, scales, x, slabs, y, n_threads), for matrices of a kind, as stored or in tile order.

    W, scales   as in matvec and matvec_tiled; fp8 is never in tile order
    x, y        (T, I) and (T, O) float32, T at least 1
    slabs       float32, slab_numbers(kind, T, I) of any content

    Of "pairs" x is rounded to bf16. Where the processor is faster with them, everything but x counts pairs of inputs:
    panels, slabs, and I itself; else both are widened to float32.
    """
    copy, at_once, kind_of_panel, kind_of_W = _way(kind)
    multiply_tile = tile(ROWS, VECTORS, kind_of_panel, asks_for_next_rows=True)
    fill_panel = _panel_filler(kind_of_W, is_tiled)

    @part(kind, is_tiled)
    def cut(x: Any, slabs: Any, first: int, last: int) -> None:
        """slabs[slab, t, i] = x[t, slab * DEPTH + i] for the slabs first, ..., last - 1."""
        n_tokens, n_in = x.shape
        for slab in range(first, last):
            start = slab * at_once * DEPTH
            for t in range(n_tokens):
                copy(x, t * n_in + start, min(at_once * DEPTH, n_in - start), slabs, (slab * n_tokens + t) * DEPTH)

    @part(kind, is_tiled)
    def new_panel() -> Any:
        return np.empty(DEPTH * WIDTH, np.float32)

    @part(kind, is_tiled)
    def multiply_block(
        W: Any, slabs: Any, n_in: int, start: int, stop: int, y: Any, o: int, n_out: int, column: int, panel: Any
    ) -> None:
        n_tokens = len(y)
        for first in range(start, stop, DEPTH):
            last = min(first + DEPTH, stop)
            fill_panel(W[0], W[1], panel, o, n_out, first, last, n_in)
            for t in range(0, n_tokens, ROWS):
                from_x, to_y = (first * n_tokens + t * DEPTH, DEPTH), (t * y.shape[1] + column, y.shape[1])
                multiply_tile(slabs, from_x, panel, 0, last - first, y, to_y, min(ROWS, n_tokens - t), first > 0)

    multiply_blocks = over_blocks(multiply_block, new_panel, kind, is_tiled)

    @kernel(types.void(BYTES, SCALES, MATRIX_IN, FLOATS, MATRIX_OUT, types.intp), kind, is_tiled)
    def matmul(W: Any, scales: Any, x: Any, slabs: Any, y: Any, n_threads: int) -> None:
        n_tokens, n_in, n_out = len(x), x.shape[1] // at_once, y.shape[1]
        # Rows of x whose starts are a power of two apart would push each other out of the cache.
        n_slabs, n_blocks = (n_in + DEPTH - 1) // DEPTH, (n_out + WIDTH - 1) // WIDTH
        slabs = slabs.reshape((n_slabs, n_tokens, DEPTH))
        if n_threads == 1:
            cut(x, slabs, 0, n_slabs)
            multiply_blocks((W, scales), slabs, n_in, y, 0, n_blocks)
        else:
            for slab in numba.prange(n_slabs):
                cut(x, slabs, slab, slab + 1)
            for thread in numba.prange(n_threads):
                first, last = n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads
                multiply_blocks((W, scales), slabs, n_in, y, first, last)

    return matmul
