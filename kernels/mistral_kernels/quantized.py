"""Products with matrices of 8 or 4 bits in tile order: for decoding, and for prompts.

The loops are those of matvec.py and matmul.py; only the numbers differ. Inputs are rounded to int16 or int8, a group at
a time. Products are summed as integers, a group at a time (dots.py). Memory delivers half or a quarter of the bytes of
16 bits. Integer sums are exact, and the sums of groups are added in their order, one rounding each. So decoding and
prompts have the same bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from mistral_kernels.arrays import (
    BYTES,
    MATRIX_IN,
    MATRIX_OUT,
    VECTOR_IN,
    VECTOR_OUT,
    Bytes,
    Floats,
    Integers,
    Kernel,
    Operation,
    Part,
    written,
)
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.dots import GROUP_ROWS, group_tile, rounding, tile_groups, unpack
from mistral_kernels.layout import TILE
from mistral_kernels.matmul import SLABS, Block, over_blocks, whole_slabs
from mistral_kernels.panel_codes import panel_codes
from mistral_kernels.sharing import shared_out
from mistral_kernels.simd import floats
from mistral_kernels.stored import Place, Rows
from mistral_kernels.tile import WIDTH

GROUPS = (32, 64, 128)  # inputs that share a scale
DEPTH = 256  # of a panel of codes: 12 KiB at most
TILES = 4  # tiles that are read at the same time, each as a stream of its own
OF_GROUP = 2 * WIDTH  # floats in a panel's scales for a group: scales, then zeros


def rounded_inputs(inputs: str, group: int) -> Part:
    """Return the part of a kernel that rounds some inputs of one token, a whole number of groups with zeros behind."""
    round_group = rounding(inputs, group)

    @part(inputs, group, borrows=True)
    def rounded(x: Floats, kept: Floats, unit: float, q: Integers, at: int, scales_x: Floats, n: int) -> None:
        """q[at + i] = x[i] / scale; for each group scale * unit and the sum of q into scales_x from n on.

        `kept` is room for x in whole groups.
        """
        for i in range(len(x)):
            kept[i] = x[i]
        kept[len(x) :] = 0
        for first in range(0, len(x), group):
            scale, total = round_group(kept, first, q, at + first)
            scales_x[n + first // group * 2] = scale * unit
            scales_x[n + first // group * 2 + 1] = total

    return rounded


def plain_product(codes: Integers, scales: Floats, zeros: Floats, largest: int, x: Floats, y: Floats) -> None:
    """y[o] = sum over i of W[o, i] x[i], where W = scale * (code - zero), and x is rounded to scale_x * q.

    codes           (O, groups, group) whole numbers
    scales, zeros   (O, groups)
    x, y            (groups, group) and (O,)
    largest         of q: 32767 for int16, 127 for int8
    """
    y[:] = 0
    for g in range(len(x)):
        most = max(abs(x_i) for x_i in x[g])
        q = [round(float(x_i * (largest / most))) if most else 0 for x_i in x[g]]
        scale_x = most / largest
        for o in range(len(y)):
            dot = sum(int(code) * q_i for code, q_i in zip(codes[o, g], q, strict=True))
            y[o] += scales[o, g] * scale_x * (dot - zeros[o, g] * sum(q))


@made_once
def matvec_quantized(bits: int, inputs: str, group: int) -> Kernel:
    """Return a kernel: matvec_quantized(W, S, unit, x, y, threads), for codes of 8 or 4 bits.

    W       codes as layout.code_tiles has them, of whole groups of inputs, as bytes
    S, unit (ceil(O/8), groups, 2, 8) scales and zeros, as bytes, and what scales are multiplied by; see dots.py
    x, y    (I,) and (O,) float32

    It does what plain_product does.
    """
    no_group_sums, add_group, store_group_sums = tile_groups(bits, inputs, group, TILES)
    rounded = rounded_inputs(inputs, group)
    integer = np.dtype(inputs).type

    @part(bits, inputs, group)
    def multiply_tiles(first: int, last: int, W: Bytes, S: Bytes, q: Integers, scales_x: Floats, y: Floats) -> None:
        """Compute the rows of the tiles first, ..., last - 1, in TILES streams as in matvec.py."""
        n_in, stride = len(q), (last - first + TILES - 1) // TILES
        of_tile, scales_of_tile = n_in * bits, n_in // group * 2 * TILE  # bytes
        sums_of_tiles = np.empty(TILES * TILE, np.float32)
        for tile in range(first, first + stride):
            tiles = Rows(tile * of_tile, stride * of_tile, (last - 1) * of_tile)
            scales = Rows(tile * scales_of_tile, stride * scales_of_tile, (last - 1) * scales_of_tile)
            sums = no_group_sums()
            for i in range(0, n_in, group):
                sums = add_group(sums, W, tiles, S, scales, q, scales_x, i)
            store_group_sums(sums, sums_of_tiles, 0)
            for number in range(TILES):
                if tile + number * stride < last:
                    o = (tile + number * stride) * TILE
                    for row in range(min(TILE, len(y) - o)):
                        y[o + row] = sums_of_tiles[number * TILE + row]

    @kernel(types.void(BYTES, BYTES, types.float32, VECTOR_IN, VECTOR_OUT, types.intp), bits, inputs, group)
    def matvec_quantized(W: Bytes, S: Bytes, unit: float, x: Floats, y: Floats, threads: int) -> None:
        n_groups, n_tiles = (len(x) + group - 1) // group, (len(y) + TILE - 1) // TILE
        q, scales_x = np.empty(n_groups * group, integer), np.empty(n_groups * 2, np.float32)
        rounded(x, np.empty(n_groups * group, np.float32), unit, q, 0, scales_x, 0)
        shared_out(multiply_tiles, n_tiles, threads, (W, S, q, scales_x, y))

    return matvec_quantized


def slab_shapes(group: int, n_tokens: int, n_in: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of a product's workspace: x rounded, in slabs of DEPTH, and its scales and sums."""
    slabs = whole_slabs(n_tokens, n_in, DEPTH, GROUP_ROWS)
    return slabs, (*slabs[:2], DEPTH // group * 2)


def cutter(inputs: str, group: int) -> Part:
    """Return the function that rounds the inputs of many tokens and cuts them into slabs."""
    rounded = rounded_inputs(inputs, group)
    n_kept = DEPTH // group * 2  # numbers for each token and slab

    @part(inputs, group)
    def cut(first: int, last: int, x: Floats, unit: float, q: Integers, scales_x: Floats, n_rows: int) -> None:
        """Round the inputs of some slabs of all tokens; rows past the last token are 0."""
        for slab in range(first, last):
            start, stop = slab * DEPTH, min((slab + 1) * DEPTH, x.shape[1])
            kept = np.empty((stop - start + group - 1) // group * group, np.float32)
            for t in range(len(x)):
                row = slab * n_rows + t
                rounded(x[t, start:stop], kept, unit, q, row * DEPTH, scales_x, row * n_kept)
            beyond, end = slab * n_rows + len(x), (slab + 1) * n_rows
            q[beyond * DEPTH : end * DEPTH] = 0
            scales_x[beyond * n_kept : end * n_kept] = 0

    return cut


def slab_multiplier(
    multiply_groups: Operation, fill_panel: Part, n_parts: int, group: int, *variant: object
) -> tuple[Part, Part]:
    """Return the functions new_panel and multiply_slab of matmul.over_blocks, for codes.

    multiply_groups     as dots.group_tile has it
    fill_panel(W, block, codes, scales) puts the codes of a block of W into a panel, and their scales into another
    n_parts             vectors in the panel for each vector of codes
    """

    @part(*variant)
    def new_panel() -> tuple[Bytes, Floats]:
        return floats(DEPTH * WIDTH * n_parts // 4).view(np.uint8), floats(DEPTH // group * OF_GROUP)

    @part(*variant, borrows=True)
    def multiply_slab(
        W: Any, x: tuple[Integers, Floats], block: Block, panel: tuple[Bytes, Floats], sums: Floats, n_rows: int,
        continues: bool,
    ) -> None:  # fmt: skip
        q, scales_x = x
        codes, scales = panel
        fill_panel(W, block, codes, scales)
        n_groups, slab = (block.stop - block.start) // group, block.start // DEPTH
        for t in range(0, n_rows, GROUP_ROWS):
            from_q, to_sums = Place((slab * n_rows + t) * DEPTH, DEPTH), Place(t * WIDTH, WIDTH)
            multiply_groups(q, from_q, scales_x, codes, scales, n_groups, sums, to_sums, continues)

    return new_panel, multiply_slab


def _panel_filler(bits: int, inputs: str, group: int, n_parts: int) -> Part:
    """Return the function fill_panel of slab_multiplier, for codes in tile order."""
    unpack_codes, unpack_scales = unpack(bits, inputs, DEPTH)

    @part(bits, inputs, group, borrows=True)
    def fill_panel(W: tuple[Bytes, Bytes], block: Block, panel: Bytes, scales: Floats) -> None:
        """Put the codes of a block into a panel, and their scales."""
        first, last, o, n_in, n_out = block
        codes, factors = W
        for r in range(0, WIDTH, TILE):
            tile = min(o + r, n_out - 1) // TILE
            for i in range(first, last, 8):
                unpack_codes(codes, (tile * n_in + i) * bits, panel, (i - first) * WIDTH * n_parts + 4 * r)
            for i in range(first, last, group):
                offset = (tile * n_in + i) // group * 2 * TILE
                unpack_scales(factors, offset, scales, (i - first) // group * OF_GROUP + r)

    return fill_panel


@made_once
def matmul_quantized(bits: int, inputs: str, group: int) -> Kernel:
    """Return a kernel: matmul_quantized(W, S, unit, x, q, scales_x, y, threads), for codes of 8 or 4 bits.

    W, S, unit  as in matvec_quantized
    x, y        (T, I) and (T, O) float32, T at least 1
    q, scales_x of the shapes slab_shapes(group, T, I) and any content: int16 or int8, and float32
    """
    integers = written(getattr(types, inputs), 3)
    cut, variant, n_parts = cutter(inputs, group), (bits, inputs, group), panel_codes(bits, inputs).n_parts
    fill_panel = _panel_filler(*variant, n_parts)
    new_panel, multiply_slab = slab_multiplier(group_tile(*variant), fill_panel, n_parts, group, *variant)
    multiply_blocks = over_blocks(multiply_slab, new_panel, DEPTH, *variant)

    @kernel(
        types.void(BYTES, BYTES, types.float32, MATRIX_IN, integers, SLABS, MATRIX_OUT, types.intp),
        bits,
        inputs,
        group,
    )
    def matmul_quantized(
        W: Bytes, S: Bytes, unit: float, x: Floats, q: Integers, scales_x: Floats, y: Floats, threads: int
    ) -> None:
        n_in, n_blocks = (x.shape[1] + group - 1) // group * group, (y.shape[1] + WIDTH - 1) // WIDTH
        (n_slabs, n_rows), q, scales_x = q.shape[:2], q.reshape(-1), scales_x.reshape(-1)
        shared_out(cut, n_slabs, threads, (x, unit, q, scales_x, n_rows))
        shared_out(multiply_blocks, n_blocks, threads, ((W, S), (q, scales_x), n_rows, n_in, y))

    return matmul_quantized
