"""How codes lie in a panel, and how they meet the inputs of many tokens.

A code is unpacked once, and then multiplied once for each token. So what can be done to it beforehand is done when the
panel is filled:

    inputs  processor                   in the panel                            with each token
    int16   x86                         even codes and odd ones, as int16       two products of pairs
    int8    x86 that multiplies two     codes of up to 6 bits as they are       pairs, summed in int16 while they fit
            bytes, but not four         others less 128, and their magnitudes   inputs get the signs; pairs
    both    others                      as they are                             pairs.add_dots
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mistral_kernels.pairs import add_dots, multiplies_bytes_in_pairs, pair_dots, pairs_of_bytes, widened_sums
from mistral_kernels.processor import IS_ARM, LANES
from mistral_kernels.tile import WIDTH
from mistral_kernels.value import I8, I16, U8, U16, Address, Value, call, where

# What gives bytes the signs of others, for vectors of 8 and 4 lanes.
_WITH_SIGNS = {8: "llvm.x86.avx2.psign.b", 4: "llvm.x86.ssse3.psign.b.128"}


class PanelCodes(NamedTuple):
    """How codes lie in a panel.

    parts       parts(codes) returns the vectors that stand for a vector of codes
    n_parts     how many these are
    add         add(sums, parts, x) returns sums plus the products, four in each lane; x as pairs.add_dots has it
    in_int16    after how many times int16 sums, two in each lane, may overflow. 0: sums are int32, as pairs.no_dots
                begins them
    zero        what is taken from each code first
    """

    parts: Callable[[Value], list[Value]]
    n_parts: int
    add: Callable[[Value, list[Value], list[Value]], Value]
    in_int16: int = 0
    zero: int = 0


def panel_codes(bits: int, inputs: str) -> PanelCodes:
    """Return how codes of some bits lie in a panel for inputs rounded to "int16" or "int8"."""
    largest = 2**bits - 1
    if not IS_ARM and inputs == "int16":
        return PanelCodes(_even_and_odd, 2, _add_words)
    if not IS_ARM and multiplies_bytes_in_pairs(LANES):
        if largest <= 64:
            return PanelCodes(_alone, 1, _add_pairs, in_int16=(2**15 - 1) // (2 * largest * 127))
        return PanelCodes(_signed_and_magnitudes, 2, _add_signed, zero=128)
    return PanelCodes(_alone, 1, lambda sums, parts, x: add_dots(sums, parts[0], x, largest))


def store_codes(fours: list[Value], panel: Address, way: PanelCodes) -> None:
    """Put codes of 8 rows into a panel: vectors of four of each row, which follow each other in the rows."""
    parts = [part for four in fours for part in way.parts(four)]
    for number, part in enumerate(parts):
        (panel + 4 * WIDTH * number).store(part)


def _alone(codes: Value) -> list[Value]:
    return [codes]


def _even_and_odd(codes: Value) -> list[Value]:
    words = codes.bits_as(U16)
    return [(words & 0xFF).bits_as(U8), (words >> 8).bits_as(U8)]


def _add_words(sums: Value, parts: list[Value], x: list[Value]) -> Value:
    for codes, word in zip(parts, x, strict=True):
        sums = pair_dots(sums, codes.bits_as(I16), word)
    return sums


def _add_pairs(sums: Value, parts: list[Value], x: list[Value]) -> Value:
    return sums + pairs_of_bytes(parts[0], x[0])


def _signed_and_magnitudes(codes: Value) -> list[Value]:
    """Return codes less 128, and their magnitudes: two of these times 127 fit int16, two codes of 255 do not."""
    signed = codes + 128
    return [signed, where(signed.bits_as(I8) < 0, -signed, signed)]


def _add_signed(sums: Value, parts: list[Value], x: list[Value]) -> Value:
    signed, magnitudes = parts[0].bits_as(I8), parts[1]
    name = _WITH_SIGNS.get(sums.lanes)
    with_signs = call(name, x[0], x[0], signed) if name else where(signed < 0, -x[0], x[0])
    return widened_sums(sums, pairs_of_bytes(magnitudes, with_signs))
