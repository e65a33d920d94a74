"""Matrices of 8 or 4 bits a weight.

Each row is cut into groups of neighbouring weights. The weights of a group share a scale and a zero:

    weight = scale * (code - zero)

    code    a whole number from 0 to 2^bits - 1, stored in `bits` bits
    zero    one byte, in units of 2^(bits - 8): whole numbers for 8 bits, sixteenths for 4 bits
    scale   one byte, 4 bits of exponent e and 4 bits of mantissa m. The scale is (1 + m/16) 2^(e - 15) unit, or
            m/16 2^-14 unit if e is 0. The unit is a power of two; the whole matrix has one unit

A group of 32 has 16 bits of scale and zero: half a bit a weight. llama.cpp's Q8_0 and Q4_0 also need half a bit a
weight, for a scale of 16 bits; they have no zero. files/rounding.py rounds the weights. rounded_inputs.py rounds the
inputs that the weights are multiplied with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property

import numpy as np
from numpy.typing import DTypeLike

from mistral_kernels.layout import TILE, codes_of_tiles
from mistral_ref.weights import Matrix, Rows, flat_bytes

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 32  # the default


@cache
def scale_values() -> np.ndarray:
    """Return the scale that each of the 256 codes stands for, in units: float32 (256,).

    >>> scale_values()[[0, 1, 8 * 16, 255]].tolist() == [0.0, 2.0**-18, 2.0**-7, 1.9375]
    True
    """
    return (np.arange(256, dtype=np.uint16) << 6).view(np.float16).astype(np.float32)


@dataclass(frozen=True, eq=False, repr=False)
class QuantizedMatrix(Matrix):
    """A matrix of 8 or 4 bits a weight, in tile order.

    data    the codes, uint8 (ceil(O/8), groups * group_size * bits / 32, 8, 4); mistral_kernels.layout has the order
    scales  for each group of each row the byte of its scale and the byte of its zero, uint8 (ceil(O/8), groups, 2, 8)
    unit    a power of two; all scales are multiplied by it
    n_out, n_in     O and I, the numbers of outputs and inputs
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
        """How many neighbouring weights in a row share a scale and a zero."""
        return self.data.shape[1] * 32 // self.bits // self.scales.shape[1]

    @cached_property
    def nbytes(self) -> int:
        """Number of bytes in the file, with the bytes of the scales and zeros."""
        return self.data.nbytes + self.scales.nbytes

    @cached_property
    def scale_bytes(self) -> np.ndarray:
        """The bytes of `scales` in the order of memory, as one flat read-only array."""
        return flat_bytes(self.scales)

    def rows(self, index: Rows, dtype: DTypeLike) -> np.ndarray:
        """Return the rows at `index` as floats (R, I) of `dtype`; float32 holds every weight exactly."""
        rows = np.arange(self.n_out)[index]
        codes = codes_of_tiles(self.data, rows, self.bits).reshape(len(rows), self.scales.shape[1], self.group_size)
        scales = self.scales[rows // TILE, :, :, rows % TILE]
        scale, zero = scale_values()[scales[..., 0]] * self.unit, scales[..., 1] * np.float32(2.0 ** (self.bits - 8))
        values = (codes.astype(dtype) - zero[..., np.newaxis].astype(dtype)) * scale[..., np.newaxis].astype(dtype)
        return values.reshape(len(rows), self.scales.shape[1] * self.group_size)[:, : self.n_in]
