"""Tile order: the codes (O, I) of a quantized matrix as tiles of eight rows, interleaved. NumPy only.

A kernel with a row in each lane reads a tile as one long stream, and never sums lanes. A piece of a tile is already the
panel that a product with many vectors needs. Four neighbours of a row stay together, for processors that multiply and
add four at once. With 4 bits a byte holds two codes, i and i + 4. I is a multiple of 8, and rows beyond O are 0:

    tiles[o // 8, i // 4, o % 8, i % 4] = code[o, i]                                      8 bits: (ceil(O/8), I/4, 8, 4)
    tiles[o // 8, i // 8, o % 8, i % 4] = code[o, i] + 16 code[o, i + 4]   i % 8 < 4      4 bits: (ceil(O/8), I/8, 8, 4)

>>> code_tiles(np.array([[1, 2, 3, 4, 5, 6, 7, 8]], np.uint8), 4)[0, 0, 0].tolist() == [0x51, 0x62, 0x73, 0x84]
True
"""

from __future__ import annotations

import numpy as np

TILE = 8


def code_tiles(codes_OI: np.ndarray, bits: int) -> np.ndarray:
    """Return codes (O, I) of 8 or 4 bits, uint8 each, as tiles; I is a multiple of 8."""
    n_out, n_in = codes_OI.shape
    whole_tiles = np.pad(codes_OI, ((0, -n_out % TILE), (0, 0)))
    tiles = whole_tiles.reshape(-1, TILE, n_in // 4, 4).swapaxes(1, 2)
    return np.ascontiguousarray(tiles if bits == 8 else tiles[:, 0::2] | tiles[:, 1::2] << 4)


def codes_of_tiles(tiles: np.ndarray, rows: np.ndarray, bits: int) -> np.ndarray:
    """Return some rows (R, I) of codes that lie in tiles.

    >>> codes = np.arange(48, dtype=np.uint8).reshape(3, 16) % 16
    >>> [(codes_of_tiles(code_tiles(codes, bits), np.arange(3), bits) == codes).all().item() for bits in (4, 8)]
    [True, True]
    """
    quads = tiles[rows // TILE, :, rows % TILE]
    if bits == 4:
        quads = np.stack([quads & 15, quads >> 4], axis=2)
    return quads.reshape(len(rows), tiles.shape[1] * 4 * 8 // bits)
