"""The inner loop of matrix products and of attention: a tile of C += A B that stays in registers.

    C[r, lane] += sum over k of A[r, k] B[k, lane]        r < n_rows, lane < n_vectors * LANES

B is a panel: a row k of it is n_vectors vectors side by side, and rows follow each other without a gap. Each number of
A is multiplied with all vectors of its row of B. Each of the n_rows * n_vectors sums stays in a register from the first
k to the last. So each k loads n_vectors vectors and n_rows numbers for n_rows * n_vectors multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable

from numba import types

from mistral_kernels.arrays import Operation
from mistral_kernels.pairs import products
from mistral_kernels.processor import IS_ARM, LANES, LINE
from mistral_kernels.stored import KINDS, PLACE, ROWS, Place, Rows, addresses_at, row_addresses, size_of, widened
from mistral_kernels.value import ARRAY, F32, U8, U32, Address, Value, constant, loop, operation, where

# Rows and vectors of a tile, so that sums, a row of B and a number of A fit the registers: 32 with AVX-512 and NEON,
# else 16.
TILE_ROWS, VECTORS = {16: (8, 3), 8: (4, 3), 4: (6, 4) if IS_ARM else (2, 4)}[LANES]
WIDTH = VECTORS * LANES


def sums_before(rows: list[Address], n_vectors: int, continues: Value) -> list[Value]:
    """Return what rows of floats hold, n vectors for each row; zeros unless `continues`."""
    starts = [row + number * LANES for row in rows for number in range(n_vectors)]
    return [where(continues, start.load(F32, LANES), 0.0) for start in starts]


def store_sums(rows: list[Address], sums: list[Value]) -> None:
    """Put sums, some vectors for each row, into rows of floats."""
    n_vectors = len(sums) // len(rows)
    for index, value in enumerate(sums):
        row, number = divmod(index, n_vectors)
        (rows[row] + number * LANES).store(value)


def tile(
    n_rows: int,
    n_vectors: int,
    kind: str = "f32",
    *,
    of_vectors: int | None = None,
    ahead: int = 0,
    in_round: int = 1,
    asks_for_next_rows: bool = False,
) -> Operation:
    """Return the operation multiply_tile(A, a, B, b, n_k, C, c, continues), with a panel of numbers of a kind.

    A, C            float32 arrays; the Places a and c say where in them. If the kind is "pairs", A holds pairs as well,
                    and a number of A or of the panel is one pair. Where a stride is a constant of the kernel, one
                    register holds the address of all rows
    B               array of bytes or float32; the panel starts at its number b. Its rows may be of more vectors
                    (of_vectors) than are multiplied
    n_k             at least 1
    continues       whether to add to what C holds

    Cache lines of the panel are asked for when the tile is `ahead` bytes before them; 0: when they are read. Those of
    A's next n_rows rows, where the next tile will be, may be asked for meanwhile. A round of the loop takes `in_round`
    numbers k: several are faster while the addresses of rows fit the registers.

        for r in range(n_rows):
            for lane in range(n_vectors * LANES):
                C[r, lane] = (C[r, lane] if continues else 0) + sum(A[r, k] * B[k, lane] for k in range(n_k))
    """
    size = size_of(kind)
    row_bytes, vector_bytes = (of_vectors or n_vectors) * LANES * size, LANES * size

    def of_rows(sums: list[Value]) -> list[list[Value]]:
        return [sums[start : start + n_vectors] for start in range(0, len(sums), n_vectors)]

    def vectors_of(B_row: Address) -> list[Value]:
        vectors = []
        for number in range(n_vectors):
            address = B_row + number * vector_bytes
            if ahead and number * vector_bytes % LINE == 0:
                address.prefetch(ahead)
            vectors.append(widened(address.load(KINDS[kind], LANES), kind))
        return vectors

    @operation(types.void, ARRAY, PLACE, ARRAY, types.intp, types.intp, ARRAY, PLACE, types.boolean)
    def multiply_tile(
        A: Address, a: Place, B: Address, b: Value, n_k: Value, C: Address, c: Place, continues: Value
    ) -> None:
        A_rows, panel = addresses_at(A, a, n_rows), B.of(U8) + b * size
        next_rows = A_rows[0] + a.stride * n_rows

        def with_k(k: Value, sums: list[Value]) -> list[Value]:
            vectors = vectors_of(panel + k * row_bytes)
            if asks_for_next_rows:
                (next_rows + k * n_rows).prefetch(level=1)
            new = []
            for row, before in zip(A_rows, of_rows(sums), strict=True):
                number = (row + k).load(F32).spread(LANES)
                new += [products(number, value, old, kind) for value, old in zip(vectors, before, strict=True)]
            return new

        def whole_round(k: Value, sums: list[Value]) -> list[Value]:
            for number in range(in_round):
                sums = with_k(k + number, sums)
            return sums

        sums = [constant(F32, 0.0, LANES)] * (n_rows * n_vectors)
        done: Value | int = 0
        if in_round > 1:
            done = n_k - n_k % in_round
            sums = loop(0, done, in_round, sums, whole_round)
        sums = loop(done, n_k, 1, sums, with_k)
        C_rows = addresses_at(C, c, n_rows)
        before = sums_before(C_rows, n_vectors, continues)
        store_sums(C_rows, [old + value for old, value in zip(before, sums, strict=True)])

    return multiply_tile


def columns_of_eight(rows: list[Value]) -> list[Value]:
    """Return the columns of 8 rows of 8 lanes. Three rounds interleave row i with row i + 4."""
    low, high = [0, 8, 1, 9, 2, 10, 3, 11], [4, 12, 5, 13, 6, 14, 7, 15]
    for _ in range(3):
        rows = [rows[row].chosen(half, rows[row + 4]) for row in range(4) for half in (low, high)]
    return rows


def transpose(kind: str, ahead: int) -> tuple[int, Operation, Operation]:
    """Return n, and two operations: transpose(W, rows, k, scale, panel, place), and transpose_part(..., count).

    They take 8 rows of a matrix of a kind, given as bytes, n columns of each from column k on, and put them into a
    float32 panel as n rows of 8: panel[place.first + place.stride * k' + r] = W[r, k + k'], times `scale` if the kind
    is fp8. With `count` only that many columns are read, and the others are 0. The columns `ahead` of these are asked
    for, so that they are there when their turn comes.

    Two bf16 move as one word of 32 bits, since to part them is no more work than to widen them, and n is 16; else it
    is 8.
    """
    dtype, in_word = KINDS[kind], 2 if kind == "bf16" else 1
    n = 8 * in_word
    parameters = (ARRAY, ROWS, types.intp, types.float32, ARRAY, PLACE)

    def columns_of(rows: list[Value]) -> list[Value]:
        """Return the columns of 8 rows of 8 words."""
        if in_word == 1:
            return columns_of_eight(rows)
        return [(words >> shift).to(dtype) for words in columns_of_eight(rows) for shift in (0, 16)]

    def transposed(
        W: Address, rows: Rows, k: Value, scale: Value, panel: Address, place: Place, read: Callable[[Address], Value]
    ) -> None:
        words = []
        for address in row_addresses(W, rows, k, dtype, range(8)):
            words.append(read(address).bits_as(U32 if in_word == 2 else dtype))
            address.prefetch(ahead * size_of(kind))
        for number, column in enumerate(columns_of(words)):
            floats = widened(column, kind)
            (panel + (place.first + place.stride * number)).store(floats * scale if kind == "fp8" else floats)

    @operation(types.void, *parameters)
    def transpose_whole(W: Address, rows: Rows, k: Value, scale: Value, panel: Address, place: Place) -> None:
        transposed(W, rows, k, scale, panel, place, lambda address: address.load(dtype, n))

    @operation(types.void, *parameters, types.intp)
    def transpose_part(
        W: Address, rows: Rows, k: Value, scale: Value, panel: Address, place: Place, count: Value
    ) -> None:
        transposed(W, rows, k, scale, panel, place, lambda address: address.load_first(dtype, n, count))

    return n, transpose_whole, transpose_part
