"""The inner loop of matrix products and of attention: a tile of C += A B that stays in registers.

    C[r, lane] += sum over k of A[r, k] B[k, lane]        r < ROWS, lane < n_vectors * LANES

B is a panel: a row k of it is n_vectors vectors side by side, and rows follow each other without a gap. Each number of
A is multiplied with all vectors of its row of B. Each of the ROWS * n_vectors sums stays in a register from the first k
to the last. So each k loads n_vectors vectors and ROWS numbers for ROWS * n_vectors multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from llvmlite import ir
from numba import types

from mistral_kernels.instructions import (
    F32,
    I8,
    I32,
    I64,
    IS_ARM,
    KINDS,
    LANES,
    LINE,
    STORED,
    VECTOR,
    constant,
    load_first,
    load_vector,
    prefetch_line,
    row_addresses,
    splat_of,
    store_vector,
    widened,
)
from mistral_kernels.pairs import products
from mistral_kernels.rows import ROWS_TYPE
from mistral_kernels.simd import ARRAY, operation

# Rows and vectors of a tile, so that sums, a row of B and a number of A fit the registers: 32 with AVX-512 and NEON,
# else 16.
ROWS, VECTORS = {16: (8, 3), 8: (4, 3), 4: (6, 4) if IS_ARM else (2, 4)}[LANES]
WIDTH = VECTORS * LANES
PLACE = types.UniTuple(types.intp, 2)  # where in an array a matrix is: offset, and row length


def stored_rows(builder: Any, array: Any, place: Any, n_rows: int) -> list[Any]:
    """Return the address of each of n rows of a matrix."""
    start, length = (builder.extract_value(place, index) for index in range(2))
    starts = (builder.add(start, builder.mul(ir.Constant(I64, row), length)) for row in range(n_rows))
    return [builder.gep(array, [offset]) for offset in starts]


def add_to_rows(builder: Any, rows: list[Any], sums: list[Any], continues: Any) -> None:
    """Add sums, some vectors for each row, to what rows of floats hold, or put them there."""
    n_vectors = len(sums) // len(rows)
    for index, value in enumerate(sums):
        row, number = divmod(index, n_vectors)
        address = builder.gep(rows[row], [ir.Constant(I64, number * LANES)])
        found = load_vector(builder, address, F32, LANES)
        old = builder.select(continues, found, constant(VECTOR, 0.0))
        store_vector(builder, address, builder.fadd(old, value))


def summed_in_loop(
    builder: Any, start: Any, stop: Any, stride: int, sums: list[Any], step: Callable[[Any, list[Any]], list[Any]]
) -> list[Any]:
    """Return sums that stay in registers: step(k, sums) gives the next ones, for k in range(start, stop, stride)."""
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(I64)
    k.add_incoming(start, before)
    phis = [builder.phi(value.type) for value in sums]
    for phi, value in zip(phis, sums, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", k, stop), body, after)
    builder.position_at_end(body)
    new = step(k, phis)
    k.add_incoming(builder.add(k, ir.Constant(I64, stride)), builder.block)
    for phi, value in zip(phis, new, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return phis


def tile(
    n_rows: int,
    n_vectors: int,
    kind: str = "f32",
    *,
    of_vectors: int | None = None,
    ahead: int = 0,
    steps: int = 1,
    asks_for_next_rows: bool = False,
) -> Any:
    """Return the operation multiply_tile(A, a, B, b, n_k, C, c, continues), with a panel of numbers of a kind.

    A, C            float32 arrays; a = (offset, row length) and c = (offset, row length) say where in them. If the kind
                    is "pairs", A holds pairs as well, and a number of A or of the panel is one pair. Where a row length
                    is a constant of the kernel, one register holds the address of all rows
    B               array of bytes or float32; the panel starts at its number b. Its rows may be of more vectors
                    (of_vectors) than are multiplied
    n_k             at least 1
    continues       whether to add to what C holds

    Cache lines of the panel are asked for when the tile is `ahead` bytes before them; 0: when they are read. Those of
    A's next n_rows rows, where the next tile will be, may be asked for meanwhile. A round of the loop takes one step of
    k or more: more are faster while the addresses of rows fit the registers.
    """
    element, size, width = STORED[kind], KINDS[kind], (of_vectors or n_vectors) * LANES

    def whole(value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def added(builder: Any, A_rows: list[Any], next_rows: Any, panel: Any, k: Any, sums: list[Any]) -> list[Any]:
        """Return the sums after step k."""
        B_row = builder.gep(panel, [builder.mul(k, whole(width * size))])
        vectors = []
        for number in range(n_vectors):
            address = builder.gep(B_row, [whole(number * LANES * size)])
            if ahead and number * LANES * size % LINE == 0:
                prefetch_line(builder, address, ahead)
            vectors.append(widened(builder, load_vector(builder, address, element, LANES), kind))
        if asks_for_next_rows:
            prefetch_line(builder, builder.gep(next_rows, [builder.mul(k, whole(n_rows))]), 0, level=1)
        new = []
        for row, address in enumerate(A_rows):
            number_of_A = splat_of(builder, builder.load(builder.gep(address, [k]), align=4), LANES)
            for number, value in enumerate(vectors):
                new.append(products(builder, number_of_A, value, sums[row * n_vectors + number], kind))
        return new

    @operation(types.void, ARRAY, PLACE, ARRAY, types.intp, types.intp, ARRAY, PLACE, types.boolean)
    def multiply_tile(builder: Any, A: Any, a: Any, B: Any, b: Any, n_k: Any, C: Any, c: Any, continues: Any) -> None:
        A_rows, C_rows = stored_rows(builder, A, a, n_rows), stored_rows(builder, C, c, n_rows)
        panel = builder.gep(builder.bitcast(B, I8.as_pointer()), [builder.mul(b, whole(size))])
        next_rows = builder.gep(A_rows[0], [builder.mul(builder.extract_value(a, 1), whole(n_rows))])

        def step(k: Any, sums: list[Any]) -> list[Any]:
            return added(builder, A_rows, next_rows, panel, k, sums)

        def whole_round(k: Any, sums: list[Any]) -> list[Any]:
            for number in range(steps):
                sums = step(builder.add(k, whole(number)), sums)
            return sums

        sums, done = [constant(VECTOR, 0.0)] * (n_rows * n_vectors), whole(0)
        if steps > 1:
            done = builder.sub(n_k, builder.srem(n_k, whole(steps)))
            sums = summed_in_loop(builder, whole(0), done, steps, sums, whole_round)
        sums = summed_in_loop(builder, done, n_k, 1, sums, step)
        add_to_rows(builder, C_rows, sums, continues)

    return multiply_tile


def transpose(kind: str, ahead: int) -> tuple[int, Any, Any]:
    """Return n, and two operations: transpose(W, rows, k, scale, panel, offset, width), and transpose_part(..., count).

    They take 8 rows of a matrix of a kind, given as bytes, n columns of each from column k on, and put them into a
    float32 panel as n rows of 8: panel[offset + width * k' + r] = W[r, k + k'], times `scale` if the kind is fp8. With
    `count` only that many columns are read, and the others are 0. `rows` is as in instructions.row_addresses. The
    columns `ahead` of these are asked for, so that they are there when their turn comes.

    Two bf16 move as one word of 32 bits, since to part them is no more work than to widen them, and n is 16; else it
    is 8.
    """
    element, size = STORED[kind], KINDS[kind]
    in_word, word = (2, I32) if kind == "bf16" else (1, element)
    order = ir.VectorType(I32, 8)
    low = ir.Constant(order, [0, 8, 1, 9, 2, 10, 3, 11])
    high = ir.Constant(order, [4, 12, 5, 13, 6, 14, 7, 15])
    parameters = (ARRAY, ROWS_TYPE, types.intp, types.float32, ARRAY, types.intp, types.intp)

    def transposed(
        builder: Any, read: Callable[[Any], Any], W: Any, rows: Any, k: Any, scale: Any, panel: Any, offset: Any,
        width: Any,
    ) -> None:  # fmt: skip
        values = []
        for address in row_addresses(builder, W, rows, k, size, range(8)):
            values.append(builder.bitcast(read(address), ir.VectorType(word, 8)))
            prefetch_line(builder, address, ahead * size)
        # Three rounds of interleaving row i with row i + 4: afterwards vector k holds column k.
        for _ in range(3):
            values = [
                builder.shuffle_vector(values[row], values[row + 4], half) for row in range(4) for half in (low, high)
            ]
        for column, (words, number) in enumerate(product(values, range(in_word))):
            stored = words
            if in_word > 1:
                shifted = builder.lshr(words, constant(words.type, number * element.width))
                stored = builder.trunc(shifted, ir.VectorType(element, 8))
            floats = widened(builder, stored, kind)
            if kind == "fp8":
                floats = builder.fmul(floats, splat_of(builder, scale, 8))
            place = builder.add(offset, builder.mul(width, ir.Constant(I64, column)))
            store_vector(builder, builder.gep(panel, [place]), floats)

    @operation(types.void, *parameters)
    def transpose_whole(
        builder: Any, W: Any, rows: Any, k: Any, scale: Any, panel: Any, offset: Any, width: Any
    ) -> None:
        def read(address: Any) -> Any:
            return load_vector(builder, address, element, 8 * in_word)

        transposed(builder, read, W, rows, k, scale, panel, offset, width)

    @operation(types.void, *parameters, types.intp)
    def transpose_part(
        builder: Any, W: Any, rows: Any, k: Any, scale: Any, panel: Any, offset: Any, width: Any, count: Any
    ) -> None:
        def read(address: Any) -> Any:
            return load_first(builder, address, element, 8 * in_word, count)

        transposed(builder, read, W, rows, k, scale, panel, offset, width)

    return 8 * in_word, transpose_whole, transpose_part
