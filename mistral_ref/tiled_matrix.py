"""Matrices in the packed types of GGUF files, in tile order: the same numbers, laid out anew for the kernels.

A row's blocks (block_matrix.py) hold bits of codes and bits of scales side by side. In tile order the codes of eight
rows lie as mistral_kernels.layout has them, and their scales and minimums beside each other in an array of their own.
Nothing is rounded. Scales and minimums of 4 and 6 bits get a byte each. So some types take more bits a weight:

            Q2_K    Q3_K    Q4_K    Q5_K    IQ4_XS
    blocks  2.625   3.4375  4.5     5.5     4.25
    tiles   3.125   3.5625  4.625   5.625   4.3125
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from mistral_kernels.layout import TILE, code_tiles, codes_of_tiles
from mistral_ref.block_matrix import BLOCK_TYPES, BlockMatrix, Blocks
from mistral_ref.host import chosen_threads
from mistral_ref.weights import BlockKind, Rows, flat_bytes

_CODES_AT_ONCE = 2**20  # how many codes a thread unpacks at the same time


@dataclass(frozen=True, eq=False, repr=False)
class TiledMatrix(BlockMatrix):
    """A matrix in a packed type of a GGUF file, in tile order.

    data    the codes, uint8 (ceil(O/8), I * bits / 32, 8, 4)
    scales  for each block of inputs of each tile, uint8 (ceil(O/8), blocks in a row, bytes): 8 scale_units, one for
            each row of the tile; 8 minimum_units; for each group 8 scales; for each group 8 minimums. What the type
            lacks is not there. Neither are scales and minimums if a block is one group: they are all 1, or all -1
    n_out   O
    """

    scales: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint8))
    n_out: int = 0

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return self.n_out, self.scales.shape[1] * self.type.weights

    @cached_property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return self.data.nbytes + self.scales.nbytes

    @cached_property
    def scale_bytes(self) -> np.ndarray:
        """The bytes of `scales` in the order of memory, as one flat read-only array."""
        return flat_bytes(self.scales)

    def blocks(self, index: Rows) -> Blocks:
        """Return the numbers that the rows at `index` store."""
        rows = np.arange(self.n_out)[index]
        stored = codes_of_tiles(self.data, rows, self.type.bits)
        codes = self.type.values[stored].reshape(len(rows), self.scales.shape[1], self.type.groups, self.group_size)
        of_tiles, lanes = self.scales[rows // TILE], (rows % TILE)[:, np.newaxis, np.newaxis]
        parts = []
        for dtype, n in _factors(self.type.groups, self.type.has_minimums):
            size = np.dtype(dtype).itemsize * TILE * n
            part = np.ascontiguousarray(of_tiles[..., :size]).view(dtype).reshape(*of_tiles.shape[:2], n, TILE)
            parts.append(np.take_along_axis(part, lanes[..., np.newaxis], axis=-1)[..., 0])
            of_tiles = of_tiles[..., size:]
        units, numbers = parts[: 1 + self.type.has_minimums], parts[1 + self.type.has_minimums :]
        if not numbers:
            ones = np.ones((*codes.shape[:2], 1), np.int8)
            numbers = [ones, -ones][: len(units)]
        if not self.type.has_minimums:
            return Blocks(codes, units[0][..., 0], numbers[0])
        return Blocks(codes, units[0][..., 0], numbers[0], units[1][..., 0], numbers[1])


def _factors(n_groups: int, has_minimums: bool) -> list[tuple[str, int]]:
    """Return dtype and number, for each row, of the parts of a block's scales, in their order."""
    n_parts = 1 + has_minimums
    return [("<f2", 1)] * n_parts + ([("i1", n_groups)] * n_parts if n_groups > 1 else [])


def tiled_shapes(kind: BlockKind, n_out: int, n_in: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of the codes and of the scales of a matrix (O, I) of a kind."""
    of_kind, n_tiles = BLOCK_TYPES[kind], -(-n_out // TILE)
    factor_bytes = TILE * sum(
        np.dtype(dtype).itemsize * n for dtype, n in _factors(of_kind.groups, of_kind.has_minimums)
    )
    return (n_tiles, n_in * of_kind.bits // 32, TILE, 4), (n_tiles, n_in // of_kind.weights, factor_bytes)


def tiled(matrix: BlockMatrix) -> TiledMatrix:
    """Return a matrix in tile order: its `rows` are the same to the bit."""
    n_out, n_in = matrix.shape
    data, scales = (np.empty(shape, np.uint8) for shape in tiled_shapes(matrix.kind, n_out, n_in))
    at_once = max(_CODES_AT_ONCE // n_in // TILE, 1)  # tiles

    def convert(first: int) -> None:
        tiles = slice(first, min(first + at_once, len(data)))
        blocks = matrix.blocks(slice(tiles.start * TILE, min(tiles.stop * TILE, n_out)))
        codes = blocks.codes.reshape(len(blocks.codes), n_in)
        data[tiles] = code_tiles(matrix.type.stored(codes), matrix.type.bits)
        of_block = [blocks.scale_unit, blocks.minimum_unit]
        of_group = [blocks.scales, blocks.minimums] if matrix.type.groups > 1 else []
        parts = [_of_tiles(part) for part in (*of_block, *of_group) if part is not None]
        scales[tiles] = np.concatenate(parts, axis=-1)

    with ThreadPoolExecutor(chosen_threads(None)) as pool:
        for _ in pool.map(convert, range(0, len(data), at_once)):  # raises what a conversion has raised
            pass
    return TiledMatrix(matrix.name, matrix.kind, data, scales=scales, n_out=n_out)


def _of_tiles(numbers: np.ndarray) -> np.ndarray:
    """Return the bytes of numbers (R, B, ...) of rows and blocks, those of the rows of a tile side by side.

    uint8 (ceil(R/8), B, bytes); rows beyond R are 0.
    """
    padded = np.pad(numbers, [(0, -len(numbers) % TILE), *[(0, 0)] * (numbers.ndim - 1)])
    of_tiles = np.moveaxis(padded.reshape(-1, TILE, *numbers.shape[1:]), 1, -1)
    return np.ascontiguousarray(of_tiles).reshape(*of_tiles.shape[:2], -1).view(np.uint8)
