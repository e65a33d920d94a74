"""Matrices of 8 or 4 bits a weight.

A row is cut into groups of neighbours, which share a scale and a zero:

    weight = scale * (code - zero)

    code    bits wide, 0 to 2^bits - 1
    zero    a byte in units of 2^(bits - 8): a whole number for 8 bits, sixteenths for 4
    scale   a byte, 4 bits of exponent e and 4 of mantissa m, times a unit, a power of two for the whole matrix:
            (1 + m/16) 2^(e - 15) unit, or m/16 2^-14 unit where e is 0

so groups of 32 cost half a bit a weight, as in llama.cpp's Q8_0 and Q4_0, which have a scale of 16 bits and no zero.
How weights are rounded, files/rounding.py says; how the inputs that they are multiplied with are, activations.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
from numpy.typing import DTypeLike

from mistral_kernels.layout import TILE, codes_of_tiles
from mistral_ref.weights import Matrix, Rows

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 32  # unless another is asked for


@cache
def scale_values() -> np.ndarray:
    """Return what the 256 codes of a scale stand for, in units, float32.

    >>> scale_values()[[0, 1, 8 * 16, 255]].tolist() == [0.0, 2.0**-18, 2.0**-7, 1.9375]
    True
    """
    return (np.arange(256, dtype=np.uint16) << 6).view(np.float16).astype(np.float32)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedMatrix(Matrix):
    """A matrix of 8 or 4 bits a weight, in tile order.

    data    codes, uint8 (ceil(O/8), groups * group_size * bits / 32, 8, 4), as mistral_kernels.layout describes
    scales  codes of scales and zeros, uint8 (ceil(O/8), groups, 2, 8)
    unit    what scales are multiplied by, a power of two
    n_out, n_in     O and I
    """

    scales: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    unit: np.float32 = field(default_factory=lambda: np.float32(1))
    n_out: int = 0
    n_in: int = 0

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return self.n_out, self.n_in

    @cached_property
    def bits(self) -> int:
        """8 or 4"""
        return int(self.kind.removeprefix("int"))

    @cached_property
    def group_size(self) -> int:
        """How many neighbours in a row share a scale."""
        return self.data.shape[1] * 32 // self.bits // self.scales.shape[1]

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the file, those of the scales included."""
        return self.data.nbytes + self.scales.nbytes

    @cached_property
    def scale_bytes(self) -> np.ndarray:
        """`scales` as it lies in memory, as one read-only array of bytes."""
        flat = np.ascontiguousarray(self.scales).reshape(-1)
        flat.flags.writeable = False
        return flat

    def rows(self, index: Rows, dtype: DTypeLike) -> np.ndarray:
        """Return the rows at `index` as floats (R, I): exact, also in float32."""
        rows = np.arange(self.n_out)[index]
        codes = codes_of_tiles(self.data, rows, self.bits).reshape(len(rows), self.scales.shape[1], self.group_size)
        scales = self.scales[rows // TILE, :, :, rows % TILE]
        scale, zero = scale_values()[scales[..., 0]] * self.unit, scales[..., 1] * np.float32(2.0 ** (self.bits - 8))
        values = (codes.astype(dtype) - zero[..., np.newaxis].astype(dtype)) * scale[..., np.newaxis].astype(dtype)
        return values.reshape(len(rows), self.scales.shape[1] * self.group_size)[:, : self.n_in]
