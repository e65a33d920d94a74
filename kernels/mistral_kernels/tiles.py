"""Tiles of codes, as layout.code_tiles has them: how kernels read them, and how they multiply them with inputs.

The codes of every kind are whole numbers, from 0 on. The 8 rows of a tile have two factors for each group of inputs:

    kind            weight                      factors, from the tile's bytes
    int8, int4      scale * (code - zero)       scale and zero: a byte each (see scale_and_zero), and a unit for all
    types of GGUF   scale * (code - zero)       scale: a whole number times the block's unit, a float16. The zero is the
                                                type's own
                    scale * code - minimum      minimum: as the scale, with a unit of its own

For types of GGUF the factors of a block of 32 or 256 inputs lie together: 8 units of scales, 8 units of minimums, and
then for each group 8 whole numbers of scales, and for each group 8 of minimums. A block that is one group has none of
these numbers: they are all 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types

from mistral_kernels.blocks import IQ4, PACKINGS, iq4_codes
from mistral_kernels.dots import EIGHT, INPUTS, code_products, words_of_four
from mistral_kernels.layout import PLANES, QUADS, TILE
from mistral_kernels.pairs import no_dots, total_of
from mistral_kernels.panel_codes import panel_codes, store_codes
from mistral_kernels.processor import LANES, LINE
from mistral_kernels.rows import AHEAD
from mistral_kernels.stored import ROWS, Rows, row_addresses, widened
from mistral_kernels.tile import WIDTH
from mistral_kernels.value import ARRAY, F32, I8, I32, U8, U16, U32, Address, Value, constant, fma, operation

AT_ONCE = 4 * QUADS  # inputs whose codes follow each other plane by plane


class Form(NamedTuple):
    """How tiles of a kind of matrix are packed.

    bits            of a code, as it is stored
    group           inputs that share a scale
    code_bits       codes are below 2^code_bits
    zero            the code that stands for 0, for kinds whose factors have no zero
    block           inputs whose factors lie together
    factor_bytes    bytes of these factors
    factors         factors(place, group) returns the scales of a group of the block, and its zeros, minimums or None
    has_minimums    whether the others are minimums
    code            code(stored) returns the codes that are stored so
    """

    bits: int
    group: int
    code_bits: int
    zero: int
    block: int
    factor_bytes: int
    factors: Callable[[Address, Value], tuple[Value, Value | None]]
    has_minimums: bool = False
    code: Callable[[Value], Value] = lambda stored: stored


def form_of(kind: str, group: int) -> Form:
    """Return how tiles of a kind are packed: "int8", "int4" with groups of some size, or a type of blocks.PACKINGS."""
    if kind.startswith("int"):
        bits = int(kind.removeprefix("int"))
        return Form(bits, group, bits, 0, group, 2 * TILE, lambda place, _: scale_and_zero(place, bits))
    packing = PACKINGS[kind]
    n_units, n_numbers = 1 + packing.has_minimums, packing.groups if packing.groups > 1 else 0

    def factor(place: Address, group: Value, which: int) -> Value:
        """Return the scales (which = 0) or minimums (1) of a group."""
        unit = widened((place + 2 * TILE * which).load(U16, TILE), "f16")
        if not n_numbers:
            return unit
        numbers = place + (2 * TILE * n_units + TILE * n_numbers * which)
        return (numbers + group * TILE).load(I8, TILE).to(I32).to(F32) * unit

    def factors(place: Address, group: Value) -> tuple[Value, Value | None]:
        scale = factor(place, group, 0)
        if not packing.has_minimums:
            return scale, None
        minimum = factor(place, group, 1)
        return scale, minimum if n_numbers else -minimum  # Q4_1 and Q5_1 store it with the other sign

    is_table = kind in IQ4
    return Form(
        bits=4 if is_table else packing.bits,
        group=packing.group,
        code_bits=packing.bits,
        zero=packing.zero,
        block=packing.weights,
        factor_bytes=n_units * TILE * (2 + n_numbers),
        factors=factors,
        has_minimums=packing.has_minimums,
        code=iq4_codes if is_table else lambda stored: stored,
    )


def scale_and_zero(place: Address, bits: int) -> tuple[Value, Value]:
    """Return the scales, without their unit, and the zeros of a tile's group in 8 or 4 bits.

    scale = 4 bits of exponent e and 4 of mantissa m, bits of a float16: (1 + m/16) 2^(e - 15), or m/16 2^-14 if e is 0
    zero = a byte / 2^(8 - bits)
    """
    scale, zero = place.load(U8, TILE), (place + TILE).load(U8, TILE)
    return widened(scale.to(U16) << 6, "f16"), zero.to(U32).to(F32) * 2.0 ** (bits - 8)


def _lanes(form: Form) -> int:
    """Return the lanes of a vector of codes: the 8 rows of a tile, or twice, if what shares bytes shares a scale."""
    twice = 2 * (8 // PLANES[form.bits][0]) * 4
    return max(LANES, TILE) if twice <= form.group else TILE


def _quads(form: Form, number: int, lanes: int) -> list[int]:
    """Return which quads of 32 inputs the vector of codes of this number holds, one for each 8 lanes."""
    in_byte, halves = 8 // PLANES[form.bits][0], lanes // TILE
    loaded, part = divmod(number, in_byte)
    return [(loaded * halves + half) * in_byte + part for half in range(halves)]


def _plane(place: Address, quads: list[int], width: int, below: int) -> Value:
    """Return the bits of a plane that some quads have, moved to where they belong in their codes, as words."""
    in_byte, lanes = 8 // width, TILE * len(quads)
    loaded = [quad // in_byte for quad in quads]
    words = (place + 4 * TILE * loaded[0]).load(U32, TILE * (loaded[-1] - loaded[0] + 1))
    if words.lanes < lanes:
        words = words.chosen([lane % TILE for lane in range(lanes)])
    if width == 8:
        return words
    moves = [quad % in_byte * width - below for quad in quads for _ in range(TILE)]  # to the right
    if min(moves) == max(moves):
        moved = words >> moves[0] if moves[0] > 0 else words << -moves[0] if moves[0] else words
    else:
        moved = (words >> constant(U32, [max(move, 0) for move in moves], lanes)) << constant(
            U32, [max(-move, 0) for move in moves], lanes
        )
    return moved & ((2**width - 1) << below) * 0x01010101


def _codes(place: Address, form: Form, number: int, lanes: int) -> Value:
    """Return a vector of codes of the 32 inputs at a place in a tile: four of a row in each lane."""
    quads, below, words = _quads(form, number, lanes), 0, None
    for width in PLANES[form.bits]:
        plane = _plane(place, quads, width, below)
        words = plane if words is None else words | plane
        place, below = place + 4 * TILE * width, below + width
    assert words is not None
    return form.code(words.bits_as(U8))


def tile_groups(form: Form, inputs: str, n_tiles: int, n_tokens: int) -> tuple[Any, Any, Any]:
    """Return the operations on the sums of n tiles of codes with the inputs of n tokens.

    no_group_sums()                                         a tuple of vectors of 8 zeros, one for each tile and token
    add_groups(sums, W, tiles, S, factors, q, tokens, scales_x, x_rows, i)
                                                            each sum plus what the inputs from i on give: a group, or
                                                            32 inputs if a group is smaller
    store_group_sums(sums, y)                               puts the sums into y, tile after tile

    W, S        bytes of the codes, and of the factors; `tiles` and `factors` say where those of tiles begin
    q           inputs, rounded to int16 or int8; `tokens` says where those of tokens begin
    scales_x    scale_x and the sum of q of each group; `x_rows` says where those of tokens begin
    """
    n_sums, n_words, lanes = n_tiles * n_tokens, words_of_four(inputs), _lanes(form)
    sums_type = types.UniTuple(EIGHT, n_sums)
    at_once = max(form.group, AT_ONCE)

    def inputs_of(q: Address, quads: list[int]) -> list[Value]:
        """Return what a vector of codes is multiplied with."""
        words = []
        for word in range(n_words):
            first, last = quads[0] * n_words + word, quads[-1] * n_words + word
            stored = (q + 4 * first).load(I32, last - first + 1)
            spread = stored.chosen([0 if lane < TILE else last - first for lane in range(lanes)])
            words.append(spread.bits_as(INPUTS[inputs]))
        return words

    def dots_of(addresses: list[Address], q_rows: list[Address], number_of_group: int) -> list[Value]:
        """Return the sums of integers of a group, tile after tile."""
        dots = [no_dots(lanes, n_words)] * n_sums
        for start in range(0, at_once, AT_ONCE):
            for number in range(QUADS * TILE // lanes):
                quads = _quads(form, number, lanes)
                if (start + 4 * quads[0]) // form.group != number_of_group:
                    continue
                x = [inputs_of(q + start * n_words, quads) for q in q_rows]
                for tile, address in enumerate(addresses):
                    codes = _codes(address + start * form.bits, form, number, lanes)
                    for token in range(n_tokens):
                        at = tile * n_tokens + token
                        dots[at] = code_products(dots[at], codes, x[token], form.code_bits)
        return [of_eight(total_of(one, lanes)).to(F32) for one in dots]

    def of_eight(dots: Value) -> Value:
        return dots if lanes == TILE else dots.chosen(range(TILE)) + dots.chosen(range(TILE, lanes))

    @operation(sums_type)
    def no_group_sums() -> list[Value]:
        return [constant(F32, 0.0, TILE)] * n_sums

    @operation(sums_type, sums_type, ARRAY, ROWS, ARRAY, ROWS, ARRAY, ROWS, ARRAY, ROWS, types.intp)
    def add_groups(
        sums: tuple[Value, ...], W: Address, tiles: Rows, S: Address, factors: Rows, q: Address, tokens: Rows,
        scales_x: Address, x_rows: Rows, i: Value,
    ) -> list[Value]:  # fmt: skip
        q_rows = row_addresses(q, tokens, i, INPUTS[inputs], range(n_tokens))
        x_groups = row_addresses(scales_x, x_rows, i // form.group * 2, F32, range(n_tokens))
        addresses = row_addresses(W, tiles, i * form.bits, U8, range(n_tiles))
        places = row_addresses(S, factors, i // form.block * form.factor_bytes, U8, range(n_tiles))
        for address in addresses:
            for line in range(0, at_once * form.bits, LINE):
                address.prefetch(AHEAD + line)
        new = list(sums)
        for group in range(at_once // form.group):
            dots = dots_of(addresses, q_rows, group)
            x = [[(row.of(F32) + (2 * group + n)).load(F32).spread(TILE) for n in (0, 1)] for row in x_groups]
            for tile, place in enumerate(places):
                scale, other = form.factors(place, i % form.block // form.group + group)
                for token, (scale_x, sum_x) in enumerate(x):
                    at = tile * n_tokens + token
                    new[at] = _with_group(form, new[at], dots[at], scale, other, scale_x, sum_x)
        return new

    @operation(types.void, sums_type, ARRAY)
    def store_group_sums(sums: tuple[Value, ...], y: Address) -> None:
        for number, value in enumerate(sums):
            (y + TILE * number).store(value)

    return no_group_sums, add_groups, store_group_sums


def _with_group(
    form: Form, before: Value, dot: Value, scale: Value, other: Value | None, scale_x: Value, sum_x: Value
) -> Value:
    """Return a sum and what a group adds to it: as dots.group_tile does, to the bit."""
    if form.has_minimums:
        assert other is not None
        before = fma(other, -(scale_x * sum_x), before)
    elif other is not None or form.zero:
        dot = fma(float(form.zero) if other is None else other, -sum_x, dot)
    return fma(scale * scale_x, dot, before)


def unpack(form: Form, inputs: str, ahead: int) -> tuple[Any, Any]:
    """Return the operations that put 32 inputs of a tile of codes, or the factors of a group, into a panel.

    The codes of the inputs that come `ahead` inputs later are asked for.

    unpack_codes(W, offset, panel, place)               the bytes from offset on become 8 times 8 rows of four codes,
                                                        from place on
    unpack_factors(S, offset, group, panel, place)      the factors of a group of the block whose factors begin at
                                                        offset become 8 floats each, at place and WIDTH further on
    """
    way = panel_codes(form.code_bits, inputs)

    @operation(types.void, ARRAY, types.intp, ARRAY, types.intp)
    def unpack_codes(W: Address, offset: Value, panel: Address, place: Value) -> None:
        address = W + offset
        for line in range(0, AT_ONCE * form.bits, LINE):
            address.prefetch(ahead * form.bits + line)
        store_codes([_codes(address, form, quad, TILE) for quad in range(QUADS)], panel + place, way)

    @operation(types.void, ARRAY, types.intp, types.intp, ARRAY, types.intp)
    def unpack_factors(S: Address, offset: Value, group: Value, panel: Address, place: Value) -> None:
        scale, other = form.factors(S + offset, group)
        if other is None:
            other = constant(F32, float(form.zero), TILE)
        if not form.has_minimums:
            other = other - float(way.zero)
        (panel + place).store(scale)
        (panel + (place + WIDTH)).store(other)

    return unpack_codes, unpack_factors
