"""The inner loops of a matrix times a vector: several rows at once, as they are stored or in tile order.

Rows as stored: a vector holds neighbours of one row, and is summed up at the end. Tile order (layout.py): a vector
holds one number of each of eight rows, and nothing has to be summed up. Vectors of 16 lanes take two inputs of a tile
at once, and TILE_LANES is at least 8, whatever the machine has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mistral_kernels.instructions import (
    F32,
    I32,
    I64,
    KINDS,
    LANES,
    STORED,
    VECTOR,
    combined,
    constant,
    fused,
    load_first,
    load_vector,
    pointer,
    prefetch_line,
    row_addresses,
    widened,
)
from mistral_kernels.simd import FloatVectorType, vector

ROWS_TYPE = types.UniTuple(types.intp, 3)  # of instructions.row_addresses
TILE_LANES = max(LANES, 8)
TILE_INPUTS = TILE_LANES // 8
TILE_VECTOR = ir.VectorType(F32, TILE_LANES)


def row_sums(kind: str, n_rows: int) -> tuple[Any, Any, Any, Any, Any]:
    """Return the operations on the sums of n rows of a matrix of a kind, given as bytes.

    no_sums()                               a tuple of n zero vectors
    add_products(sums, W, rows, i, x)       each sum plus W[row, i : i + LANES] * x
    add_products_part(..., count)           of the first `count` columns alone
    prefetch(W, rows, i)                    asks for the columns i, ..., i + 2 LANES - 1 of the n rows after these
    totals(sums)                            a tuple of n float32

    `rows` is as in `row_addresses`.
    """
    element, size = STORED[kind], KINDS[kind]
    sums_type = types.UniTuple(vector, n_rows)

    @intrinsic
    def no_sums(typing: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return context.make_tuple(builder, sums_type, [constant(VECTOR, 0.0)] * n_rows)

        return sums_type(), generate

    def accumulate(context: Any, builder: Any, signature: Any, arguments: Any, read: Callable[[Any], Any]) -> Any:
        sums, W, rows, i, x = arguments[:5]
        new = []
        for row, address in enumerate(
            row_addresses(context, builder, (signature.args[1], W), rows, i, size, range(n_rows))
        ):
            weights = widened(builder, read(address), kind)
            new.append(fused(builder, weights, x, builder.extract_value(sums, row)))
        return context.make_tuple(builder, sums_type, new)

    @intrinsic
    def add_products(typing: Any, sums: Any, W: Any, rows: Any, i: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def read(address: Any) -> Any:
                return load_vector(builder, address, element, LANES)

            return accumulate(context, builder, signature, arguments, read)

        return sums_type(sums_type, W, ROWS_TYPE, types.intp, vector), generate

    @intrinsic
    def add_products_part(typing: Any, sums: Any, W: Any, rows: Any, i: Any, x: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def read(address: Any) -> Any:
                return load_first(builder, address, element, LANES, arguments[5])

            return accumulate(context, builder, signature, arguments, read)

        return sums_type(sums_type, W, ROWS_TYPE, types.intp, vector, types.intp), generate

    @intrinsic
    def prefetch(typing: Any, W: Any, rows: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            W, rows, i = arguments
            following = range(n_rows, 2 * n_rows)
            for address in row_addresses(context, builder, (signature.args[0], W), rows, i, size, following):
                for line in range(0, 2 * LANES * size, 64):
                    prefetch_line(builder, address, line)
            return context.get_dummy_value()

        return types.void(W, ROWS_TYPE, types.intp), generate

    @intrinsic
    def totals(typing: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            each = [combined(builder, builder.extract_value(arguments[0], row), builder.fadd) for row in range(n_rows)]
            return context.make_tuple(builder, signature.return_type, each)

        return types.UniTuple(types.float32, n_rows)(sums_type), generate

    return no_sums, add_products, add_products_part, prefetch, totals


def tile_sums(kind: str, n_tiles: int) -> tuple[Any, Any, Any]:
    """Return the operations on the sums of n tiles of a matrix of a kind in tile order, given as bytes.

    no_tile_sums()                              a tuple of n zero vectors
    add_tile_products(sums, W, tiles, i, x, k)  each sum plus W[row, i] * x[k], for TILE_INPUTS inputs from there on
    store_tile_sums(sums, total, offset)        adds each tile's 8 sums to total[offset : offset + 8 n]

    `tiles` is as in `row_addresses`, with tiles in place of rows.
    """
    element, size = STORED[kind], KINDS[kind]
    sums_type = types.UniTuple(FloatVectorType(TILE_LANES), n_tiles)

    @intrinsic
    def no_tile_sums(typing: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return context.make_tuple(builder, sums_type, [constant(TILE_VECTOR, 0.0)] * n_tiles)

        return sums_type(), generate

    @intrinsic
    def add_tile_products(typing: Any, sums: Any, W: Any, tiles: Any, i: Any, x: Any, k: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, W, tiles, i, x, k = arguments
            inputs = load_vector(builder, pointer(context, builder, signature.args[4], x, k), F32, TILE_INPUTS)
            order = [lane // 8 for lane in range(TILE_LANES)]
            spread = ir.Constant(ir.VectorType(I32, TILE_LANES), order)
            inputs = builder.shuffle_vector(inputs, ir.Constant(inputs.type, ir.Undefined), spread)
            column = builder.mul(i, ir.Constant(I64, 8))
            new = []
            for number, address in enumerate(
                row_addresses(context, builder, (signature.args[1], W), tiles, column, size, range(n_tiles))
            ):
                weights = widened(builder, load_vector(builder, address, element, TILE_LANES), kind)
                new.append(fused(builder, weights, inputs, builder.extract_value(sums, number)))
            return context.make_tuple(builder, sums_type, new)

        return sums_type(sums_type, W, ROWS_TYPE, types.intp, x, types.intp), generate

    @intrinsic
    def store_tile_sums(typing: Any, sums: Any, total: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, total, offset = arguments
            for number in range(n_tiles):
                value = builder.extract_value(sums, number)
                place = builder.add(offset, ir.Constant(I64, 8 * number))
                address = pointer(context, builder, signature.args[1], total, place)
                rows = load_vector(builder, address, F32, 8)
                for start in range(0, TILE_LANES, 8):
                    part = ir.Constant(ir.VectorType(I32, 8), list(range(start, start + 8)))
                    undefined = ir.Constant(TILE_VECTOR, ir.Undefined)
                    rows = builder.fadd(rows, builder.shuffle_vector(value, undefined, part))
                builder.store(rows, builder.bitcast(address, rows.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(sums_type, total, types.intp), generate

    return no_tile_sums, add_tile_products, store_tile_sums
