"""Matrices of 8 or 4 bits a weight: how they are rounded, and how the inputs they are multiplied with are.

A row is cut into groups of neighbours, which share a scale and a zero:

    weight = scale * (code - zero)

    code    bits wide, 0 to 2^bits - 1
    zero    a byte in units of 2^(bits - 8): a whole number for 8 bits, sixteenths for 4
    scale   a byte, 4 bits of exponent e and 4 of mantissa m, times a unit, a power of two for the whole matrix:
            (1 + m/16) 2^(e - 15) unit, or m/16 2^-14 unit where e is 0

so groups of 32 cost half a bit a weight, as in llama.cpp's Q8_0 and Q4_0, which have a scale of 16 bits and no zero.
Products round their inputs too, with a scale of their own for each group, so that what is summed up are integers
(mistral_kernels.dots). That is what `rounded` does, for the NumPy backend to compute what the kernels do.

Rows beyond O, which make whole tiles, have scales of 0, and nothing is kept of what they give. Inputs beyond I, which
make whole groups, have the codes that the row's last weight repeated gets, and meet inputs of 0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import DTypeLike

from mistral_kernels.layout import TILE, code_tiles, codes_of_tiles
from mistral_ref.errors import CheckpointError, InputError, shown
from mistral_ref.files.json_file import parse_json
from mistral_ref.files.tensor_file import Part
from mistral_ref.weights import Matrix, Rows

Activations = Literal["int16", "int8", "bfloat16", "float"]

BITS = (8, 4)
GROUP_SIZES = (32, 64, 128)
GROUP_SIZE = 32  # unless another is asked for
FORMAT = "mistral_ref.quantized.v1"  # the entry in a file's metadata that says how its matrices are rounded

_LARGEST = {"int16": 32767, "int8": 127}
# How a group is rounded: scales that are tried, counted from the smallest that spans it, and how often the zero is
# fitted to the codes that it led to. More of either changes little (docs/quantization.md).
_SCALES_TRIED = (1, 0, -1, -2, -3)
_REFITS = 2
_BLOCK_ELEMENTS = 2**18
_EXPONENTS = (-126, 126)  # powers of two that float32 has


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


def checked_bits(name: str, bits: int) -> int:
    """Return bits if they are 8 or 4; raise InputError if not."""
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"{name} is {shown(bits)}; expected 8 or 4")
    return bits


def checked_group_size(group_size: int) -> int:
    """Return a group size if it is one of GROUP_SIZES; raise InputError if not."""
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise InputError(f"group_size is {shown(group_size)}; expected one of {', '.join(map(str, GROUP_SIZES))}")
    return group_size


def checked_activations(activations: str) -> Activations:
    """Return what inputs are rounded to if that is known; raise InputError if not."""
    if activations not in get_args(Activations):
        raise InputError(f"activations is {shown(activations)}; expected one of {', '.join(get_args(Activations))}")
    return activations  # type: ignore[return-value]


def rounded(x_TI: np.ndarray, activations: Activations, group_size: int) -> np.ndarray:
    """Return inputs as products with quantized matrices take them: rounded in float32, in the dtype they came in.

    In each group of neighbours x becomes scale q: q = x / scale to the nearest whole number, ties to even, where
    scale = max |x| / 32767, or 127 for "int8". With "float" they stay as they are.

    >>> rounded(np.array([[1.0, 0.3, -127.0]]), "int8", 32).tolist()
    [[1.0, 0.0, -127.0]]
    """
    if activations == "float":
        return x_TI
    n_tokens, n_in = x_TI.shape
    groups = np.zeros((n_tokens, -(-n_in // group_size) * group_size), np.float32)
    groups[:, :n_in] = x_TI
    padded = groups.shape
    groups = groups.reshape(n_tokens, padded[1] // group_size, group_size)
    largest, most = np.float32(_LARGEST[activations]), np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        times = largest / most
        q = np.rint(groups * np.where(times < np.inf, times, np.float32(0)))
        values = q.astype(x_TI.dtype) * (most / largest).astype(x_TI.dtype)
    return values.reshape(padded)[:, :n_in]


def quantized_parts(n_out: int, n_in: int, bits: int, group_size: int) -> dict[str, Part]:
    """Return what a file holds of a matrix: codes, and scales and zeros, by the endings of their names."""
    n_tiles, n_groups = -(-n_out // TILE), -(-n_in // group_size)
    return {
        "weight": Part("U8", (n_tiles, n_groups * group_size * bits // 32, TILE, 4)),
        "scales": Part("U8", (n_tiles, n_groups, 2, TILE)),
    }


def quantized_metadata(bits: Mapping[str, int], group_size: int) -> dict[str, str]:
    """Return the metadata of a file with these matrices: the bits of each, and the groups of all.

    >>> quantized_metadata({"output": 8}, 32)
    {'mistral_ref.quantized.v1': '{"group_size": 32, "bits": {"output": 8}}'}
    """
    return {FORMAT: json.dumps({"group_size": group_size, "bits": dict(bits)})}


def bits_of(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, int], int]:
    """Return the bits of each matrix that a file's metadata tells of, and their group size; none where it tells none.

    Raises CheckpointError if the metadata is damaged, or of another version.
    """
    other = [key for key in metadata if key.startswith(FORMAT.rpartition(".")[0]) and key != FORMAT]
    if other:
        raise CheckpointError(f"{path}: its weights are {shown(other[0])}; this version reads {FORMAT}")
    if FORMAT not in metadata:
        return {}, GROUP_SIZE
    try:
        about = parse_json(metadata[FORMAT])
    except ValueError as error:
        raise CheckpointError(f"{path}: {FORMAT} in its metadata cannot be read: {error}") from None
    match about:
        case {"group_size": int(group_size), "bits": dict(bits)} if group_size in GROUP_SIZES:
            wrong = [name for name, found in bits.items() if type(found) is not int or found not in BITS]
            if not wrong:
                return bits, group_size
    raise CheckpointError(
        f"{path}: {FORMAT} in its metadata is {shown(about)}; expected a group_size of {GROUP_SIZES}, "
        "and 8 or 4 bits for each matrix"
    )


def _unit(largest: float, bits: int) -> np.float32:
    """Return the least power of two with which a scale spans weights from -largest to largest; 1 if they are 0."""
    least = 2 * largest / (2**bits - 1) / float(scale_values()[-1])
    return np.ldexp(np.float32(1), int(np.clip(math.ceil(math.log2(least)), *_EXPONENTS)) if least else 0)


def _best_codes(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes (R, N, G), and the scales and zeros (R, N) that round these groups with least squared error."""
    most, unit = np.float32(2**bits - 1), np.float32(2 ** (8 - bits))
    table = scale_values()
    low, high = np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)
    smallest = np.searchsorted(table, (high - low) / most)
    least = np.full(smallest.shape, np.inf, np.float32)
    scales, zeros = np.zeros_like(smallest), np.zeros_like(least)

    def in_codes(zero: np.ndarray) -> np.ndarray:
        values = in_scales + zero[..., np.newaxis]
        return np.clip(np.rint(values, out=values), 0, most, out=values)

    for offset in _SCALES_TRIED:
        tried = np.clip(smallest + offset, 1, 255)
        scale = table[tried]
        in_scales = groups / scale[..., np.newaxis]
        zero = most / 2 - (low + high) / (2 * scale)  # the middle of the group becomes the middle of the codes
        for _ in range(_REFITS + 1):
            zero = np.clip(np.rint(zero * unit), 0, 255) / unit
            off = in_codes(zero)
            off -= in_scales
            off -= zero[..., np.newaxis]
            error = np.einsum("rng,rng->rn", off, off) * np.square(scale)
            better = error < least
            least, scales, zeros = (
                np.where(better, new, old) for new, old in ((error, least), (tried, scales), (zero, zeros))
            )
            zero = zero + off.mean(axis=-1)
    is_zero = high == low
    scales[is_zero] = zeros[is_zero] = 0
    in_scales = groups / np.where(is_zero, 1, table[scales])[..., np.newaxis]
    return in_codes(zeros).astype(np.uint8), scales.astype(np.uint8), (zeros * unit).astype(np.uint8)


def _blocks(n_rows: int, n_in: int) -> Iterator[slice]:
    """Yield slices of whole tiles of rows, each of a bounded number of weights."""
    step = max(_BLOCK_ELEMENTS // n_in // TILE, 1) * TILE
    return (slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step))


def quantized(
    matrix: Matrix, bits: int, group_size: int, row_order: np.ndarray | None = None, threads: int | None = None
) -> QuantizedMatrix:
    """Return a matrix rounded to 8 or 4 bits.

    row_order   which row of `matrix` each row of the result is; None: as they are
    threads     how many rows are rounded on; None: as many as there are processors

    Raises CheckpointError for weights that are not finite.
    """
    if isinstance(matrix, QuantizedMatrix):
        raise CheckpointError(f"{matrix.name} has {matrix.bits} bits already; expected float weights")
    n_out, n_in = matrix.shape
    n_tiles, n_groups = -(-n_out // TILE), -(-n_in // group_size)
    data = np.empty((n_tiles, n_groups * group_size * bits // 32, TILE, 4), np.uint8)
    all_scales = np.zeros((n_tiles, n_groups, 2, TILE), np.uint8)

    def largest_of(rows: slice) -> float:
        return float(np.abs(matrix.rows(rows, np.float32)).max())

    def round_rows(rows: slice) -> None:
        weights = matrix.rows(rows if row_order is None else row_order[rows], np.float32)
        weights = weights / unit
        groups = np.pad(weights, ((0, 0), (0, n_groups * group_size - n_in)), mode="edge")
        codes, *scales = _best_codes(groups.reshape(len(groups), n_groups, group_size), bits)
        tiles = slice(rows.start // TILE, -(-rows.stop // TILE))
        data[tiles] = code_tiles(codes.reshape(len(groups), -1), bits)
        by_row = np.zeros(((tiles.stop - tiles.start) * TILE, 2, n_groups), np.uint8)
        by_row[: len(groups)] = np.stack(scales, axis=1)
        all_scales[tiles] = by_row.reshape(-1, TILE, 2, n_groups).transpose(0, 3, 2, 1)

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        largest = np.max(list(pool.map(largest_of, _blocks(n_out, n_in))))  # NaN if there is one
        if not np.isfinite(largest):
            raise CheckpointError(f"{matrix.name} holds {largest}, which has no place among {2**bits} steps")
        unit = _unit(float(largest), bits)
        for _ in pool.map(round_rows, _blocks(n_out, n_in)):
            pass
    kind: Any = f"int{bits}"
    return QuantizedMatrix(matrix.name, kind, data, scales=all_scales, unit=unit, n_out=n_out, n_in=n_in)
