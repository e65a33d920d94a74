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

import operator
from typing import Any

from numba import types

from mistral_kernels.pairs import add_dots, no_dots, total_of, widened_sums
from mistral_kernels.panel_codes import panel_codes, store_codes
from mistral_kernels.processor import LANES
from mistral_kernels.rows import AHEAD
from mistral_kernels.stored import PLACE, ROWS, Place, Rows, addresses_at, row_addresses, widened
from mistral_kernels.tile import TILE_ROWS, VECTORS, WIDTH, store_sums, sums_before
from mistral_kernels.value import (
    ARRAY,
    F32,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    Address,
    Dtype,
    FloatVectorType,
    Value,
    constant,
    fenced,
    fma,
    larger,
    loop,
    operation,
    where,
)

INPUTS: dict[str, Dtype] = {"int16": I16, "int8": I8}  # what inputs are rounded to
LARGEST = {"int16": 32767.0, "int8": 127.0}
EIGHT = FloatVectorType(8)
TILE_LANES = max(LANES, 8)  # of a vector of codes: the 8 rows of a tile, once or twice

# As many rows of a tile as leave room for an integer and a float for each lane.
GROUP_ROWS = TILE_ROWS // 2


def code_bytes(stored: Value, bits: int) -> list[Value]:
    """Return the vectors of codes that a vector of bytes holds: itself, or its lower and its upper halves."""
    return [stored] if bits == 8 else [stored & 15, stored >> 4]


def products(sums: Value, codes: Value, x: list[Value], bits: int) -> Value:
    """Return sums, as no_dots begins them, plus the products of codes, four in each lane, with inputs.

    x   int16 even and odd, or int8 together
    """
    return add_dots(sums, codes, x, 2**bits - 1)


def words_of_four(inputs: str) -> int:
    """Return how many words of 32 bits hold four inputs."""
    return INPUTS[inputs].bits // 8


def scales_at(address: Address, bits: int) -> tuple[Value, Value]:
    """Return the scales, without their unit, and the zeros of the 8 rows of a tile's group."""
    scale, zero = address.load(U8, 8), (address + 8).load(U8, 8)
    return widened(scale.to(U16) << 6, "f16"), zero.to(U32).to(F32) * 2.0 ** (bits - 8)


def rounding(inputs: str, group: int) -> Any:
    """Return the operation round_group(x, i, q, j): rounds the inputs of a group.

    x       float32; the group's begin at i
    q       int16 or int8; the group's begin at j

    It returns scale_x and the sum of q. scale_x = max |x| / 32767 (or 127), q = x / scale_x to the nearest, ties to
    even; 0 where that is too small for it.
    """
    order = [lane // 4 * 4 + (0, 2, 1, 3)[lane % 4] for lane in range(LANES)]
    dtype, most = INPUTS[inputs], LARGEST[inputs]

    def largest_magnitude(values: list[Value]) -> Value:
        """As integers, floats without their sign are in the same order, and NaN is the largest of all."""
        magnitude = constant(I32, 0, LANES)
        for value in values:
            magnitude = larger(magnitude, value.bits_as(I32) & 0x7FFFFFFF)
        return magnitude.combined(larger).bits_as(F32)

    def nearest(value: Value) -> Value:
        """Adding 1.5 * 2^23 rounds, and leaves the result in the lowest bits."""
        return (fenced(value) + 1.5 * 2**23).bits_as(I32).to(I16)

    @operation(types.UniTuple(types.float32, 2), ARRAY, types.intp, ARRAY, types.intp)
    def round_group(x: Address, i: Value, q: Address, j: Value) -> list[Value]:
        starts = range(0, group, LANES)
        values = [(x + (i + start)).load(F32, LANES) for start in starts]
        magnitude = largest_magnitude(values)
        times = most / magnitude
        times = where(times < float("inf"), times, 0.0)
        total = constant(I32, 0, LANES)
        for start, value in zip(starts, values, strict=True):
            rounded = nearest(value * times)
            total = total + rounded.to(I32)
            kept = rounded.chosen(order) if dtype is I16 else rounded.to(I8)
            (q + (j + start)).store(kept)
        return [magnitude / most, total.combined(operator.add).to(F32)]

    return round_group


def tile_groups(bits: int, inputs: str, group: int, n_tiles: int) -> tuple[Any, Any, Any]:
    """Return the operations on the sums of n tiles of codes.

    no_group_sums()                                         a tuple of n vectors of 8 zeros
    add_group(sums, W, tiles, S, scales, q, scales_x, i)    each sum plus what the group of inputs from i on gives
    store_group_sums(sums, y, offset)                       puts the sums of the tiles into y[offset : offset + 8 n]

    W       bytes of the codes; `tiles` says where tiles begin, in bytes
    S       bytes of the scales and zeros: 8 and 8 for each tile's group; `scales` says where those of tiles begin
    """
    sums_type = types.UniTuple(EIGHT, n_tiles)
    in_vector, per_byte = TILE_LANES // 8, 8 // bits  # tiles' rows of four codes in a vector; codes in a byte
    n_words, vector_bytes = words_of_four(inputs), 4 * TILE_LANES

    def inputs_for(q: Address, vector_number: int, half_byte: int) -> list[Value]:
        """Return what the codes of a vector, or of half of its bytes, are multiplied with."""
        words = []
        for word in range(n_words):
            # Of each half of the vector: the number of its four inputs, and of the word that holds this part of them.
            fours = [(vector_number * in_vector + half) * per_byte + half_byte for half in range(in_vector)]
            first, last = fours[0] * n_words + word, fours[-1] * n_words + word
            stored = (q + 4 * first).load(I32, last - first + 1)
            spread = stored.chosen([0 if lane < 8 else last - first for lane in range(TILE_LANES)])
            words.append(spread.bits_as(INPUTS[inputs]))
        return words

    def of_eight(dots: Value) -> Value:
        """Return the dots of 8 rows."""
        dots = total_of(dots, TILE_LANES)
        return dots if in_vector == 1 else dots.chosen(range(8)) + dots.chosen(range(8, 16))

    @operation(sums_type)
    def no_group_sums() -> list[Value]:
        return [constant(F32, 0.0, 8)] * n_tiles

    @operation(sums_type, sums_type, ARRAY, ROWS, ARRAY, ROWS, ARRAY, ARRAY, types.intp)
    def add_group(
        sums: tuple[Value, ...], W: Address, tiles: Rows, S: Address, scales: Rows, q: Address, scales_x: Address,
        i: Value,
    ) -> list[Value]:  # fmt: skip
        begin, number_of_group = (q + i).of(U8), i // group
        addresses = row_addresses(W, tiles, i * bits, U8, range(n_tiles))
        dots = [no_dots(TILE_LANES, n_words)] * n_tiles
        for vector_number in range(group * bits // vector_bytes):
            x = [inputs_for(begin, vector_number, half) for half in range(per_byte)]
            for number, address in enumerate(addresses):
                place = address + vector_bytes * vector_number
                place.prefetch(AHEAD)
                for half, codes in enumerate(code_bytes(place.load(U8, vector_bytes), bits)):
                    dots[number] = products(dots[number], codes, x[half], bits)
        scale_x, sum_x = ((scales_x + (number_of_group * 2 + n)).load(F32).spread(8) for n in (0, 1))
        new = []
        for number, address in enumerate(row_addresses(S, scales, number_of_group * 16, U8, range(n_tiles))):
            scale, zero = scales_at(address, bits)
            dot = fma(zero, -sum_x, of_eight(dots[number]).to(F32))
            new.append(fma(scale * scale_x, dot, sums[number]))
        return new

    @operation(types.void, sums_type, ARRAY, types.intp)
    def store_group_sums(sums: tuple[Value, ...], y: Address, offset: Value) -> None:
        for number, value in enumerate(sums):
            (y + (offset + 8 * number)).store(value)

    return no_group_sums, add_group, store_group_sums


def unpack(bits: int, inputs: str, ahead: int) -> tuple[Any, Any]:
    """Return the operations that put 8 inputs of a tile of codes, or the scales of a group, into a panel.

    The codes of the inputs that come `ahead` inputs later are asked for.

    unpack_codes(W, offset, panel, place)       the bytes from offset on become two times 8 rows of four codes, from
                                                place on
    unpack_scales(S, offset, panel, place)      scales and zeros become 8 floats each, at place and WIDTH further on
    """
    way = panel_codes(bits, inputs)

    @operation(types.void, ARRAY, types.intp, ARRAY, types.intp)
    def unpack_codes(W: Address, offset: Value, panel: Address, place: Value) -> None:
        address = W + offset
        address.prefetch(ahead * bits)
        stored = [(address + 32 * n).load(U8, 32) for n in range(bits // 4)]
        codes = stored if bits == 8 else code_bytes(stored[0], bits)
        store_codes(codes, panel + place, way)

    @operation(types.void, ARRAY, types.intp, ARRAY, types.intp)
    def unpack_scales(S: Address, offset: Value, panel: Address, place: Value) -> None:
        scale, zero = scales_at(S + offset, bits)
        (panel + place).store(scale)
        (panel + (place + WIDTH)).store(zero - float(way.zero))

    return unpack_codes, unpack_scales


def group_tile(bits: int, inputs: str, group: int, *, has_offsets: bool = False) -> Any:
    """Return the operation multiply_groups(q, a, scales_x, codes, scales, n_groups, C, c, continues).

        C[r, lane] += sum over groups of
            scale[lane] scale_x[r] (sum over the group of code[k, lane] q[r, k] - zero[lane] sum_x[r])

    for GROUP_ROWS rows and WIDTH lanes: an integer and a float for each stay in registers. With `has_offsets` weights
    are scale * code - offset, and the offset takes the place of scale * zero.

    q           int16 or int8; the Place a says where in it
    scales_x    float32: scale_x and sum_x of each of q's groups
    codes       a panel, as panel_codes has it: four inputs of each lane together
    scales      float32: scales and zeros, or offsets, of WIDTH lanes, group by group; zeros less the panel's own
    C           float32; the Place c says where in it
    continues   whether to add to what C holds
    """
    n_sums, n_words = GROUP_ROWS * VECTORS, words_of_four(inputs)
    way = panel_codes(bits, inputs)
    in_round = min(way.in_int16, group // 4) or 1

    def products_of(q_rows: list[Address], codes: Address, four: Value, sums: list[Value]) -> list[Value]:
        """Return the integer sums after four more inputs."""
        panel = codes + four * (4 * WIDTH * way.n_parts)
        vectors = [
            [(panel + (WIDTH * part + LANES * number) * 4).load(U8, 4 * LANES) for part in range(way.n_parts)]
            for number in range(VECTORS)
        ]
        new = []
        for r, address in enumerate(q_rows):
            place = address + four * (4 * n_words)
            words = [(place + 4 * word).load(I32).spread(LANES).bits_as(INPUTS[inputs]) for word in range(n_words)]
            new += [way.add(sums[r * VECTORS + number], parts, words) for number, parts in enumerate(vectors)]
        return new

    def round_of(q_rows: list[Address], codes: Address, four: Value, dots: list[Value]) -> list[Value]:
        """Return the integer sums after as many inputs as int16 can hold the sums of."""
        if not way.in_int16:
            return products_of(q_rows, codes, four, dots)
        sums = [constant(I16, 0, 2 * LANES)] * n_sums
        if in_round <= 2:
            for number in range(in_round):
                sums = products_of(q_rows, codes, four + number, sums)
        else:
            sums = loop(
                0, constant(I64, in_round), 1, sums,
                lambda number, sums: products_of(q_rows, codes, four + number, sums), stays=True,
            )  # fmt: skip
        return [widened_sums(dot, pairs) for dot, pairs in zip(dots, sums, strict=True)]

    def scaled(dots: list[Value], x_rows: list[Address], scales: Address, sums: list[Value]) -> list[Value]:
        """Return the sums of floats after a group, with its integer sums."""
        new = []
        for r, address in enumerate(x_rows):
            scale_x, sum_x = ((address + n).load(F32).spread(LANES) for n in (0, 1))
            for number in range(VECTORS):
                scale, zero = ((scales + (start + number * LANES)).load(F32, LANES) for start in (0, WIDTH))
                index = r * VECTORS + number
                dot, before = total_of(dots[index], LANES).to(F32), sums[index]
                if has_offsets:
                    before = fma(zero, -(scale_x * sum_x), before)
                else:
                    dot = fma(zero, -sum_x, dot)
                new.append(fma(scale * scale_x, dot, before))
        return new

    @operation(types.void, ARRAY, PLACE, ARRAY, ARRAY, ARRAY, types.intp, ARRAY, PLACE, types.boolean)
    def multiply_groups(
        q: Address, a: Place, scales_x: Address, codes: Address, scales: Address, n_groups: Value, C: Address,
        c: Place, continues: Value,
    ) -> None:  # fmt: skip
        q_rows = addresses_at(q, a, GROUP_ROWS)
        x_rows = addresses_at(scales_x, Place(a.first // group * 2, a.stride // group * 2), GROUP_ROWS)

        def add_group(number: Value, sums: list[Value]) -> list[Value]:
            start = number * group
            begins, panel = [(row + start).of(U8) for row in q_rows], codes + start * (WIDTH * way.n_parts)
            dots = loop(
                0, constant(I64, group // 4), in_round, [no_dots(LANES, n_words)] * n_sums,
                lambda four, dots: round_of(begins, panel, four, dots), stays=True,
            )  # fmt: skip
            return scaled(dots, [row + number * 2 for row in x_rows], scales + number * (2 * WIDTH), sums)

        # Group after group, as matvec_quantized sums them: a token gets the same bits with others as alone.
        C_rows = addresses_at(C, c, GROUP_ROWS)
        store_sums(C_rows, loop(0, n_groups, 1, sums_before(C_rows, VECTORS, continues), add_group))

    return multiply_groups
