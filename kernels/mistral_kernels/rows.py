"""The inner loop of a matrix times a vector, or a few: several rows at once, as they are stored.

A vector holds neighbours of one row, and its lanes are summed at the end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from numba import types

from mistral_kernels.arrays import Operation
from mistral_kernels.pairs import products
from mistral_kernels.processor import LANES
from mistral_kernels.simd import vector
from mistral_kernels.stored import KINDS, ROWS, Rows, row_addresses, widened
from mistral_kernels.value import ARRAY, F32, Address, Dtype, Value, constant, operation

AHEAD = 2048  # bytes; what a stream asks for before it gets there


def row_sums(kind: str, n_rows: int, n_tokens: int) -> tuple[Operation, Operation, Operation, Operation]:
    """Return the operations on the sums of n rows of a matrix of a kind, given as bytes, with the inputs of n tokens.

    no_sums()                                   a tuple of zero vectors, one for each row and token, row after row
    add_products(sums, W, rows, x, tokens, i)   each sum plus W[row, i : i + LANES] * x[token, i : i + LANES]
    add_products_part(..., count)               of the first `count` columns alone
    totals(sums)                                a tuple of float32

    x           float32, or pairs in their place
    rows, tokens    where the rows of W and of x begin
    """
    dtype, n_sums = KINDS[kind], n_rows * n_tokens
    sums_type = types.UniTuple(vector, n_sums)
    parameters = (sums_type, ARRAY, ROWS, ARRAY, ROWS, types.intp)
    Read = Callable[[Address, Dtype], Value]

    def accumulate(sums: tuple[Value, ...], weights: list[Address], inputs: list[Address], read: Read) -> list[Value]:
        new, w = list(sums), [widened(read(address, dtype), kind) for address in weights]
        for token, address in enumerate(inputs):  # one after the other, so that one register holds their numbers
            x = read(address, F32)
            for row, value in enumerate(w):
                new[row * n_tokens + token] = products(value, x, sums[row * n_tokens + token], kind)
        return new

    @operation(sums_type)
    def no_sums() -> list[Value]:
        return [constant(F32, 0.0, LANES)] * n_sums

    @operation(sums_type, *parameters)
    def add_products(
        sums: tuple[Value, ...], W: Address, rows: Rows, x: Address, tokens: Rows, i: Value
    ) -> list[Value]:
        weights = row_addresses(W, rows, i, dtype, range(n_rows))
        for address in weights:
            address.prefetch(AHEAD)
        inputs = row_addresses(x, tokens, i, F32, range(n_tokens))
        return accumulate(sums, weights, inputs, lambda address, dtype: address.load(dtype, LANES))

    @operation(sums_type, *parameters, types.intp)
    def add_products_part(
        sums: tuple[Value, ...], W: Address, rows: Rows, x: Address, tokens: Rows, i: Value, count: Value
    ) -> list[Value]:
        weights = row_addresses(W, rows, i, dtype, range(n_rows))
        inputs = row_addresses(x, tokens, i, F32, range(n_tokens))
        return accumulate(sums, weights, inputs, lambda address, dtype: address.load_first(dtype, LANES, count))

    @operation(types.UniTuple(types.float32, n_sums), sums_type)
    def totals(sums: tuple[Value, ...]) -> list[Value]:
        return [value.combined(operator.add) for value in sums]

    return no_sums, add_products, add_products_part, totals
