"""The packed types of GGUF files, such as Q4_K: how codes, scales and offsets lie in a block.

A block holds 32 or 256 neighbours of a row, in groups of 16 or 32. Here the codes of every type are whole numbers, from
0 on, and

    weight = scale * (code - zero)          the scale is that of the weight's group, the zero that of the type
    weight = scale * code - minimum         in types with minimums, where the zero is 0

mistral_ref.block_matrix defines the same types in NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mistral_kernels.processor import FEATURES
from mistral_kernels.stored import widened
from mistral_kernels.value import F32, I8, I32, U8, U16, Address, Value, call, constant, where

VECTOR = 32  # codes that are unpacked at once

# Scales and minimums of the groups in a block: a vector each, or a number each if the block is one group. None: the
# type has no minimums.
Factors = tuple[Value, "Value | None"]


class Packing(NamedTuple):
    """How a type packs its weights.

    weights     number of weights in a block
    group       number of weights in a group
    bytes       bytes of a block
    bits        codes are below 2^bits
    zero        the code that stands for 0
    codes       codes(block, n) returns the codes 32 n, ..., 32 n + 31 of the block at an address, in order
    factors     factors(block) returns its scales and minimums
    has_minimums    whether groups have minimums
    """

    weights: int
    group: int
    bytes: int
    bits: int
    zero: int
    codes: Callable[[Address, int], Value]
    factors: Callable[[Address], Factors]
    has_minimums: bool = False

    @property
    def groups(self) -> int:
        """Number of groups in a block."""
        return self.weights // self.group


def _nibbles(place: Address) -> Value:
    """Return the lower halves of 16 bytes, then their upper halves."""
    stored = place.load(U8, 16)
    return (stored & 15).beside(stored >> 4)


def _field(place: Address, number: int, bits: int, run: int = VECTOR) -> Value:
    """Return 32 numbers of `bits` bits: those from 32 `number` on of runs as block_matrix._fields has them."""
    in_run, vectors = 8 // bits, run // VECTOR
    runs, rest = divmod(number, in_run * vectors)
    shift, vector = divmod(rest, vectors)
    stored = (place + (runs * run + vector * VECTOR)).load(U8, VECTOR)
    stored = stored >> (shift * bits) if shift else stored
    return stored if shift == in_run - 1 else stored & 2**bits - 1


def _bits(place: Address) -> Value:
    """Return the 32 bits of four bytes, as numbers of 0 or 1."""
    stored = place.load(I32).spread(VECTOR // 4).bits_as(U8).chosen([lane // 8 for lane in range(VECTOR)])
    chosen = stored & constant(U8, [1 << lane % 8 for lane in range(VECTOR)], VECTOR)
    return where(chosen > 0, constant(U8, 1, VECTOR), 0)


def _unit(place: Address) -> Value:
    """Return the float16 here."""
    return widened(place.load(U16), "f16")


def _times(unit: Value, numbers: Value) -> Value:
    """Return a unit times the whole numbers of groups, which is exact."""
    return numbers.to(I32).to(F32) * unit


def _only_scale(block: Address) -> Factors:
    """Return the scale of a block that is one group."""
    return _unit(block), None


def _both_units(block: Address) -> Factors:
    """Return the factors of Q4_1 and Q5_1, which store the minimum with the other sign."""
    return _unit(block), -_unit(block + 2)


def _scales_and_minimums(packed: Address) -> tuple[Value, Value]:
    """Return the scales and the minimums of 8 groups, of 6 bits each, as block_matrix has them."""
    first, second, halves = ((packed + start).load(U8, 4) for start in (0, 4, 8))
    scales = (first & 63).beside((halves & 15) | ((first >> 6) << 4))
    minimums = (second & 63).beside((halves >> 4) | ((second >> 6) << 4))
    return scales, minimums


def _factors_of_k(block: Address) -> Factors:
    """Return the factors of Q4_K and Q5_K."""
    scales, minimums = _scales_and_minimums(block + 4)
    return _times(_unit(block), scales), _times(_unit(block + 2), minimums)


def _factors_of_q2_k(block: Address) -> Factors:
    packed = block.load(U8, 16)
    return _times(_unit(block + 80), packed & 15), _times(_unit(block + 82), packed >> 4)


def _factors_of_q3_k(block: Address) -> Factors:
    low, high = (block + 96).load(U8, 8), (block + 104).load(U8, 4)
    low = (low & 15).beside(low >> 4)
    parts = [high & 3, (high >> 2) & 3, (high >> 4) & 3, high >> 6]
    high = parts[0].beside(parts[1]).beside(parts[2].beside(parts[3]))
    return _times(_unit(block + 108), ((low | (high << 4)) - 32).bits_as(I8)), None


def _factors_of_iq4_xs(block: Address) -> Factors:
    """The numbers of neighbouring groups are the halves of a byte, and their upper bits neighbours in another."""
    groups = range(8)
    low = (block + 4).load(U8, 4).chosen([group // 2 for group in groups])
    high = (block + 2).load(U8, 2).chosen([group // 4 for group in groups])
    low = where(constant(U8, [group % 2 for group in groups], 8) > 0, low >> 4, low & 15)
    high = (high >> constant(U8, [group % 4 * 2 for group in groups], 8)) & 3
    return _times(_unit(block), ((low | (high << 4)) - 32).bits_as(I8)), None


# The codes of these types are indices in this table; 128 stands for 0.
IQ4 = ("iq4_nl", "iq4_xs")
_IQ4_CODES = [1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241]


# What looks up indices in a table of 16 bytes, for vectors of 64 and 32 bytes, and the feature that it is part of.
_LOOK_UP = {64: ("llvm.x86.avx512.pshuf.b.512", "avx512bw"), 32: ("llvm.x86.avx2.pshuf.b", "avx2")}


def iq4_codes(indices: Value) -> Value:
    """Return the codes of IQ4_NL and IQ4_XS, for indices in their table."""
    n = indices.lanes
    name, feature = _LOOK_UP[n]
    if feature in FEATURES:
        return call(name, indices, constant(U8, _IQ4_CODES * (n // 16), n), indices)
    codes = constant(U8, _IQ4_CODES[0], n)
    for index, code in enumerate(_IQ4_CODES):
        codes = where(indices.equals(index), code, codes)
    return codes


def _factors_of_q6_k(block: Address) -> Factors:
    return _times(_unit(block + 208), (block + 192).load(I8, 16)), None


def _codes_of_q3_k(block: Address, n: int) -> Value:
    return _field(block + 32, n, 2) | (_field(block, n, 1) << 2)


def _codes_of_q5_k(block: Address, n: int) -> Value:
    return _field(block + 48, n, 4) | (_field(block + 16, n, 1) << 4)


def _codes_of_q6_k(block: Address, n: int) -> Value:
    return _field(block, n, 4, run=64) | (_field(block + 128, n, 2) << 4)


PACKINGS: dict[str, Packing] = {
    "q4_0": Packing(32, 32, 18, 4, 8, lambda block, _: _nibbles(block + 2), _only_scale),
    "q4_1": Packing(32, 32, 20, 4, 0, lambda block, _: _nibbles(block + 4), _both_units, has_minimums=True),
    "q5_0": Packing(32, 32, 22, 5, 16, lambda block, _: _nibbles(block + 6) | (_bits(block + 2) << 4), _only_scale),
    "q5_1": Packing(
        32, 32, 24, 5, 0, lambda block, _: _nibbles(block + 8) | (_bits(block + 4) << 4), _both_units, has_minimums=True
    ),
    "q8_0": Packing(32, 32, 34, 8, 128, lambda block, _: (block + 2).load(U8, VECTOR) + 128, _only_scale),
    "q2_k": Packing(256, 16, 84, 2, 0, lambda block, n: _field(block + 16, n, 2), _factors_of_q2_k, has_minimums=True),
    "q3_k": Packing(256, 16, 110, 3, 4, _codes_of_q3_k, _factors_of_q3_k),
    "q4_k": Packing(256, 32, 144, 4, 0, lambda block, n: _field(block + 16, n, 4), _factors_of_k, has_minimums=True),
    "q5_k": Packing(256, 32, 176, 5, 0, _codes_of_q5_k, _factors_of_k, has_minimums=True),
    "q6_k": Packing(256, 16, 210, 6, 32, _codes_of_q6_k, _factors_of_q6_k),
    "iq4_nl": Packing(32, 32, 18, 8, 128, lambda block, _: iq4_codes(_nibbles(block + 2)), _only_scale),
    "iq4_xs": Packing(
        256, 32, 136, 8, 128, lambda block, n: iq4_codes(_nibbles(block + (8 + 16 * n))), _factors_of_iq4_xs
    ),
}
