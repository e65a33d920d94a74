"""How numbers lie in memory, and how they become float32.

KINDS       f32, f16, bf16 (the upper half of a float32), fp8 (e4m3), int8 (the caller knows its scale), and pairs:
two neighbours of bf16, multiplied and added at once. In registers a pair takes the place of a float32
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from numba import types

from mistral_kernels.processor import HAS_F16
from mistral_kernels.value import F16, F32, I8, I16, I32, U8, U16, U32, Address, Dtype, Value, where

KINDS = {"f32": F32, "f16": U16, "bf16": U16, "fp8": U8, "int8": I8, "pairs": F32}


def size_of(kind: str) -> int:
    """Return the bytes of a number of a kind."""
    return KINDS[kind].bits // 8


class Layout(NamedTuple):
    """The fields of a small float: the bit of its sign, the bits of its mantissa, and what its exponents are off by."""

    sign_bit: int
    mantissa: int
    bias: int
    special: int  # the first magnitude, sign apart, that stands for infinity or NaN


_LAYOUTS = {"f16": Layout(15, 10, 15, 31 << 10), "fp8": Layout(7, 3, 7, 0x7F)}


def widened(stored: Value, kind: str) -> Value:
    """Return stored numbers of a kind as float32, exactly."""
    if kind in ("f32", "pairs"):
        return stored
    if kind == "int8":
        return stored.to(I32).to(F32)
    if kind == "bf16":
        return (stored.to(U32) << 16).bits_as(F32)
    if not HAS_F16:
        return _rebuilt(stored, _LAYOUTS[kind])
    return stored.bits_as(F16).to(F32) if kind == "f16" else _by_half(stored)


def _by_half(stored: Value) -> Value:
    """Return fp8 as float32, by way of float16, whose exponent has one bit more.

    The sign moves to the left end, and the rest to one bit right of it. That makes the number 2^8 too small.
    """
    bits = (stored.to(U16).bits_as(I16) << 8) >> 1  # doubles the sign
    bits = where((stored & 0x7F).equals(0x7F), 0x7E00, bits & 0xBFFF)
    return bits.bits_as(F16).to(F32) * 256.0


def _rebuilt(stored: Value, layout: Layout) -> Value:
    """Return small floats as float32: sign, exponent and mantissa move to where float32 has them."""
    bits = stored.to(U32)
    sign = (bits >> layout.sign_bit) << 31
    magnitude = bits & (1 << layout.sign_bit) - 1
    moved = magnitude << 23 - layout.mantissa
    normal = moved + ((127 - layout.bias) << 23)
    tiny = magnitude.to(F32) * 2.0 ** (1 - layout.bias - layout.mantissa)
    value = where(magnitude < (1 << layout.mantissa), tiny.bits_as(U32), normal)
    is_special = magnitude >= layout.special
    return (where(is_special, moved | 0x7F800000, value) | sign).bits_as(F32)


def rounded_to_bf16(floats: Value) -> Value:
    """Return float32 rounded to the nearest bf16, ties to even; NaN stays NaN."""
    bits = floats.bits_as(U32)
    is_odd = (bits >> 16) & 1
    nearest = where(floats.is_nan(), bits | 0x400000, bits + (is_odd + 0x7FFF))
    return (nearest >> 16).to(U16)


class Rows(NamedTuple):
    """Where rows of a matrix begin, in numbers: row 0, how far it is to the next, and the last row that exists."""

    first: Any
    stride: Any
    last: Any


class Place(NamedTuple):
    """Where in an array a matrix lies, in numbers: its row 0, and how far it is to the next row."""

    first: Any
    stride: Any


ROWS, PLACE = types.NamedUniTuple(types.intp, 3, Rows), types.NamedUniTuple(types.intp, 2, Place)


def addresses_at(array: Address, place: Place, n_rows: int) -> list[Address]:
    """Return where each of n rows of a matrix begins."""
    return [array + (place.first + place.stride * row) for row in range(n_rows)]


def row_addresses(matrix: Address, rows: Rows, column: Value, dtype: Dtype, numbers: Iterable[int]) -> list[Address]:
    """Return where a column lies in the rows of these numbers; rows beyond the last one are that one again."""
    addresses = []
    for number in numbers:
        offset = rows.first + rows.stride * number
        offset = where(offset < rows.last, offset, rows.last)
        addresses.append(matrix.of(U8) + (offset + column) * (dtype.bits // 8))
    return addresses
