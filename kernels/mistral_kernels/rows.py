"""The inner loop of a matrix times a vector, or a few: several rows at once, as they are stored.

A vector holds neighbours of one row, and its lanes are summed at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types

from mistral_kernels.instructions import (
    F32,
    I8,
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
    widened,
)
from mistral_kernels.pairs import products
from mistral_kernels.simd import ARRAY, operation, vector

ROWS_TYPE = types.UniTuple(types.intp, 3)  # of instructions.row_addresses
AHEAD = 2048  # bytes; what a stream asks for before it gets there
TILE_LANES = max(LANES, 8)  # of quantized weights: a vector holds one or two numbers of each of a tile's eight rows


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
