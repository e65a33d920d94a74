"""The inner loops of products with codes of 8 or 4 bits: integer arithmetic, exact within a group of inputs.

Inputs come in groups. A weight is scale * (code - zero), with one scale and one zero for each group of a row. A rounded
input is scale_x * q, with one scale_x for each group. Over a group

    sum of weight * x = scale * scale_x * (sum of code * q - zero * sum of q)

Both sums on the right are sums of integers. Processors multiply and add two int16 or four bytes at once. Floats come
only after a group. int16 inputs lie in the order 0, 2, 1, 3 in each four, so that neighbours meet the codes of the even
and of the odd bytes.
"""

from __future__ import annotations

import operator
from typing import Any

from numba import types

from mistral_kernels.pairs import add_dots, no_dots, total_of, widened_sums
from mistral_kernels.panel_codes import panel_codes
from mistral_kernels.processor import LANES
from mistral_kernels.stored import PLACE, Place, addresses_at
from mistral_kernels.tile import TILE_ROWS, VECTORS, WIDTH, store_sums, sums_before
from mistral_kernels.value import (
    ARRAY,
    F32,
    I8,
    I16,
    I32,
    I64,
    U8,
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

# As many rows of a tile as leave room for an integer and a float for each lane.
GROUP_ROWS = TILE_ROWS // 2


def code_products(sums: Value, codes: Value, x: list[Value], bits: int) -> Value:
    """Return sums, as no_dots begins them, plus the products of codes, four in each lane, with inputs.

    x   int16 even and odd, or int8 together
    """
    return add_dots(sums, codes, x, 2**bits - 1)


def words_of_four(inputs: str) -> int:
    """Return how many words of 32 bits hold four inputs."""
    return INPUTS[inputs].bits // 8


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
