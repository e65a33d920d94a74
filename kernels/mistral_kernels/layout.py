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

import numpy as np

TILE = 8
QUADS = 8  # of a row that follow each other plane by plane
PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}  # bits of a code -> bits of each plane


def _planes(bits: int) -> Iterator[tuple[int, int, range]]:
    """Yield for each plane its bits, the number of bits below it, and the shift of each quad that shares a byte."""
    below = 0
    for width in PLANES[bits]:
        yield width, below, range(0, 8, width)
        below += width


def code_tiles(codes_OI: np.ndarray, bits: int) -> np.ndarray:
    """Return codes (O, I), uint8 each, as tiles, uint8 (ceil(O/8), I * bits / 32, 8, 4); I is a multiple of 32."""
    n_out, n_in = codes_OI.shape
    whole_tiles = np.pad(codes_OI, ((0, -n_out % TILE), (0, 0)))
    quads = whole_tiles.reshape(-1, TILE, n_in // 32, QUADS, 4).transpose(0, 2, 3, 1, 4)
    tiles = np.zeros((*quads.shape[:2], bits, TILE, 4), np.uint8)
    first = 0
    for width, below, shifts in _planes(bits):
        for number, shift in enumerate(shifts):
            some = quads[:, :, number :: len(shifts)] >> np.uint8(below) & np.uint8(2**width - 1)
            tiles[:, :, first : first + width] |= some << np.uint8(shift)
        first += width
    return tiles.reshape(len(tiles), -1, TILE, 4)


def codes_of_tiles(tiles: np.ndarray, rows: np.ndarray, bits: int) -> np.ndarray:
    """Return some rows (R, I) of codes that lie in tiles.

    >>> codes = np.arange(96, dtype=np.uint8).reshape(3, 32) % 64
    >>> [(codes_of_tiles(code_tiles(codes, bits), np.arange(3), bits) == codes).all().item() for bits in (6, 8)]
    [True, True]
    """
    n_pieces = tiles.shape[1] // bits
    vectors = tiles[rows // TILE, :, rows % TILE].reshape(len(rows), n_pieces, bits, 1, 4)
    codes = np.zeros((len(rows), n_pieces, QUADS, 4), np.uint8)
    first = 0
    for width, below, shifts in _planes(bits):
        moves = np.array(shifts, np.uint8)[:, np.newaxis]
        shared = vectors[:, :, first : first + width] >> moves & np.uint8(2**width - 1)
        codes |= shared.reshape(codes.shape) << np.uint8(below)
        first += width
    return codes.reshape(len(rows), 4 * QUADS * n_pieces)
