"""The inner loops of a matrix times a vector, or a few: several rows at once, as they are stored or in tile order.

Rows as stored: a vector holds neighbours of one row, and its lanes are summed at the end. Tile order (layout.py): a
vector holds one number of each of eight rows, and its lanes are separate sums. A vector of 16 lanes takes two inputs of
a tile at once. TILE_LANES is at least 8 on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from mistral_kernels.instructions import (
    F32,
    I8,
    I32,
    I64,
    KINDS,
    LANES,
    STORED,
    VECTOR,
    combined,
    constant,
    load_first,
    load_vector,
    prefetch_line,
    row_addresses,
    store_vector,
    widened,
)
from mistral_kernels.pairs import products, widened_tile
from mistral_kernels.simd import ARRAY, FloatVectorType, operation, vector

ROWS_TYPE = types.UniTuple(types.intp, 3)  # of instructions.row_addresses
AHEAD = 2048  # bytes; what a stream asks for before it gets there
TILE_LANES = max(LANES, 8)
TILE_INPUTS = TILE_LANES // 8
TILE_VECTOR = ir.VectorType(F32, TILE_LANES)


def row_sums(kind: str, n_rows: int, n_tokens: int) -> tuple[Any, Any, Any, Any]:
    """Return the operations on the sums of n rows of a matrix of a kind, given as bytes, with the inputs of n tokens.

    no_sums()                                   a tuple of zero vectors, one for each row and token, row after row
    add_products(sums, W, rows, x, tokens, i)   each sum plus W[row, i : i + LANES] * x[token, i : i + LANES]
    add_products_part(..., count)               of the first `count` columns alone
    totals(sums)                                a tuple of float32

    x           float32, or pairs in their place
    rows, tokens    as in `row_addresses`
    """
    element, size = STORED[kind], KINDS[kind]
    sums_type = types.UniTuple(vector, n_rows * n_tokens)
    parameters = (sums_type, ARRAY, ROWS_TYPE, ARRAY, ROWS_TYPE, types.intp)

    def accumulate(
        builder: Any, sums: Any, W: Any, rows: Any, x: Any, tokens: Any, i: Any, read: Callable[[Any, Any], Any]
    ) -> Any:
        x = builder.bitcast(x, I8.as_pointer())
        inputs = [read(address, F32) for address in row_addresses(builder, x, tokens, i, 4, range(n_tokens))]
        new = []
        for row, address in enumerate(row_addresses(builder, W, rows, i, size, range(n_rows))):
            weights = widened(builder, read(address, element), kind)
            for token, value in enumerate(inputs):
                before = builder.extract_value(sums, row * n_tokens + token)
                new.append(products(builder, weights, value, before, kind))
        return new

    @operation(sums_type)
    def no_sums(builder: Any) -> Any:
        return [constant(VECTOR, 0.0)] * (n_rows * n_tokens)

    @operation(sums_type, *parameters)
    def add_products(builder: Any, sums: Any, W: Any, rows: Any, x: Any, tokens: Any, i: Any) -> Any:
        def read(address: Any, element: Any) -> Any:
            return load_vector(builder, address, element, LANES)

        for address in row_addresses(builder, W, rows, i, size, range(n_rows)):
            prefetch_line(builder, address, AHEAD)
        return accumulate(builder, sums, W, rows, x, tokens, i, read)

    @operation(sums_type, *parameters, types.intp)
    def add_products_part(builder: Any, sums: Any, W: Any, rows: Any, x: Any, tokens: Any, i: Any, count: Any) -> Any:
        def read(address: Any, element: Any) -> Any:
            return load_first(builder, address, element, LANES, count)

        return accumulate(builder, sums, W, rows, x, tokens, i, read)

    @operation(types.UniTuple(types.float32, n_rows * n_tokens), sums_type)
    def totals(builder: Any, sums: Any) -> Any:
        return [combined(builder, builder.extract_value(sums, n), builder.fadd) for n in range(n_rows * n_tokens)]

    return no_sums, add_products, add_products_part, totals


def tile_sums(kind: str, n_tiles: int) -> tuple[Any, Any, Any]:
    """Return the operations on the sums of n tiles of a matrix of a kind in tile order, given as bytes.

    no_tile_sums()                              a tuple of n zero vectors
    add_tile_products(sums, W, tiles, i, x)     each sum plus W[row, i] * x[i], for TILE_INPUTS inputs from i on
    store_tile_sums(sums, total, offset)        adds each tile's 8 sums to total[offset : offset + 8 n]

    `tiles` is as in `row_addresses`, with tiles in place of rows.
    """
    element, size = STORED[kind], KINDS[kind]
    sums_type = types.UniTuple(FloatVectorType(TILE_LANES), n_tiles)
    eight_times_each = ir.Constant(ir.VectorType(I32, TILE_LANES), [lane // 8 for lane in range(TILE_LANES)])

    @operation(sums_type)
    def no_tile_sums(builder: Any) -> Any:
        return [constant(TILE_VECTOR, 0.0)] * n_tiles

    @operation(sums_type, sums_type, ARRAY, ROWS_TYPE, types.intp, ARRAY)
    def add_tile_products(builder: Any, sums: Any, W: Any, tiles: Any, i: Any, x: Any) -> Any:
        inputs = load_vector(builder, builder.gep(x, [i]), F32, TILE_INPUTS)
        inputs = builder.shuffle_vector(inputs, ir.Constant(inputs.type, ir.Undefined), eight_times_each)
        column = builder.mul(i, ir.Constant(I64, 8))
        new = []
        for number, address in enumerate(row_addresses(builder, W, tiles, column, size, range(n_tiles))):
            prefetch_line(builder, address, AHEAD)
            weights = widened_tile(builder, load_vector(builder, address, element, TILE_LANES), kind)
            new.append(products(builder, weights, inputs, builder.extract_value(sums, number), kind))
        return new

    @operation(types.void, sums_type, ARRAY, types.intp)
    def store_tile_sums(builder: Any, sums: Any, total: Any, offset: Any) -> None:
        for number in range(n_tiles):
            value = builder.extract_value(sums, number)
            address = builder.gep(total, [builder.add(offset, ir.Constant(I64, 8 * number))])
            rows = load_vector(builder, address, F32, 8)
            for start in range(0, TILE_LANES, 8):
                part = ir.Constant(ir.VectorType(I32, 8), list(range(start, start + 8)))
                rows = builder.fadd(rows, builder.shuffle_vector(value, ir.Constant(TILE_VECTOR, ir.Undefined), part))
            store_vector(builder, address, rows)

    return no_tile_sums, add_tile_products, store_tile_sums
