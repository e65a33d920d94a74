"""Round weights to 8 or 4 bits: search for each group the scale, zero and codes with the least squared error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from mistral_kernels.layout import TILE, code_tiles
from mistral_ref.errors import CheckpointError
from mistral_ref.files.quantized_format import quantized_tensors
from mistral_ref.host import chosen_threads
from mistral_ref.quantized_matrix import QuantizedMatrix, scale_values
from mistral_ref.weights import Matrix

# How a group is rounded. These scales are tried, counted from the smallest one that spans the group. For each scale the
# zero is refitted to the codes this many times. More of either changes little (docs/quantization.md).
_SCALES_TRIED = (1, 0, -1, -2, -3)
_REFITS = 2
_BLOCK_ELEMENTS = 2**18
_EXPONENTS = (-126, 126)  # least and greatest exponent of a unit; float32 has these powers of two


def _unit(largest: float, bits: int) -> np.float32:
    """Return the least unit with which one scale can span weights from -largest to largest; 1 if `largest` is 0."""
    least = 2 * largest / (2**bits - 1) / float(scale_values()[-1])
    return np.ldexp(np.float32(1), int(np.clip(math.ceil(math.log2(least)), *_EXPONENTS)) if least else 0)


def _best_codes(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes, scales and zeros that round groups of weights with the least squared error found, uint8.

    groups      (R, N, G): R rows of N groups of G weights, in units of the matrix

    The codes are (R, N, G). Scales and zeros are (R, N), as the bytes of quantized_matrix.py.
    """
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
    """Yield slices of rows. A slice has whole tiles and at most _BLOCK_ELEMENTS weights, or it is one tile."""
    height = max(_BLOCK_ELEMENTS // n_in // TILE, 1) * TILE
    return (slice(start, min(start + height, n_rows)) for start in range(0, n_rows, height))


def quantized(
    matrix: Matrix, bits: int, group_size: int, row_order: np.ndarray | None = None, threads: int | None = None
) -> QuantizedMatrix:
    """Return a matrix rounded to 8 or 4 bits.

    row_order   for each row of the result its number in `matrix`; None: no row moves
    threads     number of threads, as in `load`

    Raises CheckpointError for a weight that is not finite, or for a matrix that is quantized already.
    """
    if isinstance(matrix, QuantizedMatrix):
        raise CheckpointError(f"{matrix.name} has {matrix.bits} bits already; expected float weights")
    n_out, n_in = matrix.shape
    specs = quantized_tensors(n_out, n_in, bits, group_size)
    data, all_scales = np.empty(specs["weight"].shape, np.uint8), np.zeros(specs["scales"].shape, np.uint8)
    n_groups = all_scales.shape[1]

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

    with ThreadPoolExecutor(chosen_threads(threads)) as pool:
        largest = np.max(list(pool.map(largest_of, _blocks(n_out, n_in))))  # NaN if a weight is NaN
        if not np.isfinite(largest):
            raise CheckpointError(f"{matrix.name} holds {largest}, which cannot be one of {2**bits} codes")
        unit = _unit(float(largest), bits)
        for _ in pool.map(round_rows, _blocks(n_out, n_in)):
            pass
    kind: Any = f"int{bits}"
    return QuantizedMatrix(matrix.name, kind, data, scales=all_scales, unit=unit, n_out=n_out, n_in=n_in)
