"""Sums of products of codes by NEON, in integers: exact.

To add neighbours takes as long as to multiply them. So sums lie in two vectors, of which `total_of` makes one:

    inputs  with dotprod                                        without
    int16   of the products with the inputs' lower bytes,       of even products,
            and of those with their upper bytes                 and of odd ones, lane by lane
    int8    one vector is enough                                as int16

Instructions of dotprod multiply signed bytes, or unsigned ones; those of i8mm multiply unsigned with signed ones.
"""

from __future__ import annotations

from mistral_kernels.processor import FEATURES
from mistral_kernels.value import I8, I16, I32, U8, U16, Value, call, constant

_HAS_DOTS, _HAS_MIXED_DOTS = "dotprod" in FEATURES, "i8mm" in FEATURES


def no_dots(lanes: int, n_words: int) -> Value:
    """Return sums of 0, for inputs of which four are n words of 32 bits."""
    return constant(I32, 0, lanes if _HAS_DOTS and n_words == 1 else 2 * lanes)


def total_of(sums: Value, lanes: int) -> Value:
    """Return sums as one vector."""
    if sums.lanes == lanes:
        return sums
    if _HAS_DOTS:
        return _half(sums, 0) + (_half(sums, 1) << 8)
    return sums.chosen(range(0, 2 * lanes, 2)) + sums.chosen(range(1, 2 * lanes, 2))


def add_dots(sums: Value, codes: Value, x: list[Value], largest: int) -> Value:
    """Return sums plus the products of codes of up to `largest`, four in each lane, with int16 or int8 inputs.

    x   int16 even and odd, or int8 together
    """
    if not _HAS_DOTS:
        return _add_plainly(sums, codes, x, largest)
    if len(x) == 1:
        return _mixed_dots(sums, codes, x[0], largest)
    even, odd = (word.bits_as(U8) for word in x)
    low, high = (
        even.chosen([half + byte for byte in range(0, even.lanes, 2) for half in (first, first + even.lanes)], odd)
        for first in (0, 1)
    )
    of_low = _dots("udot", _half(sums, 0), codes, low)
    return of_low.beside(_mixed_dots(_half(sums, 1), codes, high.bits_as(I8), largest))


def _mixed_dots(sums: Value, codes: Value, x: Value, largest: int) -> Value:
    """Return sums plus the products of unsigned codes with signed bytes, four in each lane."""
    if _HAS_MIXED_DOTS:
        return _dots("usdot", sums, codes, x)
    if largest <= 127:
        return _dots("sdot", sums, codes, x)
    # code x = (code - 128) x - (-128) x
    correction = _dots("sdot", constant(I32, 0, sums.lanes), constant(I8, -128, x.lanes), x)
    return _dots("sdot", sums - correction, codes - 128, x)


def _add_plainly(sums: Value, codes: Value, x: list[Value], largest: int) -> Value:
    if len(x) == 1 and largest <= 127:
        products = codes.bits_as(I8).to(I16) * x[0].to(I16)
        return sums + _sums_of_neighbours(products)
    words = codes.bits_as(U16)
    even, odd = (words & 0xFF).bits_as(I16), (words >> 8).bits_as(I16)
    if len(x) == 1:
        pairs = x[0].bits_as(I16)
        x = [(pairs << 8) >> 8, pairs >> 8]
    return sums + even.to(I32) * x[0].to(I32) + odd.to(I32) * x[1].to(I32)


def _sums_of_neighbours(products: Value) -> Value:
    """Return the sums of two int16 each, as int32."""
    if products.lanes == 8:
        return call("llvm.aarch64.neon.saddlp.v4i32.v8i16", constant(I32, 0, 4), products)
    first, second = (_sums_of_neighbours(_half(products, number)) for number in (0, 1))
    return first.beside(second)


def _dots(name: str, sums: Value, a: Value, b: Value) -> Value:
    """Return sums plus the products of bytes, four in each lane, by an instruction for four lanes."""
    if sums.lanes == 4:
        return call(f"llvm.aarch64.neon.{name}.v4i32.v16i8", sums, sums, a, b)
    first, second = (_dots(name, *(_half(value, number) for value in (sums, a, b))) for number in (0, 1))
    return first.beside(second)


def _half(value: Value, number: int) -> Value:
    lanes = value.lanes // 2
    return value.chosen(range(number * lanes, (number + 1) * lanes))
