"""Tile order: a matrix (O, I) as tiles of eight rows that lie side by side. NumPy only.

    tiles[o // 8, i, o % 8] = W[o, i]        (ceil(O/8), I, 8), rows beyond O are 0

A kernel that has a row in each lane reads it in one long stream and never adds up lanes; and a part of a tile already
is the panel that a product with many vectors needs.

>>> to_tiles(np.array([[1, 2], [3, 4]]))[0].tolist()
[[1, 3, 0, 0, 0, 0, 0, 0], [2, 4, 0, 0, 0, 0, 0, 0]]
"""

from __future__ import annotations

import numpy as np

TILE = 8


def to_tiles(rows_OI: np.ndarray) -> np.ndarray:
    """Return a copy of a matrix in tile order."""
    n_out, n_in = rows_OI.shape
    tiles = np.zeros((-(-n_out // TILE), n_in, TILE), rows_OI.dtype)
    whole = n_out // TILE
    tiles[:whole] = rows_OI[: whole * TILE].reshape(whole, TILE, n_in).swapaxes(1, 2)
    tiles[whole:, :, : n_out - whole * TILE] = rows_OI[whole * TILE :].T
    return tiles


def rows_of_tiles(tiles: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return some rows (R, I) of a matrix in tile order."""
    return tiles[rows // TILE, :, rows % TILE]
