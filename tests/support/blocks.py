"""Matrices in the packed types of GGUF files, and their products by the compiled kernels."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from support.kernels import rounded_product
from support.marks import slow_but

from mistral_kernels.packed import matmul_blocks, matvec_blocks
from mistral_kernels.quantized import matmul_quantized, matvec_quantized
from mistral_ref.block_matrix import BLOCK_TYPES, BlockMatrix
from mistral_ref.tiled_matrix import TiledMatrix, tiled

# Kernels of a kind take seconds to compile, so only those of most files are tried each time.
each_kind = pytest.mark.parametrize("kind", slow_but(["q4_k", "q6_k", "q8_0"], {kind: kind for kind in BLOCK_TYPES}))
# Each way in which tiles are packed: planes, groups, minimums, a table. A model in tests/files has every kind.
_TILED = ["q4_k", "q6_k", "q3_k", "q5_k", "q8_0", "q2_k", "q4_1", "iq4_nl"]
STORED = [*BLOCK_TYPES, *(f"{kind} tiles" for kind in _TILED)]
USUAL = ["q4_k", "q6_k", "q8_0", "q4_k tiles", "q6_k tiles"]
each_stored = pytest.mark.parametrize("stored", slow_but(USUAL, {stored: stored for stored in STORED}))
_IN_TILES = {stored: stored for stored in STORED if stored.endswith("tiles")}
each_stored_in_tiles = pytest.mark.parametrize("stored", slow_but(USUAL[3:], _IN_TILES))
each_inputs = pytest.mark.parametrize("inputs", ["int16", "int8"])


def random_blocks(kind: Any, n_out: int, n_blocks: int, seed: int = 0) -> BlockMatrix:
    """Return a matrix of random bytes whose scales are finite and of ordinary size."""
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (n_out, n_blocks, BLOCK_TYPES[kind].bytes), dtype=np.uint8)
    return BlockMatrix("w", kind, with_ordinary_units(kind, data))


def kind_of(stored: str) -> Any:
    """Return the kind of a matrix that is stored so."""
    return stored.partition(" ")[0]


def as_stored(stored: str, matrix: BlockMatrix) -> BlockMatrix:
    """Return a matrix in tile order if its name says so, else as it is."""
    return tiled(matrix) if stored.endswith("tiles") else matrix


def with_ordinary_units(kind: Any, data: np.ndarray) -> np.ndarray:
    """Return blocks whose float16 numbers are made those from 2^-7 to 2^-6, of both signs."""
    data = data.copy()
    for at in units_of(kind):
        data[..., at + 1] = data[..., at + 1] & 0x83 | 0x20
    return data


def units_of(kind: Any) -> list[int]:
    """Return where the float16 numbers of a block begin."""
    ends = np.cumsum(BLOCK_TYPES[kind].fields)
    return [int(end) - 2 for end, size in zip(ends, BLOCK_TYPES[kind].fields, strict=True) if size == 2][
        : 1 if kind == "iq4_xs" else 2
    ]


def block_product(matrix: BlockMatrix, x_TI: np.ndarray, inputs: str, n_threads: int = 1, **options: Any) -> np.ndarray:
    """Return x · Wᵀ by the kernels for blocks or tiles, token by token or for many tokens."""
    rounding, stored = (inputs, matrix.group_size), [matrix.as_bytes]
    makers = partial(matvec_blocks, matrix.kind, inputs), partial(matmul_blocks, matrix.kind, inputs)
    if isinstance(matrix, TiledMatrix):
        how = matrix.kind, inputs, matrix.group_size
        makers = partial(matvec_quantized, *how, 1), partial(matmul_quantized, *how)
        stored += [matrix.scale_bytes, np.float32(1)]
    return rounded_product(makers, tuple(stored), rounding, x_TI, matrix.shape[0], n_threads, **options)
