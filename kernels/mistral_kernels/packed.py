"""Products with the packed types of GGUF files, as their blocks lie in the file: for decoding, and for prompts.

Inputs are rounded to int16 or int8, a group at a time, and products are summed as integers, a group at a time, as in
quantized.py. Over a group

    sum of weight * x = scale * scale_x * (sum of (code - zero) * q) - minimum * scale_x * (sum of q)

Decoding reads some rows at the same time, as streams (matvec.py). A row's sums lie side by side in a vector, and are
added up at the row's end. For prompts, codes, scales and offsets of some rows become a panel, as in
quantized.py; an offset is a minimum or scale * zero.
"""

from __future__ import annotations

import operator

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
    written,
)
from mistral_kernels.blocks import PACKINGS, VECTOR
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.dots import EIGHT, INPUTS, code_products, group_tile, words_of_four
from mistral_kernels.matmul import SLABS, Block, over_blocks
from mistral_kernels.pairs import no_dots, total_of
from mistral_kernels.panel_codes import PanelCodes, panel_codes, store_codes
from mistral_kernels.processor import LINE
from mistral_kernels.quantized import DEPTH, OF_GROUP, cutter, rounded_inputs, slab_multiplier
from mistral_kernels.rows import AHEAD
from mistral_kernels.sharing import shared_out
from mistral_kernels.stored import ROWS, Rows, row_addresses
from mistral_kernels.tile import WIDTH, columns_of_eight
from mistral_kernels.value import ARRAY, F32, I16, I32, U8, U32, Address, Value, constant, fma, operation

STREAMS = 4  # rows that are read at the same time


@operation(types.void, ARRAY, types.intp)
def _part(q: Address, i: Value) -> None:
    """Bring the int16 i, ..., i + 31 of q, which lie in the order 0, 2, 1, 3 in each four, into the order even, odd."""
    words = (q + i).load(I32, VECTOR // 2)
    for start in (0, 1):
        (q + (i + start * (VECTOR // 2))).store(words.chosen(range(start, VECTOR // 2, 2)))


def _row_sums(kind: str, inputs: str) -> tuple[Operation, Operation, Operation]:
    """Return the operations on the sums of STREAMS rows of blocks.

    no_sums()                                       a tuple of vectors of 8 zeros
    add_block(sums, W, rows, number, q, scales_x)   each sum plus what the block of this number in its row gives; int16
                                                    of q lie as _part has them
    totals(sums)                                    the tuple of the rows' sums
    """
    packing = PACKINGS[kind]
    sums_type = types.UniTuple(EIGHT, STREAMS)

    def inputs_at(q: Address) -> list[Value]:
        """Return 32 inputs as `code_products` takes them."""
        if INPUTS[inputs] is not I16:
            return [q.load(INPUTS[inputs], VECTOR)]
        return [(q + start).load(I16, VECTOR // 2) for start in (0, VECTOR // 2)]

    def scales_at(scales_x: Address) -> list[tuple[Value, Value]]:
        """Return scale_x and -scale_x * sum of q of a block's groups, as vectors of 8.

        Where the block is one group, the second is an eighth of it in each lane.
        """
        if packing.groups == 1:
            scale, total = ((scales_x + n).load(F32) for n in (0, 1))
            return [(scale.spread(8), (scale * total * -0.125).spread(8))]
        found = []
        for start in range(0, packing.groups, 8):
            both = (scales_x + 2 * start).load(F32, 16)
            scale, total = (both.chosen(range(first, 16, 2)) for first in (0, 1))
            found.append((scale, -(scale * total)))
        return found

    def of_eight(factors: Value) -> list[Value]:
        """Return the scales or minimums of a block's groups as vectors of 8."""
        if packing.groups == 1:
            return [factors.spread(8)]
        return [factors.chosen(range(start, start + 8)) for start in range(0, packing.groups, 8)]

    def of_vector(scales: list[Value], number: int) -> Value:
        """Return the scales of the lanes that sum the products of a vector of codes."""
        if packing.groups == 1:
            return scales[0]
        groups = [(VECTOR * number + 4 * lane) // packing.group for lane in range(8)]
        return scales[groups[0] // 8].chosen([group % 8 for group in groups])

    @operation(sums_type)
    def no_sums() -> list[Value]:
        return [constant(F32, 0.0, 8)] * STREAMS

    @operation(sums_type, sums_type, ARRAY, ROWS, types.intp, ARRAY, ARRAY)
    def add_block(
        sums: tuple[Value, ...], W: Address, rows: Rows, number: Value, q: Address, scales_x: Address
    ) -> list[Value]:
        q_block = q + number * packing.weights
        x_scales = scales_at(scales_x + number * (2 * packing.groups))
        addresses = row_addresses(W, rows, number * packing.bytes, U8, range(STREAMS))
        new, scales = list(sums), []
        for row, address in enumerate(addresses):
            for line in range(0, packing.bytes, LINE):
                address.prefetch(AHEAD + line)
            scale, minimum = packing.factors(address)
            scales.append([one * x_scale for one, (x_scale, _) in zip(of_eight(scale), x_scales, strict=True)])
            if minimum is not None:
                for one, (_, x_total) in zip(of_eight(minimum), x_scales, strict=True):
                    new[row] = fma(one, x_total, new[row])
        for vector in range(packing.weights // VECTOR):
            x, nothing = inputs_at(q_block + VECTOR * vector), no_dots(8, words_of_four(inputs))
            zeros = constant(U8, packing.zero, VECTOR)
            start = -code_products(nothing, zeros, x, packing.bits) if packing.zero else nothing
            for row, address in enumerate(addresses):
                dots = code_products(start, packing.codes(address, vector), x, packing.bits)
                new[row] = fma(of_vector(scales[row], vector), total_of(dots, 8).to(F32), new[row])
        return new

    @operation(types.UniTuple(types.float32, STREAMS), sums_type)
    def totals(sums: tuple[Value, ...]) -> list[Value]:
        return [value.combined(operator.add) for value in sums]

    return no_sums, add_block, totals


@made_once
def matvec_blocks(kind: str, inputs: str) -> Kernel:
    """Return a kernel: matvec_blocks(W, x, y, threads) computes y = x Wᵀ, with the blocks as they lie in the file.

    kind    a type of blocks.PACKINGS
    inputs  what x is rounded to, group by group: "int16" or "int8"
    W       the blocks of O rows, as bytes
    x, y    (T, I) and (T, O) float32, T at least 1; I is a whole number of blocks
    """
    weights, group, block_bytes = PACKINGS[kind].weights, PACKINGS[kind].group, PACKINGS[kind].bytes
    no_sums, add_block, totals = _row_sums(kind, inputs)
    rounded = rounded_inputs(inputs, group)
    integer = np.dtype(inputs).type

    @part(kind, inputs, borrows=True)
    def multiply_rows(first: int, last: int, W: Bytes, q: Integers, scales_x: Floats, y: Floats) -> None:
        """Compute the rows first, ..., last - 1."""
        n_blocks, stride = len(q) // weights, (last - first + STREAMS - 1) // STREAMS
        row_bytes = n_blocks * block_bytes
        for o in range(first, first + stride):
            rows = Rows(o * row_bytes, stride * row_bytes, (last - 1) * row_bytes)
            sums = no_sums()
            for number in range(n_blocks):
                sums = add_block(sums, W, rows, number, q, scales_x)
            y_rows = totals(sums)
            for number in range(STREAMS):
                if o + number * stride < last:
                    y[o + number * stride] = y_rows[number]

    @kernel(types.void(BYTES, MATRIX_IN, MATRIX_OUT, types.intp), kind, inputs)
    def matvec_blocks(W: Bytes, x: Floats, y: Floats, threads: int) -> None:
        n_in, n_out = x.shape[1], y.shape[1]
        q, scales_x, kept = np.empty(n_in, integer), np.empty(n_in // group * 2, np.float32), np.empty(n_in, np.float32)
        for t in range(len(x)):
            rounded(x[t], kept, np.float32(1), q, 0, scales_x, 0)
            if integer is np.int16:
                for i in range(0, n_in, VECTOR):
                    _part(q, i)
            shared_out(multiply_rows, n_out, threads, (W, q, scales_x, y[t]))

    return matvec_blocks


def _unpack(kind: str, way: PanelCodes) -> Operation:
    """Return the operation unpack_block(W, rows, number, codes, place, scales, place_of_scales).

    The blocks of a number in 8 rows become, in panels as dots.group_tile takes them, their codes, from a byte of the
    one panel on, and their scales and offsets, from a float of the other on.
    """
    packing = PACKINGS[kind]

    def store_factors(rows: list[Value], scales: Address) -> None:
        """Store the factors of 8 rows: those of a group side by side."""
        if packing.groups == 1:
            for row, factor in enumerate(rows):
                (scales + row).store(factor)
            return
        for start in range(0, packing.groups, 8):
            columns = columns_of_eight([row.chosen(range(start, start + 8)) for row in rows])
            for number, column in enumerate(columns):
                (scales + OF_GROUP * (start + number)).store(column)

    @operation(types.void, ARRAY, ROWS, types.intp, ARRAY, types.intp, ARRAY, types.intp)
    def unpack_block(
        W: Address, rows: Rows, number: Value, codes: Address, place: Value, scales: Address, place_of_scales: Value
    ) -> None:
        addresses = row_addresses(W, rows, number * packing.bytes, U8, range(8))
        for address in addresses:  # what the next slab needs is asked for
            for line in range(0, packing.bytes, LINE):
                address.prefetch(DEPTH // packing.weights * packing.bytes + line)
        of_rows = [packing.factors(address) for address in addresses]
        zero = float(packing.zero - way.zero)
        offsets = [scale * zero if minimum is None else minimum for scale, minimum in of_rows]
        store_factors([scale for scale, _ in of_rows], scales + place_of_scales)
        store_factors(offsets, scales + (place_of_scales + WIDTH))
        for vector in range(packing.weights // VECTOR):
            fours = columns_of_eight([packing.codes(address, vector).bits_as(U32) for address in addresses])
            panel = codes + (place + WIDTH * VECTOR * way.n_parts * vector)
            store_codes([four.bits_as(U8) for four in fours], panel, way)

    return unpack_block


@made_once
def matmul_blocks(kind: str, inputs: str) -> Kernel:
    """Return a kernel: matmul_blocks(W, x, q, scales_x, y, threads) does what matvec_blocks does, for many tokens.

    x, y            (T, I) and (T, O) float32, T at least 1
    q, scales_x     of the shapes quantized.slab_shapes(group, T, I) and any content: int16 or int8, and float32
    """
    packing, integers = PACKINGS[kind], written(getattr(types, inputs), 3)
    weights, group, block_bytes = packing.weights, packing.group, packing.bytes
    way = panel_codes(packing.bits, inputs)
    unpack_block, n_parts = _unpack(kind, way), way.n_parts

    @part(kind, inputs, borrows=True)
    def fill_panel(W: Bytes, block: Block, codes: Bytes, scales: Floats) -> None:
        """Put the codes of a block of W into a panel, and their scales and offsets into another."""
        first, last, o, n_in, n_out = block
        row_bytes = n_in // weights * block_bytes
        for r in range(0, WIDTH, 8):
            rows = Rows(min(o + r, n_out - 1) * row_bytes, row_bytes, (n_out - 1) * row_bytes)
            for i in range(first, last, weights):
                place, place_of_scales = (i - first) * WIDTH * n_parts + 4 * r, (i - first) // group * OF_GROUP + r
                unpack_block(W, rows, i // weights, codes, place, scales, place_of_scales)

    multiply_groups = group_tile(packing.bits, inputs, group, has_offsets=True)
    new_panel, multiply_slab = slab_multiplier(multiply_groups, fill_panel, n_parts, group, kind, inputs)
    multiply_blocks = over_blocks(multiply_slab, new_panel, DEPTH, kind, inputs)
    cut = cutter(inputs, group)

    @kernel(types.void(BYTES, MATRIX_IN, integers, SLABS, MATRIX_OUT, types.intp), kind, inputs)
    def matmul_blocks(W: Bytes, x: Floats, q: Integers, scales_x: Floats, y: Floats, threads: int) -> None:
        n_in, n_blocks = x.shape[1], (y.shape[1] + WIDTH - 1) // WIDTH
        (n_slabs, n_rows), q, scales_x = q.shape[:2], q.reshape(-1), scales_x.reshape(-1)
        shared_out(cut, n_slabs, threads, (x, np.float32(1), q, scales_x, n_rows))
        shared_out(multiply_blocks, n_blocks, threads, (W, (q, scales_x), n_rows, n_in, y))

    return matmul_blocks
