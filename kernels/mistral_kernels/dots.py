"""The inner loops of products with codes of 8 or 4 bits: integer arithmetic, exact within a group of inputs.

Inputs come in groups. A weight is scale * (code - zero), with one scale and one zero for each group of a row. A rounded
input is scale_x * q, with one scale_x for each group. Over a group

    sum of weight * x = scale * scale_x * (sum of code * q - zero * sum of q)

Both sums on the right are sums of integers. Processors multiply and add two int16 or four bytes at once. Floats come
only after a group. int16 inputs lie in the order 0, 2, 1, 3 in each four, so that neighbours meet the codes of the even
and of the odd bytes.

    scale = a byte times a unit of the whole matrix: 4 bits of exponent e and 4 of mantissa m, bits of a float16,
            (1 + m/16) 2^(e - 15), or m/16 2^-14 where e is 0
    zero  = a byte / 2^(8 - bits)
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from mistral_kernels.instructions import (
    F32,
    I8,
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    combined,
    constant,
    fenced,
    fused,
    load_vector,
    prefetch_line,
    row_addresses,
    splat_of,
    store_vector,
    widened,
)
from mistral_kernels.pairs import pair_dots, quad_dots
from mistral_kernels.rows import AHEAD, ROWS_TYPE, TILE_LANES
from mistral_kernels.simd import ARRAY, FloatVectorType, operation
from mistral_kernels.tile import PLACE, ROWS, VECTORS, WIDTH, add_to_rows, stored_rows, summed_in_loop

ACTIVATIONS = {"int16": 2, "int8": 1}  # what inputs are rounded to, and the bytes of one
LARGEST = {"int16": 32767.0, "int8": 127.0}
EIGHT = FloatVectorType(8)

# As many rows of a tile as leave room for an integer and a float for each lane.
GROUP_ROWS = ROWS // 2

_EIGHT_FLOATS = ir.VectorType(F32, 8)


def _whole(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def code_bytes(builder: Any, stored: Any, bits: int) -> list[Any]:
    """Return the vectors of codes that a vector of bytes holds: itself, or its lower and its upper halves."""
    if bits == 8:
        return [stored]
    return [builder.and_(stored, constant(stored.type, 15)), builder.lshr(stored, constant(stored.type, 4))]


def products(builder: Any, sums: Any, codes: Any, x: list[Any], bits: int) -> Any:
    """Return sums plus the products of codes, four in each lane, with inputs: int16 even and odd, or int8 together."""
    if len(x) == 1:
        return quad_dots(builder, sums, codes, x[0], 2**bits - 1)
    words = ir.VectorType(I16, 2 * sums.type.count)
    codes = builder.bitcast(codes, words)
    sums = pair_dots(builder, sums, builder.and_(codes, constant(words, 0xFF)), x[0])
    return pair_dots(builder, sums, builder.lshr(codes, constant(words, 8)), x[1])


def scales_of(builder: Any, address: Any, bits: int) -> tuple[Any, Any]:
    """Return the scales, without their unit, and the zeros of the 8 rows of a tile's group."""
    codes = load_vector(builder, address, I8, 8)
    half = builder.shl(builder.zext(codes, ir.VectorType(I16, 8)), constant(ir.VectorType(I16, 8), 6))
    zeros = load_vector(builder, builder.gep(address, [_whole(8)]), I8, 8)
    zeros = builder.uitofp(builder.zext(zeros, ir.VectorType(I32, 8)), _EIGHT_FLOATS)
    return widened(builder, half, "f16"), builder.fmul(zeros, constant(_EIGHT_FLOATS, 2.0 ** (bits - 8)))


def rounding(activations: str, group: int) -> Any:
    """Return the operation round_group(x, i, q, j): rounds the inputs of a group, returns scale_x and the sum of q.

    x       float32; the group's begin at i
    q       int16 or int8; the group's begin at j

    scale_x = max |x| / 32767 (or 127), q = x / scale_x to the nearest, ties to even; 0 where that is too small for it.
    """
    wide = ir.VectorType(I32, LANES)
    order = [lane // 4 * 4 + (0, 2, 1, 3)[lane % 4] for lane in range(LANES)]
    largest = LARGEST[activations]

    @operation(types.UniTuple(types.float32, 2), ARRAY, types.intp, ARRAY, types.intp)
    def round_group(builder: Any, x: Any, i: Any, q: Any, j: Any) -> Any:
        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.icmp_signed(">", a, b), a, b)

        inputs, magnitude = [], constant(wide, 0)
        for start in range(0, group, LANES):
            value = load_vector(builder, builder.gep(x, [builder.add(i, _whole(start))]), F32, LANES)
            inputs.append(value)
            # As integers, floats without their sign are in the same order, and NaN is the largest of all.
            bits = builder.and_(builder.bitcast(value, wide), constant(wide, 0x7FFFFFFF))
            magnitude = larger(magnitude, bits)
        most = builder.bitcast(combined(builder, magnitude, larger), F32)
        times = builder.fdiv(ir.Constant(F32, largest), most)
        is_finite = builder.fcmp_ordered("<", times, ir.Constant(F32, float("inf")))
        times = splat_of(builder, builder.select(is_finite, times, ir.Constant(F32, 0.0)), LANES)
        total = constant(wide, 0)
        for number, value in enumerate(inputs):
            # Adding 1.5 * 2^23 rounds, and leaves the result in the lowest bits.
            shifted = builder.fadd(fenced(builder, builder.fmul(value, times)), constant(VECTOR, 1.5 * 2**23))
            rounded = builder.trunc(builder.bitcast(shifted, wide), ir.VectorType(I16, LANES))
            total = builder.add(total, builder.sext(rounded, wide))
            if activations == "int16":
                mask = ir.Constant(wide, order)
                rounded = builder.shuffle_vector(rounded, ir.Constant(rounded.type, ir.Undefined), mask)
            else:
                rounded = builder.trunc(rounded, ir.VectorType(I8, LANES))
            store_vector(builder, builder.gep(q, [builder.add(j, _whole(number * LANES))]), rounded)
        summed = builder.sitofp(combined(builder, total, builder.add), F32)
        return [builder.fdiv(most, ir.Constant(F32, largest)), summed]

    return round_group


def tile_groups(bits: int, activations: str, group: int, n_tiles: int) -> tuple[Any, Any, Any]:
    """Return the operations on the sums of n tiles of codes.

    no_group_sums()                                         a tuple of n vectors of 8 zeros
    add_group(sums, W, tiles, S, scales, q, i, scale_x, sum_x)
                                                            each sum plus what the group of inputs from i on gives
    store_group_sums(sums, number, y, offset)               puts the sums of a tile into y[offset : offset + 8]

    W       bytes of the codes; `tiles` is as in `row_addresses`, with tiles in place of rows, and in bytes
    S       bytes of the scales and zeros: 8 and 8 for each tile's group; `scales` is as `tiles`
    """
    sums_type = types.UniTuple(EIGHT, n_tiles)
    lanes = ir.VectorType(I32, TILE_LANES)
    halves, per_byte = TILE_LANES // 8, 8 // bits  # a vector has 8 rows of four codes, once or twice
    n_words = {"int16": 2, "int8": 1}[activations]  # of 32 bits, for four inputs

    def inputs_for(builder: Any, q: Any, vector_number: int, half_byte: int) -> list[Any]:
        """Return what the codes of a vector, or of half of its bytes, are multiplied with."""
        chosen = []
        for part in range(n_words):
            # Of each half of the vector: the number of its four inputs, and of the word that holds this part of them.
            fours = [(vector_number * halves + half) * per_byte + half_byte for half in range(halves)]
            first, last = fours[0] * n_words + part, fours[-1] * n_words + part
            stored = load_vector(builder, builder.gep(q, [_whole(4 * first)]), I32, last - first + 1)
            mask = [0 if lane < 8 else last - first for lane in range(TILE_LANES)]
            spread = builder.shuffle_vector(stored, ir.Constant(stored.type, ir.Undefined), ir.Constant(lanes, mask))
            element, count = (I16, 2) if activations == "int16" else (I8, 4)
            chosen.append(builder.bitcast(spread, ir.VectorType(element, count * TILE_LANES)))
        return chosen

    def folded(builder: Any, dots: Any) -> Any:
        """Return the dots of 8 rows."""
        if halves == 1:
            return dots
        undefined = ir.Constant(dots.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(dots, undefined, ir.Constant(ir.VectorType(I32, 8), list(range(start, start + 8))))
            for start in (0, 8)
        )
        return builder.add(low, high)

    @operation(sums_type)
    def no_group_sums(builder: Any) -> Any:
        return [constant(_EIGHT_FLOATS, 0.0)] * n_tiles

    @operation(
        sums_type, sums_type, ARRAY, ROWS_TYPE, ARRAY, ROWS_TYPE, ARRAY, types.intp, types.float32, types.float32
    )
    def add_group(
        builder: Any, sums: Any, W: Any, tiles: Any, S: Any, scales: Any, q: Any, i: Any, scale_x: Any, sum_x: Any
    ) -> Any:
        q = builder.bitcast(builder.gep(q, [i]), I8.as_pointer())
        addresses = row_addresses(builder, W, tiles, builder.mul(i, _whole(bits)), 1, range(n_tiles))
        dots = [constant(lanes, 0)] * n_tiles
        for vector_number in range(group * bits // (4 * TILE_LANES)):
            x = [inputs_for(builder, q, vector_number, half) for half in range(per_byte)]
            for number, address in enumerate(addresses):
                place = builder.gep(address, [_whole(4 * TILE_LANES * vector_number)])
                prefetch_line(builder, place, AHEAD)
                stored = load_vector(builder, place, I8, 4 * TILE_LANES)
                for half, codes in enumerate(code_bytes(builder, stored, bits)):
                    dots[number] = products(builder, dots[number], codes, x[half], bits)
        scale_x, sum_x = (splat_of(builder, value, 8) for value in (scale_x, builder.fneg(sum_x)))
        of_group = builder.mul(builder.sdiv(i, _whole(group)), _whole(16))
        new = []
        for number, address in enumerate(row_addresses(builder, S, scales, of_group, 1, range(n_tiles))):
            scale, zero = scales_of(builder, address, bits)
            dot = builder.sitofp(folded(builder, dots[number]), _EIGHT_FLOATS)
            dot = fused(builder, zero, sum_x, dot)
            new.append(fused(builder, builder.fmul(scale, scale_x), dot, builder.extract_value(sums, number)))
        return new

    @operation(types.void, sums_type, ARRAY, types.intp)
    def store_group_sums(builder: Any, sums: Any, y: Any, offset: Any) -> None:
        for number in range(n_tiles):
            address = builder.gep(y, [builder.add(offset, _whole(8 * number))])
            store_vector(builder, address, builder.extract_value(sums, number))

    return no_group_sums, add_group, store_group_sums


def unpack(bits: int) -> tuple[Any, Any]:
    """Return the operations that put 8 inputs of a tile of codes, or the scales of a group, into a panel.

    unpack_codes(W, offset, panel, place)       the bytes from offset on become two times 8 rows of four codes, at place
                                                and WIDTH * 4 bytes further on
    unpack_scales(S, offset, panel, place)      scales and zeros become 8 floats each, at place and WIDTH further on
    """

    @operation(types.void, ARRAY, types.intp, ARRAY, types.intp)
    def unpack_codes(builder: Any, W: Any, offset: Any, panel: Any, place: Any) -> None:
        address = builder.gep(W, [offset])
        stored = [load_vector(builder, builder.gep(address, [_whole(32 * n)]), I8, 32) for n in range(bits // 4)]
        codes = stored if bits == 8 else code_bytes(builder, stored[0], bits)
        for number, four in enumerate(codes):
            store_vector(builder, builder.gep(panel, [builder.add(place, _whole(4 * WIDTH * number))]), four)

    @operation(types.void, ARRAY, types.intp, ARRAY, types.intp)
    def unpack_scales(builder: Any, S: Any, offset: Any, panel: Any, place: Any) -> None:
        scale, zero = scales_of(builder, builder.gep(S, [offset]), bits)
        store_vector(builder, builder.gep(panel, [place]), scale)
        store_vector(builder, builder.gep(panel, [builder.add(place, _whole(WIDTH))]), zero)

    return unpack_codes, unpack_scales


def group_tile(bits: int, activations: str, group: int) -> Any:
    """Return the operation multiply_groups(q, a, panel, S, scales_x, n, n_groups, C, c, continues).

        C[r, lane] += sum over groups of
            scale[lane] scale_x[r] (sum over the group of code[k, lane] q[r, k] - zero[lane] sum_x[r])

    for GROUP_ROWS rows and WIDTH lanes: an integer and a float for each stay in registers.

    q           int16 or int8; a = (offset, row length)
    panel       codes as bytes, four inputs of each lane together
    S           float32: scales and zeros of WIDTH lanes, group by group
    scales_x    float32: scale_x and sum_x, group by group; n = (offset, row length)
    C           float32; c = (offset, row length)
    continues   whether to add to what C holds
    """
    n_sums, size = GROUP_ROWS * VECTORS, ACTIVATIONS[activations]
    lanes = ir.VectorType(I32, LANES)
    element, n_words = (I16, 2) if activations == "int16" else (I8, 1)

    def products_of(builder: Any, q_rows: list[Any], panel: Any, four: Any, sums: list[Any]) -> list[Any]:
        """Return the sums after four more inputs."""
        row = builder.gep(panel, [builder.mul(four, _whole(4 * WIDTH))])
        codes = [
            load_vector(builder, builder.gep(row, [_whole(4 * LANES * number)]), I8, 4 * LANES)
            for number in range(VECTORS)
        ]
        new = []
        for r, address in enumerate(q_rows):
            x = []
            for part in range(n_words):
                place = builder.gep(address, [builder.add(builder.mul(four, _whole(4 * size)), _whole(4 * part))])
                one = load_vector(builder, place, I32, 1)
                spread = splat_of(builder, builder.extract_element(one, ir.Constant(I32, 0)), LANES)
                x.append(builder.bitcast(spread, ir.VectorType(element, 4 * LANES // n_words)))
            for number, value in enumerate(codes):
                new.append(products(builder, sums[r * VECTORS + number], value, x, bits))
        return new

    @operation(types.void, ARRAY, PLACE, ARRAY, ARRAY, ARRAY, PLACE, types.intp, ARRAY, PLACE, types.boolean)
    def multiply_groups(
        builder: Any, q: Any, a: Any, panel: Any, S: Any, scales_x: Any, n: Any, n_groups: Any, C: Any, c: Any,
        continues: Any,
    ) -> None:  # fmt: skip
        q_rows, x_rows = stored_rows(builder, q, a, GROUP_ROWS), stored_rows(builder, scales_x, n, GROUP_ROWS)
        C_rows = stored_rows(builder, C, c, GROUP_ROWS)

        def add_group(number_of_group: Any, sums: list[Any]) -> list[Any]:
            start = builder.mul(number_of_group, _whole(group))
            begins = [builder.bitcast(builder.gep(address, [start]), I8.as_pointer()) for address in q_rows]
            codes = builder.gep(panel, [builder.mul(start, _whole(WIDTH))])

            def add_four(four: Any, dots: list[Any]) -> list[Any]:
                return products_of(builder, begins, codes, four, dots)

            dots = summed_in_loop(builder, _whole(0), _whole(group // 4), 1, [constant(lanes, 0)] * n_sums, add_four)
            scales = builder.gep(S, [builder.mul(number_of_group, _whole(2 * WIDTH))])
            new = []
            for r, address in enumerate(x_rows):
                pair = builder.gep(address, [builder.mul(number_of_group, _whole(2))])
                scale_x = splat_of(builder, builder.load(pair), LANES)
                sum_x = builder.fneg(splat_of(builder, builder.load(builder.gep(pair, [_whole(1)])), LANES))
                for number in range(VECTORS):
                    scale, zero = (
                        load_vector(builder, builder.gep(scales, [_whole(start + number * LANES)]), F32, LANES)
                        for start in (0, WIDTH)
                    )
                    index = r * VECTORS + number
                    dot = fused(builder, zero, sum_x, builder.sitofp(dots[index], VECTOR))
                    new.append(fused(builder, builder.fmul(scale, scale_x), dot, sums[index]))
            return new

        sums = summed_in_loop(builder, _whole(0), n_groups, 1, [constant(VECTOR, 0.0)] * n_sums, add_group)
        add_to_rows(builder, C_rows, sums, continues)

    return multiply_groups
