"""The inner loop of matrix products and of attention: a tile of C += A B that stays in registers.

    C[r, lane] += sum over k of A[r, k] B[k, lane]        r < ROWS, lane < n_vectors * LANES

B is a panel: row k of it is n_vectors vectors that lie side by side, and rows follow each other without a gap. Each
number of A is multiplied with all of them, and each of the ROWS * n_vectors sums lives in a register from the first k
to the last, so that a step of k loads n_vectors vectors and ROWS numbers for ROWS * n_vectors multiply-adds.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mistral_kernels.instructions import (
    F32,
    I8,
    I64,
    KINDS,
    LANES,
    STORED,
    VECTOR,
    constant,
    fused,
    load_first,
    load_vector,
    pointer,
    prefetch_line,
    row_addresses,
    splat_of,
    widened,
)
from mistral_kernels.rows import ROWS_TYPE

# Rows and vectors of a tile, so that sums, a row of B and a number of A fit the registers: 32 with AVX-512 and NEON,
# else 16.
_IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
ROWS, VECTORS = {16: (8, 3), 8: (4, 3), 4: (6, 4) if _IS_ARM else (2, 4)}[LANES]
WIDTH = VECTORS * LANES


def tile(n_rows: int, n_vectors: int, kind: str = "f32") -> Any:
    """Return the intrinsic multiply_tile(A, a, B, b, n_k, C, c, rows, continues), with a panel of numbers of a kind.

    A, C            float32 arrays; a = (offset, row length) and c = (offset, row length) say where in them
    B               array of bytes or float32; the panel starts at its number b
    n_k             at least 1
    rows            how many rows exist; of those beyond nothing is stored
    continues       whether to add to what C holds
    """
    element, size, width = STORED[kind], KINDS[kind], n_vectors * LANES
    place = types.UniTuple(types.intp, 2)

    @intrinsic
    def multiply_tile(
        typing: Any, A: Any, a: Any, B: Any, b: Any, n_k: Any, C: Any, c: Any, rows: Any, continues: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            A, a, B, b, n_k, C, c, rows, continues = arguments

            def whole(value: int) -> ir.Constant:
                return ir.Constant(I64, value)

            def float_rows(array_type: Any, array: Any, place: Any) -> list[Any]:
                start, length = (builder.extract_value(place, index) for index in range(2))
                last = builder.sub(rows, whole(1))
                numbers = (whole(row) for row in range(n_rows))
                kept = (builder.select(builder.icmp_signed("<", row, last), row, last) for row in numbers)
                return [
                    pointer(context, builder, array_type, array, builder.add(start, builder.mul(row, length)))
                    for row in kept
                ]

            def column(address: Any, number: int) -> Any:
                return builder.gep(address, [whole(number * LANES)])

            A_rows = float_rows(signature.args[0], A, a)
            C_rows = float_rows(signature.args[5], C, c)
            B_bytes = builder.bitcast(pointer(context, builder, signature.args[2], B, whole(0)), I8.as_pointer())
            panel = builder.gep(B_bytes, [builder.mul(b, whole(size))])

            before, loop = builder.block, builder.append_basic_block("tile")
            after = builder.append_basic_block("tile_end")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(I64)
            k.add_incoming(whole(0), before)
            sums = [builder.phi(VECTOR) for _ in range(n_rows * n_vectors)]
            for phi in sums:
                phi.add_incoming(constant(VECTOR, 0.0), before)
            B_row = builder.gep(panel, [builder.mul(k, whole(width * size))])
            vectors = [
                widened(
                    builder,
                    load_vector(builder, builder.gep(B_row, [whole(number * LANES * size)]), element, LANES),
                    kind,
                )
                for number in range(n_vectors)
            ]
            new = []
            for row, address in enumerate(A_rows):
                number_of_A = splat_of(builder, builder.load(builder.gep(address, [k]), align=4), LANES)
                for number, value in enumerate(vectors):
                    new.append(fused(builder, number_of_A, value, sums[row * n_vectors + number]))
            following = builder.add(k, whole(1))
            k.add_incoming(following, loop)
            for phi, value in zip(sums, new, strict=True):
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, n_k), loop, after)
            builder.position_at_end(after)
            for index, value in enumerate(new):
                row, number = divmod(index, n_vectors)
                address = column(C_rows[row], number)
                added = value
                old = builder.select(continues, load_vector(builder, address, F32, LANES), constant(VECTOR, 0.0))
                # A row beyond the last one falls on it, after it: what stands there stays.
                exists = builder.icmp_signed("<", whole(row), rows)
                if row:
                    old = builder.select(exists, old, load_vector(builder, address, F32, LANES))
                    added = builder.select(exists, value, constant(VECTOR, -0.0))
                builder.store(builder.fadd(old, added), builder.bitcast(address, VECTOR.as_pointer()), align=1)
            return context.get_dummy_value()

        arguments = (A, place, B, types.intp, types.intp, C, place, types.intp, types.boolean)
        return types.void(*arguments), generate

    return multiply_tile


def transpose(kind: str, ahead: int) -> tuple[Any, Any]:
    """Return two intrinsics: transpose(W, rows, k, scale, panel, offset, width), and transpose_part(..., count).

    They take 8 rows of a matrix of a kind, given as bytes, 8 columns of each from column k on, and put them into a
    float32 panel as 8 rows of 8: panel[offset + width * k' + r] = W[r, k + k'], times `scale` if the kind is fp8. With
    `count` only that many columns are read, and the others are 0. `rows` is as in instructions.row_addresses. The
    columns `ahead` of these are asked for, so that they are there when their turn comes.
    """
    element, size = STORED[kind], KINDS[kind]
    order = ir.VectorType(ir.IntType(32), 8)
    low = ir.Constant(order, [0, 8, 1, 9, 2, 10, 3, 11])
    high = ir.Constant(order, [4, 12, 5, 13, 6, 14, 7, 15])

    def generate_with(read: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            W, rows, k, scale, panel, offset, width = arguments[:7]
            values = []
            for address in row_addresses(context, builder, (signature.args[0], W), rows, k, size, range(8)):
                values.append(read(builder, address, arguments))
                prefetch_line(builder, address, ahead * size)
            # Three rounds of interleaving row i with row i + 4: afterwards vector k holds column k.
            for _ in range(3):
                values = [
                    builder.shuffle_vector(values[row], values[row + 4], half)
                    for row in range(4)
                    for half in (low, high)
                ]
            for column, value in enumerate(values):
                floats = widened(builder, value, kind)
                if kind == "fp8":
                    floats = builder.fmul(floats, splat_of(builder, scale, 8))
                place = builder.add(offset, builder.mul(width, ir.Constant(I64, column)))
                address = pointer(context, builder, signature.args[4], panel, place)
                builder.store(floats, builder.bitcast(address, ir.VectorType(F32, 8).as_pointer()), align=4)
            return context.get_dummy_value()

        return generate

    @intrinsic
    def transpose_whole(typing: Any, W: Any, rows: Any, k: Any, scale: Any, panel: Any, offset: Any, width: Any) -> Any:
        generate = generate_with(lambda builder, address, arguments: load_vector(builder, address, element, 8))
        return types.void(W, ROWS_TYPE, types.intp, types.float32, panel, types.intp, types.intp), generate

    @intrinsic
    def transpose_part(
        typing: Any, W: Any, rows: Any, k: Any, scale: Any, panel: Any, offset: Any, width: Any, count: Any
    ) -> Any:
        generate = generate_with(
            lambda builder, address, arguments: load_first(builder, address, element, 8, arguments[7])
        )
        return types.void(W, ROWS_TYPE, types.intp, types.float32, panel, types.intp, types.intp, types.intp), generate

    return transpose_whole, transpose_part


def widen(kind: str) -> Any:
    """Return an intrinsic: widen(W, offset, panel, place) turns 8 numbers of a kind, given as bytes, into float32."""
    element, size = STORED[kind], KINDS[kind]

    @intrinsic
    def widen(typing: Any, W: Any, offset: Any, panel: Any, place: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            W, offset, panel, place = arguments
            address = pointer(context, builder, signature.args[0], W, builder.mul(offset, ir.Constant(I64, size)))
            floats = widened(builder, load_vector(builder, address, element, 8), kind)
            address = pointer(context, builder, signature.args[2], panel, place)
            builder.store(floats, builder.bitcast(address, floats.type.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(W, types.intp, panel, types.intp), generate

    return widen
