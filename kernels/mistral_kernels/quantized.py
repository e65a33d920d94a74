"""Products with matrices of 8 or 4 bits in tile order: for decoding, and for prompts.

The loops are those of matvec.py and matmul.py; only the numbers differ. Inputs are rounded to int16 or int8, a group at
a time. Products are summed as integers, a group at a time (dots.py). Memory delivers half or a quarter of the bytes of
16 bits. Integer sums are exact and each group's sum is rounded once. So decoding and prompts agree up to the order of
groups.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from mistral_kernels.compiling import FIRST, kernel, made_once, part
from mistral_kernels.dots import GROUP_ROWS, group_tile, rounding, tile_groups, unpack
from mistral_kernels.layout import TILE
from mistral_kernels.matmul import SLABS, over_blocks, whole_slabs
from mistral_kernels.matvec import BYTES, MATRIX_IN, MATRIX_OUT, VECTOR_IN, VECTOR_OUT
from mistral_kernels.simd import floats
from mistral_kernels.tile import WIDTH

GROUPS = (32, 64, 128)  # inputs that share a scale
DEPTH = 256  # of a panel of codes: 12 KiB at most
TILES = 4  # tiles that are read at the same time, each as a stream of its own


def _rounded(activations: str, group: int) -> Any:
    """Return the part of a kernel that rounds some inputs of one token, a whole number of groups with zeros behind."""
    round_group = rounding(activations, group)

    @part(activations, group)
    def rounded(x: Any, start: int, stop: int, kept: Any, unit: float, q: Any, at: int, scales_x: Any, n: int) -> None:
        """q[at + i] = x[start + i] / scale; for each group scale * unit and the sum of q into scales_x from n on."""
        n_in = stop - start
        for i in range(n_in):
            kept[i] = x[start + i]
        kept[n_in:] = 0
        for first in range(0, n_in, group):
            scale, total = round_group(kept, first, q, at + first)
            scales_x[n + first // group * 2] = scale * unit
            scales_x[n + first // group * 2 + 1] = total

    return rounded


@made_once
def matvec_quantized(bits: int, activations: str, group: int) -> Any:
    """Return a kernel: matvec_quantized(W, S, unit, x, y, n_threads), for codes of 8 or 4 bits.

    W       codes as layout.code_tiles has them, of whole groups of inputs, as bytes
    S, unit (ceil(O/8), groups, 2, 8) scales and zeros, as bytes, and what scales are multiplied by; see dots.py
    x, y    (I,) and (O,) float32
    """
    no_group_sums, add_group, store_group_sums = tile_groups(bits, activations, group, TILES)
    rounded = _rounded(activations, group)
    integer = {"int16": np.int16, "int8": np.int8}[activations]

    @part(bits, activations, group)
    def multiply_tiles(W: Any, S: Any, q: Any, scales_x: Any, y: Any, first: int, last: int) -> None:
        """Compute the rows of the tiles first, ..., last - 1, in streams as in matvec.py."""
        n_in, stride = len(q), (last - first + TILES - 1) // TILES
        of_tile, scales_of_tile = n_in * bits, n_in // group * 2 * TILE  # bytes
        sums_of_tiles = np.empty(TILES * TILE, np.float32)
        for tile in range(first, first + stride):
            tiles = (tile * of_tile, stride * of_tile, (last - 1) * of_tile)
            scales = (tile * scales_of_tile, stride * scales_of_tile, (last - 1) * scales_of_tile)
            sums = no_group_sums()
            for i in range(0, n_in, group):
                n = i // group * 2
                sums = add_group(sums, W, tiles, S, scales, q, i, scales_x[n], scales_x[n + 1])
            store_group_sums(sums, sums_of_tiles, 0)
            for number in range(TILES):
                if tile + number * stride < last:
                    o = (tile + number * stride) * TILE
                    for row in range(min(TILE, len(y) - o)):
                        y[o + row] = sums_of_tiles[number * TILE + row]

    @kernel(types.void(BYTES, BYTES, types.float32, VECTOR_IN, VECTOR_OUT, types.intp), bits, activations, group)
    def matvec_quantized(W: Any, S: Any, unit: float, x: Any, y: Any, n_threads: int) -> None:
        n_groups, n_tiles = (len(x) + group - 1) // group, (len(y) + TILE - 1) // TILE
        q, scales_x = np.empty(n_groups * group, integer), np.empty(n_groups * 2, np.float32)
        rounded(x, 0, len(x), np.empty(n_groups * group, np.float32), unit, q, 0, scales_x, 0)
        if n_threads == 1:
            multiply_tiles(W, S, q, scales_x, y, FIRST, n_tiles)
        else:
            for t in numba.prange(n_threads):
                multiply_tiles(W, S, q, scales_x, y, n_tiles * t // n_threads, n_tiles * (t + 1) // n_threads)

    return matvec_quantized


def slab_shapes(group: int, n_tokens: int, n_in: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of a product's workspace: x rounded, in slabs of DEPTH, and its scales and sums."""
    slabs = whole_slabs(n_tokens, n_in, DEPTH)
    return slabs, (*slabs[:2], DEPTH // group * 2)


@made_once
def matmul_quantized(bits: int, activations: str, group: int) -> Any:
    """Return a kernel: matmul_quantized(W, S, unit, x, q, scales_x, y, n_threads), for codes of 8 or 4 bits.

    W, S, unit  as in matvec_quantized
    x, y        (T, I) and (T, O) float32, T at least 1
    q, scales_x of the shapes slab_shapes(group, T, I) and any content: int16 or int8, and float32
    """
    multiply_groups = group_tile(bits, activations, group)
    unpack_codes, unpack_scales = unpack(bits)
    rounded = _rounded(activations, group)
    integers = types.Array({"int16": types.int16, "int8": types.int8}[activations], 3, "C")
    of_group = 2 * WIDTH  # numbers in a panel's scales
    n_kept = DEPTH // group * 2  # numbers for each token and slab

    @part(bits, activations, group)
    def new_panel() -> Any:
        return floats(DEPTH * WIDTH // 4).view(np.uint8), floats(DEPTH // group * of_group)

    @part(bits, activations, group)
    def fill_panel(
        W: Any, S: Any, panel: Any, scales: Any, o: int, n_out: int, first: int, last: int, n_in: int
    ) -> None:
        """Put the codes of WIDTH rows and the inputs first, ..., last - 1 into a panel, and their scales."""
        for r in range(0, WIDTH, TILE):
            tile = min(o + r, n_out - 1) // TILE
            for i in range(first, last, 8):
                unpack_codes(W, (tile * n_in + i) * bits, panel, (i - first) * WIDTH + 4 * r)
            for i in range(first, last, group):
                offset = (tile * n_in + i) // group * 2 * TILE
                unpack_scales(S, offset, scales, (i - first) // group * of_group + r)

    @part(bits, activations, group)
    def multiply_slab(
        W: Any, x: Any, n_in: int, start: int, stop: int, o: int, n_out: int, panel: Any, sums: Any, n_rows: int,
        continues: bool,
    ) -> None:  # fmt: skip
        q, scales_x = x
        codes, scales = panel
        fill_panel(W[0], W[1], codes, scales, o, n_out, start, stop, n_in)
        n_groups, slab = (stop - start) // group, start // DEPTH
        for t in range(0, n_rows, GROUP_ROWS):
            row, to_sums = slab * n_rows + t, (t * WIDTH, WIDTH)
            from_q, from_x = (row * DEPTH, DEPTH), (row * n_kept, n_kept)
            multiply_groups(q, from_q, codes, scales, scales_x, from_x, n_groups, sums, to_sums, continues)

    multiply_blocks = over_blocks(multiply_slab, new_panel, DEPTH, bits, activations, group)

    @part(bits, activations, group)
    def cut(x: Any, unit: float, q: Any, scales_x: Any, slab: int, n_rows: int) -> None:
        """Round the inputs of a slab of all tokens; rows past the last token are 0."""
        start, stop = slab * DEPTH, min((slab + 1) * DEPTH, x.shape[1])
        kept = np.empty((stop - start + group - 1) // group * group, np.float32)
        for t in range(len(x)):
            row = slab * n_rows + t
            rounded(x[t], start, stop, kept, unit, q, row * DEPTH, scales_x, row * n_kept)
        beyond, end = slab * n_rows + len(x), (slab + 1) * n_rows
        q[beyond * DEPTH : end * DEPTH] = 0
        scales_x[beyond * n_kept : end * n_kept] = 0

    @kernel(
        types.void(BYTES, BYTES, types.float32, MATRIX_IN, integers, SLABS, MATRIX_OUT, types.intp),
        bits,
        activations,
        group,
    )
    def matmul_quantized(W: Any, S: Any, unit: float, x: Any, q: Any, scales_x: Any, y: Any, n_threads: int) -> None:
        n_in, n_blocks = (x.shape[1] + group - 1) // group * group, (y.shape[1] + WIDTH - 1) // WIDTH
        (n_slabs, n_rows), q, scales_x = q.shape[:2], q.reshape(-1), scales_x.reshape(-1)
        if n_threads == 1:
            for slab in range(n_slabs):
                cut(x, unit, q, scales_x, slab, n_rows)
            multiply_blocks((W, S), (q, scales_x), n_rows, n_in, y, FIRST, n_blocks)
        else:
            for index in numba.prange(n_slabs):
                cut(x, unit, q, scales_x, numba.intp(index), n_rows)
            for thread in numba.prange(n_threads):
                first, last = n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads
                multiply_blocks((W, S), (q, scales_x), n_rows, n_in, y, first, last)

    return matmul_quantized
