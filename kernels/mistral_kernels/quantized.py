"""Products with matrices of 8 or 4 bits in tile order: for decoding, and for prompts.

As in matvec.py and matmul.py; only the numbers differ. Inputs are rounded to int16 or int8 a group at a time, products
are summed up as integers, a group at a time (dots.py), and what is read is half or a quarter of 16 bits. A product of
integers is exact and each group's sum is rounded once, so both ways to multiply agree up to the order of the groups.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.dots import GROUP_ROWS, group_tile, rounding, tile_groups, unpack
from mistral_kernels.layout import TILE
from mistral_kernels.matmul import DEPTH, over_blocks
from mistral_kernels.matvec import BYTES, MATRIX_IN, MATRIX_OUT, TILES, VECTOR_IN, VECTOR_OUT
from mistral_kernels.tile import WIDTH

GROUPS = (32, 64, 128)  # inputs that share a scale


def _rounded(activations: str, group: int) -> Any:
    """Return the part of a kernel that rounds some inputs of one token, a whole number of groups with zeros behind."""
    round_group = rounding(activations, group)

    @part(activations, group)
    def rounded(x: Any, start: int, stop: int, kept: Any, unit: float, q: Any, at: int, scales_x: Any, n: int) -> None:
        """q[at + i] = x[start + i] / scale; for each group scale * unit and the sum of q into scales_x from n on."""
        n_in = stop - start
        kept[:n_in] = x[start:stop]
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
        n_in, apart = len(q), (last - first + TILES - 1) // TILES
        of_tile, scales_of_tile = n_in * bits, n_in // group * 2 * TILE  # bytes
        sums_of_tiles = np.empty(TILES * TILE, np.float32)
        for tile in range(first, first + apart):
            tiles = (tile * of_tile, apart * of_tile, (last - 1) * of_tile)
            scales = (tile * scales_of_tile, apart * scales_of_tile, (last - 1) * scales_of_tile)
            sums = no_group_sums()
            for i in range(0, n_in, group):
                n = i // group * 2
                sums = add_group(sums, W, tiles, S, scales, q, i, scales_x[n], scales_x[n + 1])
            store_group_sums(sums, sums_of_tiles, 0)
            for number in range(TILES):
                if tile + number * apart < last:
                    o = (tile + number * apart) * TILE
                    n = min(TILE, len(y) - o)
                    y[o : o + n] = sums_of_tiles[number * TILE : number * TILE + n]

    @kernel(types.void(BYTES, BYTES, types.float32, VECTOR_IN, VECTOR_OUT, types.intp), bits, activations, group)
    def matvec_quantized(W: Any, S: Any, unit: float, x: Any, y: Any, n_threads: int) -> None:
        n_groups, n_tiles = (len(x) + group - 1) // group, (len(y) + TILE - 1) // TILE
        q, scales_x = np.empty(n_groups * group, integer), np.empty(n_groups * 2, np.float32)
        rounded(x, 0, len(x), np.empty(n_groups * group, np.float32), unit, q, 0, scales_x, 0)
        if n_threads == 1:
            multiply_tiles(W, S, q, scales_x, y, 0, n_tiles)
        else:
            for t in numba.prange(n_threads):
                multiply_tiles(W, S, q, scales_x, y, n_tiles * t // n_threads, n_tiles * (t + 1) // n_threads)

    return matvec_quantized


def slab_shapes(group: int, n_tokens: int, n_in: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of a product's workspace: x rounded, in slabs of DEPTH, and its scales and sums."""
    n_slabs = -(-n_in // DEPTH)
    return (n_slabs, n_tokens, DEPTH), (n_slabs, n_tokens, DEPTH // group * 2)


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
    floats = types.Array(types.float32, 3, "C")
    of_group = 2 * WIDTH  # numbers in a panel's scales
    n_kept = DEPTH // group * 2  # numbers for each token and slab

    @part(bits, activations, group)
    def new_panel() -> Any:
        return np.empty(DEPTH * WIDTH, np.uint8), np.empty(DEPTH // group * of_group, np.float32)

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
    def multiply_block(
        W: Any, x: Any, n_in: int, start: int, stop: int, y: Any, o: int, n_out: int, column: int, panel: Any
    ) -> None:
        n_tokens = len(y)
        q, scales_x = x
        codes, scales = panel
        for first in range(start, stop, DEPTH):
            last = min(first + DEPTH, stop)
            fill_panel(W[0], W[1], codes, scales, o, n_out, first, last, n_in)
            n_groups = (last - first) // group
            for t in range(0, n_tokens, GROUP_ROWS):
                from_q, from_x = (
                    (first * n_tokens + t * DEPTH, DEPTH),
                    ((first // DEPTH * n_tokens + t) * n_kept, n_kept),
                )
                to_y, rows = (t * y.shape[1] + column, y.shape[1]), min(GROUP_ROWS, n_tokens - t)
                multiply_groups(q, from_q, codes, scales, scales_x, from_x, n_groups, y, to_y, rows, first > 0)

    multiply_blocks = over_blocks(multiply_block, new_panel, bits, activations, group)

    @part(bits, activations, group)
    def cut(x: Any, unit: float, q: Any, scales_x: Any, slab: int) -> None:
        """Round the inputs of a slab of all tokens."""
        start, stop = slab * DEPTH, min((slab + 1) * DEPTH, x.shape[1])
        kept = np.empty((stop - start + group - 1) // group * group, np.float32)
        for t in range(len(x)):
            row = slab * len(x) + t
            rounded(x[t], start, stop, kept, unit, q, row * DEPTH, scales_x, row * n_kept)

    @kernel(
        types.void(BYTES, BYTES, types.float32, MATRIX_IN, integers, floats, MATRIX_OUT, types.intp),
        bits,
        activations,
        group,
    )
    def matmul_quantized(W: Any, S: Any, unit: float, x: Any, q: Any, scales_x: Any, y: Any, n_threads: int) -> None:
        n_in, n_blocks = (x.shape[1] + group - 1) // group * group, (y.shape[1] + WIDTH - 1) // WIDTH
        n_slabs, q, scales_x = len(q), q.reshape(-1), scales_x.reshape(-1)
        if n_threads == 1:
            for slab in range(n_slabs):
                cut(x, unit, q, scales_x, slab)
            multiply_blocks((W, S), (q, scales_x), n_in, y, 0, n_blocks)
        else:
            for index in numba.prange(n_slabs):
                cut(x, unit, q, scales_x, numba.intp(index))
            for thread in numba.prange(n_threads):
                first, last = n_blocks * thread // n_threads, n_blocks * (thread + 1) // n_threads
                multiply_blocks((W, S), (q, scales_x), n_in, y, first, last)

    return matmul_quantized
