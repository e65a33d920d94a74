"""Matrix times matrix, for prompts: y[t, o] = sum over i of x[t, i] W[o, i], with W as it lies in the file.

A block of W (WIDTH rows, DEPTH inputs) is widened to float32 and transposed into a panel. The panel stays in the core's
own cache while all rows of x are multiplied with it, tile by tile. Widening costs about 1/T of the work, and reading x
again for every block about 1/WIDTH.
"""

from __future__ import annotations

from typing import Any

import numba
from numba import types

from mistral_kernels.caches import data_caches
from mistral_kernels.compiling import FIRST, kernel, made_once, part
from mistral_kernels.instructions import LANES, TAKES_HALVES
from mistral_kernels.matvec import BYTES, MATRIX_IN, MATRIX_OUT, SCALES, round_to_pairs, scale_of
from mistral_kernels.pairs import PAIRS_ARE_FASTER
from mistral_kernels.simd import floats, load_part, rounded, store
from mistral_kernels.tile import ROWS, VECTORS, WIDTH, tile, transpose

# Inputs of a panel. It fits the first cache; processors that take vectors in halves can wait for the second cache.
DEPTH = 256 if data_caches()[0] >= 4 * 256 * WIDTH or TAKES_HALVES else 128
# Numbers of x that meet all blocks before the next numbers do: they stay in the last cache, which others use too.
KEPT = max(2**20, data_caches()[-1] // 32)

SLABS = types.Array(types.float32, 3, "C")


def _takes_pairs(kind: str) -> bool:
    return kind == "pairs" and PAIRS_ARE_FASTER


def whole_slabs(n_tokens: int, n_in: int, depth: int) -> tuple[int, int, int]:
    """Return the shape of x cut into slabs of `depth` inputs, with its rows rounded up to whole tiles."""
    return -(-n_in // depth), -(-n_tokens // ROWS) * ROWS, depth


def slab_shape(kind: str, n_tokens: int, n_in: int) -> tuple[int, int, int]:
    """Return the shape of a product's workspace: x, or pairs of it, in whole slabs."""
    return whole_slabs(n_tokens, n_in // 2 if _takes_pairs(kind) else n_in, DEPTH)


@part()
def _copy(x: Any, start: int, n: int, slabs: Any, at: int) -> None:
    """Copy n numbers of x from a flat offset to slabs[at:], in whole vectors."""
    for i in range(0, n, LANES):
        store(slabs, at + i, load_part(x, start + i, min(n - i, LANES)))


@part()
def _copy_rounded(x: Any, start: int, n: int, slabs: Any, at: int) -> None:
    """As _copy, with x rounded to bf16."""
    for i in range(0, n, LANES):
        store(slabs, at + i, rounded(load_part(x, start + i, min(n - i, LANES))))


def _way(kind: str) -> tuple[Any, int, str, str]:
    """Return the function that copies x, the inputs that count as one, and the kinds of a panel's and W's numbers."""
    if _takes_pairs(kind):
        return round_to_pairs, 2, "pairs", "pairs"
    if kind == "pairs":
        return _copy_rounded, 1, "f32", "bf16"
    return _copy, 1, "f32", kind


def _panel_filler(kind: str) -> Any:
    """Return the function that widens a block of W into a panel."""
    n_columns, transpose_whole, transpose_part = transpose(kind, ahead=DEPTH)
    is_scaled = kind == "fp8"

    @part(kind)
    def fill_panel(W: Any, scales: Any, panel: Any, o: int, n_out: int, start: int, stop: int, n_in: int) -> None:
        """panel[k - start, r] = W[o + r, k], and any numbers where r is past the last row."""
        for r in range(0, WIDTH, 8):
            first = min(o + r, n_out - 1)
            rows = (first * n_in, n_in, (n_out - 1) * n_in)
            for k in range(start, stop, n_columns):
                scale = scale_of(scales, first, k) if is_scaled else numba.float32(1.0)
                offset = (k - start) * WIDTH + r
                if k + n_columns <= stop:
                    transpose_whole(W, rows, k, scale, panel, offset, WIDTH)
                else:
                    transpose_part(W, rows, k, scale, panel, offset, WIDTH, stop - k)

    return fill_panel


def over_blocks(multiply_slab: Any, new_panel: Any, depth: int, *variant: object) -> Any:
    """Return the function that multiplies all inputs with some blocks of WIDTH outputs.

    multiply_slab(W, x, n_in, start, stop, o, n_out, panel, sums, n_rows, continues) multiplies the inputs start, ...,
    stop - 1. It writes the result into `sums` (n_rows, WIDTH) of the outputs from o on, or adds it where `continues` is
    true. Only multiply_slab knows what W and x hold. new_panel() makes its workspace, with room for `depth` inputs.
    """

    @part(*variant)
    def multiply_blocks(W: Any, x: Any, n_rows: int, n_in: int, y: Any, first: int, last: int) -> None:
        """Compute the blocks first, ..., last - 1."""
        n_tokens, n_out = y.shape
        # Sums are kept here: the distance between rows of y is often a multiple of 4 KiB, and such rows push each
        # other out of the caches.
        panel, sums = new_panel(), floats(n_rows * WIDTH)
        chunk = max(KEPT // n_rows // depth, 1) * depth
        for of_chunk in range(0, n_in, chunk):
            for o in range(first * WIDTH, min(last * WIDTH, n_out), WIDTH):
                for start in range(of_chunk, min(of_chunk + chunk, n_in), depth):
                    stop, continues = min(start + depth, n_in), start > of_chunk
                    multiply_slab(W, x, n_in, start, stop, o, n_out, panel, sums, n_rows, continues)
                for t in range(n_tokens):
                    for lane in range(min(WIDTH, n_out - o)):
                        before = y[t, o + lane] if of_chunk else numba.float32(0)
                        y[t, o + lane] = before + sums[t * WIDTH + lane]

    return multiply_blocks


@made_once
def matmul(kind: str) -> Any:
    """Return a kernel: matmul(W, scales, x, slabs, y, n_threads), for matrices of a kind.

    W, scales   as in matvec
    x, y        (T, I) and (T, O) float32, T at least 1
    slabs       float32 of any content, of the shape slab_shape(kind, T, I)

    With "pairs" x is rounded to bf16. Where the processor is faster with pairs, panels, slabs and I count pairs of
    inputs. Elsewhere both matrices are widened to float32.
    """
    copy, at_once, kind_of_panel, kind_of_W = _way(kind)
    multiply_tile = tile(ROWS, VECTORS, kind_of_panel, steps=2, asks_for_next_rows=True)
    fill_panel = _panel_filler(kind_of_W)

    @part(kind)
    def cut(x: Any, slabs: Any, first: int, last: int) -> None:
        """slabs[slab, t, i] = x[t, slab * DEPTH + i] for the slabs first, ..., last - 1, and 0 past the last token."""
        n_tokens, n_in = x.shape
        for slab in range(first, last):
            start = slab * at_once * DEPTH
            n = min(at_once * DEPTH, n_in - start)
            for t in range(n_tokens):
                copy(x, t * n_in + start, n, slabs, (slab * slabs.shape[1] + t) * DEPTH)
            slabs[slab, n_tokens:] = 0

    @part(kind)
    def new_panel() -> Any:
        return floats(DEPTH * WIDTH)

    @part(kind)
    def multiply_slab(
        W: Any, slabs: Any, n_in: int, start: int, stop: int, o: int, n_out: int, panel: Any, sums: Any, n_rows: int,
        continues: bool,
    ) -> None:  # fmt: skip
        fill_panel(W[0], W[1], panel, o, n_out, start, stop, n_in)
        for t in range(0, n_rows, ROWS):
            from_x, to_sums = (start * n_rows + t * DEPTH, DEPTH), (t * WIDTH, WIDTH)
            multiply_tile(slabs, from_x, panel, 0, stop - start, sums, to_sums, continues)

    multiply_blocks = over_blocks(multiply_slab, new_panel, DEPTH, kind)

    @kernel(types.void(BYTES, SCALES, MATRIX_IN, SLABS, MATRIX_OUT, types.intp), kind)
    def matmul(W: Any, scales: Any, x: Any, slabs: Any, y: Any, n_threads: int) -> None:
        # Slabs are copies: rows of x whose distance is a power of two push each other out of the cache.
        n_slabs, n_rows = slabs.shape[:2]
        n_in, n_blocks = x.shape[1] // at_once, (y.shape[1] + WIDTH - 1) // WIDTH
        if n_threads == 1:
            cut(x, slabs, FIRST, n_slabs)
            multiply_blocks((W, scales), slabs, n_rows, n_in, y, FIRST, n_blocks)
        else:
            for slab in numba.prange(n_slabs):
                cut(x, slabs, numba.intp(slab), numba.intp(slab) + 1)
            for thread in numba.prange(n_threads):
                first, last = n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads
                multiply_blocks((W, scales), slabs, n_rows, n_in, y, first, last)

    return matmul
