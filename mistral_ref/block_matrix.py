"""Matrices in the packed types of GGUF files, such as Q4_K: the bytes stay as they lie in the file.

Each row is cut into blocks of 32 or 256 neighbouring weights, and each block into groups of 16 or 32. In every type

    weight = scale * code - minimum         scale and minimum are those of the weight's group

    code        a whole number. The types whose names begin with IQ4 store its index in a table
    scale       scale_unit * a whole number; the block has one scale_unit, a float16
    minimum     minimum_unit * a whole number; the block has one minimum_unit, a float16. Most types have no minimum.
                Q4_1 and Q5_1 store it with the other sign, so their whole number is -1

Each operation is rounded to float32. The types are defined by the code of ggml, the library of
llama.cpp. "K" types have blocks of 256 weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from mistral_ref.weights import BlockKind, Matrix, Rows

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)


class Blocks(NamedTuple):
    """The numbers that the blocks of R rows store: B blocks in a row, G groups in a block, N weights in a group.

    codes           int8 (R, B, G, N)
    scale_unit      float16 (R, B)
    scales          int8 (R, B, G)
    minimum_unit    float16 (R, B); None: the type has no minimums
    minimums        int8 (R, B, G); None: the type has no minimums
    """

    codes: np.ndarray
    scale_unit: np.ndarray
    scales: np.ndarray
    minimum_unit: np.ndarray | None = None
    minimums: np.ndarray | None = None


class BlockType(NamedTuple):
    """How a type packs its weights.

    weights     number of weights in a block
    group_size  number of weights in a group
    values      the code that each stored number stands for, in ascending order: int8 (2^bits,)
    fields      bytes of each part of a block, in the order of the file
    unpack      takes the parts of blocks (..., bytes) and returns their Blocks, with codes (..., weights)
    has_minimums
    """

    weights: int
    group_size: int
    values: np.ndarray
    fields: tuple[int, ...]
    unpack: Callable[..., Blocks]
    has_minimums: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of a block."""
        return sum(self.fields)

    @property
    def groups(self) -> int:
        """Number of groups in a block."""
        return self.weights // self.group_size

    @property
    def bits(self) -> int:
        """Bits of a code, as it is stored."""
        return len(self.values).bit_length() - 1

    def stored(self, codes: np.ndarray) -> np.ndarray:
        """Return the numbers, uint8, that are stored for codes."""
        numbers = np.zeros(256, np.uint8)  # for the bits of each int8
        numbers[self.values.view(np.uint8)] = np.arange(len(self.values))
        found: np.ndarray = numbers[codes.view(np.uint8)]
        return found


@dataclass(frozen=True, eq=False, repr=False)
class BlockMatrix(Matrix):
    """A matrix in a packed type of a GGUF file.

    kind    the type in small letters: "q4_k"
    data    the blocks as they lie in the file, uint8 (O, blocks in a row, bytes of a block), read-only
    """

    kind: BlockKind

    @cached_property
    def type(self) -> BlockType:
        """How the weights are packed."""
        return BLOCK_TYPES[self.kind]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return self.data.shape[0], self.data.shape[1] * self.type.weights

    @cached_property
    def group_size(self) -> int:
        """How many neighbouring weights in a row share a scale and a minimum."""
        return self.type.group_size

    def blocks(self, index: Rows) -> Blocks:
        """Return the numbers that the rows at `index` store."""
        parts = np.split(self.data[index], list(accumulate(self.type.fields))[:-1], axis=-1)
        found = self.type.unpack(*parts)
        return found._replace(codes=found.codes.reshape(*found.scales.shape, self.group_size))

    def rows(self, index: Rows, dtype: DTypeLike) -> np.ndarray:
        """Return the rows at `index` as floats (R, I) of `dtype`. The weights are those of float32, also in float64."""
        blocks = self.blocks(index)
        with np.errstate(invalid="ignore"):  # a scale may be infinite or NaN
            values = blocks.codes * group_factors(blocks.scale_unit, blocks.scales)[..., np.newaxis]
            if blocks.minimum_unit is not None and blocks.minimums is not None:
                values -= group_factors(blocks.minimum_unit, blocks.minimums)[..., np.newaxis]
        return values.reshape(len(values), self.shape[1]).astype(dtype, copy=False)


def group_factors(unit: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Return the scale or the minimum of each group, unit * number, as float32 (R, B, G). The product is exact."""
    return numbers * unit[..., np.newaxis].astype(np.float32)


def _fields(packed: np.ndarray, run: int, bits: int) -> np.ndarray:
    """Return the numbers of `bits` bits that are packed in bytes, uint8 (..., n).

    Each `run` bytes hold 8 / bits runs of as many numbers: first the lowest bits of all these bytes, then the next.

    >>> _fields(np.array([0x21, 0x43, 0x65, 0x87], np.uint8), 2, 4).tolist()
    [1, 3, 2, 4, 5, 7, 6, 8]
    """
    *around, n_bytes = packed.shape
    runs = packed.reshape(*around, n_bytes // run, 1, run)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, np.newaxis]
    numbers = (runs >> shifts) & np.uint8(2**bits - 1)
    return numbers.reshape(*around, n_bytes * 8 // bits)


def _signed(codes: np.ndarray, zero: int) -> np.ndarray:
    """Return codes minus the code that stands for 0, as int8."""
    return (codes - np.uint8(zero)).view(np.int8)


def _unit(packed: np.ndarray) -> np.ndarray:
    """Return the float16 (...) in two bytes (..., 2)."""
    return np.ascontiguousarray(packed).view("<f2")[..., 0]


def _one_group(codes: np.ndarray, d: np.ndarray, m: np.ndarray | None = None) -> Blocks:
    """Return blocks of one group: its scale is d, its minimum -m."""
    ones = np.ones((*d.shape[:-1], 1), np.int8)
    return Blocks(codes, _unit(d), ones) if m is None else Blocks(codes, _unit(d), ones, _unit(m), -ones)


# A function for each type. The parts of a block have the names of ggml: d, m, dmin are the float16 units; qs or ql has
# the low bits of the codes, qh or hmask the high bits; scales, scales_l and scales_h have the whole numbers of scales.


def _q4_0(d: np.ndarray, qs: np.ndarray) -> Blocks:
    return _one_group(_signed(_fields(qs, 16, 4), 8), d)


def _q4_1(d: np.ndarray, m: np.ndarray, qs: np.ndarray) -> Blocks:
    return _one_group(_signed(_fields(qs, 16, 4), 0), d, m)


def _q5_0(d: np.ndarray, qh: np.ndarray, qs: np.ndarray) -> Blocks:
    return _one_group(_signed(_fields(qs, 16, 4) | _fields(qh, 1, 1) << 4, 16), d)


def _q5_1(d: np.ndarray, m: np.ndarray, qh: np.ndarray, qs: np.ndarray) -> Blocks:
    return _one_group(_signed(_fields(qs, 16, 4) | _fields(qh, 1, 1) << 4, 0), d, m)


def _q8_0(d: np.ndarray, qs: np.ndarray) -> Blocks:
    return _one_group(qs.view(np.int8), d)


def _q2_k(scales: np.ndarray, qs: np.ndarray, d: np.ndarray, dmin: np.ndarray) -> Blocks:
    codes = _signed(_fields(qs, 32, 2), 0)
    return Blocks(codes, _unit(d), _signed(scales & 15, 0), _unit(dmin), _signed(scales >> 4, 0))


def _q3_k(hmask: np.ndarray, qs: np.ndarray, scales: np.ndarray, d: np.ndarray) -> Blocks:
    codes = _fields(qs, 32, 2) | _fields(hmask, 32, 1) << 2
    numbers = _fields(scales[..., :8], 8, 4) | _fields(scales[..., 8:], 4, 2) << 4
    return Blocks(_signed(codes, 4), _unit(d), _signed(numbers, 32))


def _q4_k(d: np.ndarray, dmin: np.ndarray, packed: np.ndarray, qs: np.ndarray) -> Blocks:
    scales, minimums = _scales_and_minimums(packed)
    return Blocks(_signed(_fields(qs, 32, 4), 0), _unit(d), scales, _unit(dmin), minimums)


def _q5_k(d: np.ndarray, dmin: np.ndarray, packed: np.ndarray, qh: np.ndarray, qs: np.ndarray) -> Blocks:
    scales, minimums = _scales_and_minimums(packed)
    codes = _fields(qs, 32, 4) | _fields(qh, 32, 1) << 4
    return Blocks(_signed(codes, 0), _unit(d), scales, _unit(dmin), minimums)


def _scales_and_minimums(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the scales and the minimums of 8 groups, int8 (..., 8) with values below 64, from 12 bytes.

    Four bytes hold six bits of the first four scales each, four those of the first four minimums. Their upper two bits,
    and the halves of the last four bytes, are those of the other groups.
    """
    first, second, halves = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = np.concatenate([first & 63, halves & 15 | first >> 6 << 4], axis=-1)
    minimums = np.concatenate([second & 63, halves >> 4 | second >> 6 << 4], axis=-1)
    return scales.view(np.int8), minimums.view(np.int8)


def _q6_k(ql: np.ndarray, qh: np.ndarray, scales: np.ndarray, d: np.ndarray) -> Blocks:
    codes = _fields(ql, 64, 4) | _fields(qh, 32, 2) << 4
    return Blocks(_signed(codes, 32), _unit(d), scales.view(np.int8))


def _iq4_nl(d: np.ndarray, qs: np.ndarray) -> Blocks:
    return _one_group(_IQ4_VALUES[_fields(qs, 16, 4)], d)


def _iq4_xs(d: np.ndarray, scales_h: np.ndarray, scales_l: np.ndarray, qs: np.ndarray) -> Blocks:
    numbers = _fields(scales_l, 1, 4) | _fields(scales_h, 1, 2) << 4
    return Blocks(_IQ4_VALUES[_fields(qs, 16, 4)], _unit(d), _signed(numbers, 32))


def _from(least: int, bits: int) -> np.ndarray:
    """Return the 2^bits whole numbers from `least` on, int8."""
    return np.arange(least, least + 2**bits).astype(np.int8)


BLOCK_TYPES: dict[BlockKind, BlockType] = {
    "q4_0": BlockType(32, 32, _from(-8, 4), (2, 16), _q4_0),
    "q4_1": BlockType(32, 32, _from(0, 4), (2, 2, 16), _q4_1, has_minimums=True),
    "q5_0": BlockType(32, 32, _from(-16, 5), (2, 4, 16), _q5_0),
    "q5_1": BlockType(32, 32, _from(0, 5), (2, 2, 4, 16), _q5_1, has_minimums=True),
    "q8_0": BlockType(32, 32, _from(-128, 8), (2, 32), _q8_0),
    "q2_k": BlockType(256, 16, _from(0, 2), (16, 64, 2, 2), _q2_k, has_minimums=True),
    "q3_k": BlockType(256, 16, _from(-4, 3), (32, 64, 12, 2), _q3_k),
    "q4_k": BlockType(256, 32, _from(0, 4), (2, 2, 12, 128), _q4_k, has_minimums=True),
    "q5_k": BlockType(256, 32, _from(0, 5), (2, 2, 12, 32, 128), _q5_k, has_minimums=True),
    "q6_k": BlockType(256, 16, _from(-32, 6), (128, 64, 16, 2), _q6_k),
    "iq4_nl": BlockType(32, 32, _IQ4_VALUES, (2, 16), _iq4_nl),
    "iq4_xs": BlockType(256, 32, _IQ4_VALUES, (2, 2, 4, 128), _iq4_xs),
}
