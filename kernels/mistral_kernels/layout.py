"""Tile order: the codes (O, I) of a quantized matrix as tiles of eight rows, interleaved. NumPy only.

A kernel with a row in each lane reads a tile as one long stream, and never sums lanes. A piece of a tile is already the
panel that a product with many vectors needs. Four neighbours of a row stay together, for processors that multiply and
add four at once: a quad. I is a multiple of 32, and rows beyond O are 0.

Codes are cut into planes, such as the lower four bits of all codes and the other two. 32 inputs of a tile follow each
other plane by plane. A plane of w bits is w vectors of 32 bytes: 8 rows, a quad of each. A byte holds the bits of 8 / w
codes, those of the first quad lowest:

    plane 0, w = 8: vector[q][o, i] = code[o, 4q + i]                               i < 4, q < 8
    plane 0, w = 4: vector[q][o, i] = code[o, 8q + i] + 16 code[o, 8q + 4 + i]      i < 4, q < 4; 16 codes or less

>>> code_tiles(np.arange(32, dtype=np.uint8)[np.newaxis] % 16, 4)[0, 0, 0].tolist() == [0x40, 0x51, 0x62, 0x73]
True
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

TILE = 8
QUADS = 8  # of a row that follow each other plane by plane
PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}  # bits of a code -> bits of each plane


class _Plane(NamedTuple):
    """A plane: its bits in each byte of a word, the bits of a code below it, its vectors, and its quads' shifts."""

    mask: np.uint32
    below: np.uint32
    vectors: slice
    shifts: range


def _planes(bits: int) -> Iterator[_Plane]:
    below = 0
    for width in PLANES[bits]:
        mask = np.uint32((2**width - 1) * 0x01010101)
        yield _Plane(mask, np.uint32(below), slice(below, below + width), range(0, 8, width))
        below += width


def code_tiles(codes_OI: np.ndarray, bits: int) -> np.ndarray:
    """Return codes (O, I), uint8 each, as tiles, uint8 (ceil(O/8), I * bits / 32, 8, 4); I is a multiple of 32."""
    n_out, n_in = codes_OI.shape
    whole_tiles = np.zeros((-(-n_out // TILE) * TILE, n_in), np.uint8)
    whole_tiles[:n_out] = codes_OI
    words = whole_tiles.view(np.uint32).reshape(-1, TILE, n_in // 32, QUADS)  # a quad each
    quads = np.ascontiguousarray(words.transpose(0, 2, 3, 1))
    tiles = np.zeros((*quads.shape[:2], bits, TILE), np.uint32)
    for plane in _planes(bits):
        for number, shift in enumerate(plane.shifts):
            of_plane = quads[:, :, number :: len(plane.shifts)] >> plane.below & plane.mask
            tiles[:, :, plane.vectors] |= of_plane << np.uint32(shift)
    return tiles.view(np.uint8).reshape(len(tiles), n_in * bits // 32, TILE, 4)


def codes_of_tiles(tiles: np.ndarray, rows: np.ndarray, bits: int) -> np.ndarray:
    """Return some rows (R, I) of codes that lie in tiles.

    >>> codes = np.arange(96, dtype=np.uint8).reshape(3, 32) % 64
    >>> [(codes_of_tiles(code_tiles(codes, bits), np.arange(3), bits) == codes).all().item() for bits in (6, 8)]
    [True, True]
    """
    n_pieces = tiles.shape[1] // bits
    words = np.ascontiguousarray(tiles[rows // TILE, :, rows % TILE]).view(np.uint32)
    words = words.reshape(len(rows), n_pieces, bits)
    quads = np.zeros((len(rows), n_pieces, QUADS), np.uint32)
    for plane in _planes(bits):
        for number, shift in enumerate(plane.shifts):
            of_plane = words[:, :, plane.vectors] >> np.uint32(shift) & plane.mask
            quads[:, :, number :: len(plane.shifts)] |= of_plane << plane.below
    return quads.view(np.uint8).reshape(len(rows), 4 * QUADS * n_pieces)
