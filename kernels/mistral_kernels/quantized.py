"""Products with codes in tile order (tiles.py): for decoding, for a few tokens, and for prompts.

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
    Bytes,
    Floats,
    Integers,
    Kernel,
    Operation,
    Part,
    written,
)
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.dots import GROUP_ROWS, group_tile, rounding
from mistral_kernels.layout import TILE
from mistral_kernels.matmul import SLABS, Block, over_blocks, whole_slabs
from mistral_kernels.panel_codes import panel_codes
from mistral_kernels.processor import LANES
from mistral_kernels.sharing import shared_out
from mistral_kernels.simd import floats
from mistral_kernels.stored import Place, Rows
from mistral_kernels.tile import WIDTH
from mistral_kernels.tiles import AT_ONCE, Form, form_of, tile_groups, unpack

GROUPS = (32, 64, 128)  # inputs that share a scale
DEPTH = 256  # of a panel of codes: 12 KiB at most
# How many tokens are multiplied together, and with how many tiles, each a stream of its own.
TOGETHER = {1: 4, 2: 2, 4: 2} if LANES == 16 else {1: 4, 2: 1, 4: 1}
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


def _over_tiles(form: Form, inputs: str, n_together: int, *variant: object) -> Part:
    """Return the function that multiplies some tiles with all tokens, n_together at a time.

    Each row and token have a sum of their own.
    """
    n_tiles = TOGETHER[n_together]
    no_group_sums, add_groups, store_group_sums = tile_groups(form, inputs, n_tiles, n_together)
    bits, block, factor_bytes, at_once = form.bits, form.block, form.factor_bytes, max(form.group, AT_ONCE)

    @part(*variant)
    def multiply_tiles(
        first: int, last: int, W: Bytes, S: Bytes, q: Integers, scales_x: Floats, y: Floats, n_tokens: int
    ) -> None:
        """Compute the rows of the tiles first, ..., last - 1, in streams as in matvec.py; q, scales_x, y are flat."""
        n_in, n_x, n_out = len(q) // n_tokens, len(scales_x) // n_tokens, len(y) // n_tokens
        stride, of_tile, factors_of_tile = (
            (last - first + n_tiles - 1) // n_tiles,
            n_in * bits,
            n_in // block * factor_bytes,
        )
        found = np.empty(n_tiles * n_together * TILE, np.float32)
        for tile in range(first, first + stride):
            tiles = Rows(tile * of_tile, stride * of_tile, (last - 1) * of_tile)
            factors = Rows(tile * factors_of_tile, stride * factors_of_tile, (last - 1) * factors_of_tile)
            for t in range(0, n_tokens, n_together):
                tokens, x_rows = Rows(t * n_in, n_in, (n_tokens - 1) * n_in), Rows(t * n_x, n_x, (n_tokens - 1) * n_x)
                sums = no_group_sums()
                for i in range(0, n_in, at_once):
                    sums = add_groups(sums, W, tiles, S, factors, q, tokens, scales_x, x_rows, i)
                store_group_sums(sums, found)
                for number in range(n_tiles * n_together):
                    o, token = (tile + number // n_together * stride) * TILE, t + number % n_together
                    if o < last * TILE and token < n_tokens:
                        for row in range(min(TILE, n_out - o)):
                            y[token * n_out + o + row] = found[number * TILE + row]

    return multiply_tiles


@made_once
def matvec_quantized(kind: str, inputs: str, group: int, n_together: int) -> Kernel:
    """Return a kernel: matvec_quantized(W, S, unit, x, y, threads), for codes in tile order.

    kind, group     as tiles.form_of has them
    n_together      of TOGETHER: how many tokens are multiplied together
    W, S            codes and factors of whole groups of inputs, as bytes, tile after tile
    unit            what scales are multiplied by
    x, y            (T, I) and (T, O) float32

    It does what plain_product does, for each token.
    """
    variant = kind, inputs, group, n_together
    multiply_tiles, rounded = (
        _over_tiles(form_of(kind, group), inputs, n_together, *variant),
        rounded_inputs(inputs, group),
    )
    integer = np.dtype(inputs).type

    @kernel(types.void(BYTES, BYTES, types.float32, MATRIX_IN, MATRIX_OUT, types.intp), *variant)
    def matvec_quantized(W: Bytes, S: Bytes, unit: float, x: Floats, y: Floats, threads: int) -> None:
        n_groups, n_tiles = (x.shape[1] + group - 1) // group, (y.shape[1] + TILE - 1) // TILE
        q, scales_x = np.empty(len(x) * n_groups * group, integer), np.empty(len(x) * n_groups * 2, np.float32)
        kept = np.empty(n_groups * group, np.float32)
        for t in range(len(x)):
            rounded(x[t], kept, unit, q, t * n_groups * group, scales_x, t * n_groups * 2)
        shared_out(multiply_tiles, n_tiles, threads, (W, S, q, scales_x, y.reshape(-1), len(x)))

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


def _panel_filler(form: Form, inputs: str, n_parts: int, *variant: object) -> Part:
    """Return the function fill_panel of slab_multiplier, for codes in tile order."""
    unpack_codes, unpack_factors = unpack(form, inputs, DEPTH)
    bits, group, in_block, factor_bytes = form.bits, form.group, form.block, form.factor_bytes

    @part(*variant, borrows=True)
    def fill_panel(W: tuple[Bytes, Bytes], block: Block, panel: Bytes, scales: Floats) -> None:
        """Put the codes of a block into a panel, and their factors."""
        first, last, o, n_in, n_out = block
        codes, factors = W
        for r in range(0, WIDTH, TILE):
            tile = min(o + r, n_out - 1) // TILE
            for i in range(first, last, AT_ONCE):
                unpack_codes(codes, (tile * n_in + i) * bits, panel, (i - first) * WIDTH * n_parts + 4 * r)
            for i in range(first, last, group):
                offset = (tile * n_in + i) // in_block * factor_bytes
                place = (i - first) // group * OF_GROUP + r
                unpack_factors(factors, offset, i % in_block // group, scales, place)

    return fill_panel


@made_once
def matmul_quantized(kind: str, inputs: str, group: int) -> Kernel:
    """Return a kernel: matmul_quantized(W, S, unit, x, q, scales_x, y, threads) does what matvec_quantized does.

    q, scales_x     of the shapes slab_shapes(group, T, I) and any content: int16 or int8, and float32
    """
    form, integers, variant = form_of(kind, group), written(getattr(types, inputs), 3), (kind, inputs, group)
    cut, n_parts = cutter(inputs, group), panel_codes(form.code_bits, inputs).n_parts
    fill_panel = _panel_filler(form, inputs, n_parts, *variant)
    multiply_groups = group_tile(form.code_bits, inputs, group, has_offsets=form.has_minimums)
    new_panel, multiply_slab = slab_multiplier(multiply_groups, fill_panel, n_parts, group, *variant)
    multiply_blocks = over_blocks(multiply_slab, new_panel, DEPTH, *variant)

    @kernel(types.void(BYTES, BYTES, types.float32, MATRIX_IN, integers, SLABS, MATRIX_OUT, types.intp), *variant)
    def matmul_quantized(
        W: Bytes, S: Bytes, unit: float, x: Floats, q: Integers, scales_x: Floats, y: Floats, threads: int
    ) -> None:
        n_in, n_blocks = (x.shape[1] + group - 1) // group * group, (y.shape[1] + WIDTH - 1) // WIDTH
        (n_slabs, n_rows), q, scales_x = q.shape[:2], q.reshape(-1), scales_x.reshape(-1)
        shared_out(cut, n_slabs, threads, (x, unit, q, scales_x, n_rows))
        shared_out(multiply_blocks, n_blocks, threads, ((W, S), (q, scales_x), n_rows, n_in, y))

    return matmul_quantized
