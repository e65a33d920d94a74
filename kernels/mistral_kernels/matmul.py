"""Matrix times matrix, for prompts: y[t, o] = sum over i of x[t, i] W[o, i], with W as it lies in the file.

A block of W (WIDTH rows, DEPTH inputs) is widened to float32 and transposed into a panel. The panel stays in the core's
own cache while all rows of x are multiplied with it, tile by tile. Widening costs about 1/T of the work, and reading x
again for every block about 1/WIDTH.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
from numba import types

from mistral_kernels.arrays import BYTES, HEADS_OUT, MATRIX_IN, MATRIX_OUT, Bytes, Floats, Kernel, Part
from mistral_kernels.caches import data_caches
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.matvec import round_to_pairs, scale_of
from mistral_kernels.pairs import PAIRS_ARE_FASTER
from mistral_kernels.processor import LANES, TAKES_HALVES
from mistral_kernels.sharing import shared_out
from mistral_kernels.simd import floats, load_part, rounded, store
from mistral_kernels.stored import Place, Rows
from mistral_kernels.tile import TILE_ROWS, VECTORS, WIDTH, tile, transpose

# Inputs of a panel. It fits the first cache; processors that take vectors in halves can wait for the second cache.
DEPTH = 256 if data_caches()[0] >= 4 * 256 * WIDTH or TAKES_HALVES else 128
# Numbers of x that meet all blocks before the next numbers do: they stay in the last cache, which others use too.
KEPT = max(2**20, data_caches()[-1] // 32)

SLABS = HEADS_OUT  # x cut into slabs: (slabs, tokens, inputs of a slab)


class Block(NamedTuple):
    """A block of W: the inputs start, ..., stop - 1 of the outputs from o on; W is (n_out, n_in)."""

    start: int
    stop: int
    o: int
    n_in: int
    n_out: int


def _takes_pairs(kind: str) -> bool:
    return kind == "pairs" and PAIRS_ARE_FASTER


def whole_slabs(n_tokens: int, n_in: int, depth: int, tile_rows: int = TILE_ROWS) -> tuple[int, int, int]:
    """Return the shape of x cut into slabs of `depth` inputs, with its rows rounded up to whole tiles."""
    return -(-n_in // depth), -(-n_tokens // tile_rows) * tile_rows, depth


def slab_shape(kind: str, n_tokens: int, n_in: int) -> tuple[int, int, int]:
    """Return the shape of a product's workspace: x, or pairs of it, in whole slabs."""
    return whole_slabs(n_tokens, n_in // 2 if _takes_pairs(kind) else n_in, DEPTH)


@part(borrows=True)
def _copy(x: Floats, start: int, n: int, slabs: Floats, at: int) -> None:
    """Copy n numbers of x from a flat offset to slabs[at:], in whole vectors."""
    for i in range(0, n, LANES):
        store(slabs, at + i, load_part(x, start + i, min(n - i, LANES)))


@part(borrows=True)
def _copy_rounded(x: Floats, start: int, n: int, slabs: Floats, at: int) -> None:
    """As _copy, with x rounded to bf16."""
    for i in range(0, n, LANES):
        store(slabs, at + i, rounded(load_part(x, start + i, min(n - i, LANES))))


class Way(NamedTuple):
    """How a kind of matrix is multiplied: what copies x, the inputs that count as one, and kinds of number."""

    copy: Callable[..., None]
    at_once: int
    kind_of_panel: str
    kind_of_matrix: str


def _way(kind: str) -> Way:
    if _takes_pairs(kind):
        return Way(round_to_pairs, 2, "pairs", "pairs")
    if kind == "pairs":
        return Way(_copy_rounded, 1, "f32", "bf16")
    return Way(_copy, 1, "f32", kind)


def _panel_filler(kind: str) -> Part:
    """Return the function that widens a block of W into a panel."""
    n_columns, transpose_whole, transpose_part = transpose(kind, ahead=DEPTH)
    is_scaled = kind == "fp8"

    @part(kind, borrows=True)
    def fill_panel(W: Bytes, scales: Floats, block: Block, panel: Floats) -> None:
        """panel[k - start, r] = W[o + r, k], and any numbers where r is past the last row."""
        start, stop, o, n_in, n_out = block
        for r in range(0, WIDTH, 8):
            first = min(o + r, n_out - 1)
            rows = Rows(first * n_in, n_in, (n_out - 1) * n_in)
            for k in range(start, stop, n_columns):
                scale = scale_of(scales, first, k) if is_scaled else numba.float32(1.0)
                place = Place((k - start) * WIDTH + r, WIDTH)
                if k + n_columns <= stop:
                    transpose_whole(W, rows, k, scale, panel, place)
                else:
                    transpose_part(W, rows, k, scale, panel, place, stop - k)

    return fill_panel


def over_blocks(multiply_slab: Part, new_panel: Part, depth: int, *variant: object) -> Part:
    """Return the function that multiplies all inputs with some blocks of WIDTH outputs.

    multiply_slab(W, x, block, panel, sums, n_rows, continues) multiplies the inputs of a block. It writes the result
    into `sums` (n_rows, WIDTH), or adds it where `continues` is true. Only multiply_slab knows what W and x hold.
    new_panel() makes its workspace, with room for `depth` inputs.
    """

    @part(*variant)
    def multiply_blocks(first: int, last: int, W: Any, x: Any, n_rows: int, n_in: int, y: Floats) -> None:
        """Compute the blocks first, ..., last - 1."""
        n_tokens, n_out = y.shape
        # Sums are kept here: the distance between rows of y is often a multiple of 4 KiB, and such rows push each
        # other out of the caches.
        panel, sums = new_panel(), floats(n_rows * WIDTH)
        chunk = max(KEPT // n_rows // depth, 1) * depth
        for of_chunk in range(0, n_in, chunk):
            for o in range(first * WIDTH, min(last * WIDTH, n_out), WIDTH):
                width = min(WIDTH, n_out - o)
                if of_chunk > 0:
                    for t in range(n_tokens):
                        for lane in range(width):
                            sums[t * WIDTH + lane] = y[t, o + lane]
                for start in range(of_chunk, min(of_chunk + chunk, n_in), depth):
                    block = Block(start, min(start + depth, n_in), o, n_in, n_out)
                    multiply_slab(W, x, block, panel, sums, n_rows, start > 0)
                for t in range(n_tokens):
                    for lane in range(width):
                        y[t, o + lane] = sums[t * WIDTH + lane]

    return multiply_blocks


def _cutter(kind: str, copy: Part, at_once: int) -> Part:
    """Return the function that copies x into slabs."""

    @part(kind, borrows=True)
    def cut(first: int, last: int, x: Floats, slabs: Floats) -> None:
        """slabs[slab, t, i] = x[t, slab * DEPTH + i] for the slabs first, ..., last - 1, and 0 past the last token."""
        n_tokens, n_in = x.shape
        for slab in range(first, last):
            start = slab * at_once * DEPTH
            n = min(at_once * DEPTH, n_in - start)
            for t in range(n_tokens):
                copy(x, t * n_in + start, n, slabs, (slab * slabs.shape[1] + t) * DEPTH)
            slabs[slab, n_tokens:] = 0

    return cut


@made_once
def matmul(kind: str) -> Kernel:
    """Return a kernel: matmul(W, scales, x, slabs, y, threads) does what matvec.plain_product does, for many tokens.

    W, scales   as in matvec
    x, y        (T, I) and (T, O) float32, T at least 1
    slabs       float32 of any content, of the shape slab_shape(kind, T, I)

    With "pairs" x is rounded to bf16. Where the processor is faster with pairs, panels, slabs and I count pairs of
    inputs. Elsewhere both matrices are widened to float32.
    """
    way = _way(kind)
    at_once = way.at_once
    multiply_tile = tile(TILE_ROWS, VECTORS, way.kind_of_panel, in_round=2, asks_for_next_rows=True)
    fill_panel = _panel_filler(way.kind_of_matrix)
    cut = _cutter(kind, way.copy, at_once)

    @part(kind)
    def new_panel() -> Floats:
        return floats(DEPTH * WIDTH)

    @part(kind, borrows=True)
    def multiply_slab(
        W: tuple[Bytes, Floats], slabs: Floats, block: Block, panel: Floats, sums: Floats, n_rows: int, continues: bool
    ) -> None:
        fill_panel(W[0], W[1], block, panel)
        for t in range(0, n_rows, TILE_ROWS):
            from_x, to_sums = Place(block.start * n_rows + t * DEPTH, DEPTH), Place(t * WIDTH, WIDTH)
            multiply_tile(slabs, from_x, panel, 0, block.stop - block.start, sums, to_sums, continues)

    multiply_blocks = over_blocks(multiply_slab, new_panel, DEPTH, kind)

    @kernel(types.void(BYTES, MATRIX_IN, MATRIX_IN, SLABS, MATRIX_OUT, types.intp), kind)
    def matmul(W: Bytes, scales: Floats, x: Floats, slabs: Floats, y: Floats, threads: int) -> None:
        # Slabs are copies: rows of x whose distance is a power of two push each other out of the cache.
        n_slabs, n_rows = slabs.shape[:2]
        n_in, n_blocks = x.shape[1] // at_once, (y.shape[1] + WIDTH - 1) // WIDTH
        shared_out(cut, n_slabs, threads, (x, slabs))
        shared_out(multiply_blocks, n_blocks, threads, ((W, scales), slabs, n_rows, n_in, y))

    return matmul
