"""Matrix times one vector, or a few, for decoding: y[o] = sum over i of W[o, i] x[i], with W as it lies in the file.

The limit is the memory's speed. So each number of W is read once, and used at once for all its products. Each thread
cuts its rows into eight parts. It reads the eight parts at the same time, as eight streams. A stream reads one row of
its part after the other. That gives eight sums that do not wait for each other, and one load of x serves all eight. The
streams are long because a new stream is slow at first. Each stream prefetches its next bytes.

A few tokens can share one read of W. Some rows are multiplied with four tokens at a time. So each number of W is
widened to float32 once for four products. Tokens after the first four find the rows in the processor's cache. Up to
four tokens cost about as much as one.

A bf16 matrix can be multiplied as pairs: two neighbouring numbers of a row are one pair, and x is rounded to bf16. That
halves the work on processors that multiply and add pairs (pairs.pair_products).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import types

from mistral_kernels.arrays import BYTES, MATRIX_IN, MATRIX_OUT, Bytes, Floats, Kernel, Part
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.processor import LANES
from mistral_kernels.rows import row_sums
from mistral_kernels.sharing import shared_out
from mistral_kernels.simd import load_part, store_rounded
from mistral_kernels.stored import Rows

# Rows and tokens that are multiplied together in registers, for one token and for a few: their sums, the numbers of the
# rows, and those of one token.
ONE, FEW = (8, 1), (6, 4) if LANES == 16 else (4, 4)
FP8_BLOCK = 128  # fp8 matrices have a scale for every 128 x 128 weights


@part(borrows=True)
def scale_of(scales: Floats, o: int, i: int) -> float:
    """Return the scale of the fp8 weight W[o, i]."""
    return scales[min(o // FP8_BLOCK, len(scales) - 1), min(i // FP8_BLOCK, scales.shape[1] - 1)]


@part(borrows=True)
def round_to_pairs(x: Floats, start: int, n: int, pairs: Floats, at: int) -> None:
    """Put x[start : start + n], rounded to bf16, into pairs[at:], in whole vectors; x is flat."""
    for i in range(0, n, LANES):
        store_rounded(pairs, 2 * at + i, load_part(x, start + i, min(n - i, LANES)))


@part()
def in_pairs(x: Floats) -> Any:
    """Return x rounded to bf16, as len(x) // 2 pairs. The length of x is even."""
    pairs = np.empty((len(x) + LANES - 1) // LANES * LANES // 2, np.float32)
    round_to_pairs(x, 0, len(x), pairs, 0)
    return pairs[: len(x) // 2]


@part()
def as_it_is(x: Floats) -> Any:
    """Return x."""
    return x


def _over_rows(kind: str, n_rows: int, n_tokens: int) -> Part:
    """Return the function that multiplies some rows of a matrix with all tokens.

    n_rows rows are multiplied with n_tokens tokens at a time. Each row and token have a sum of their own.
    """
    no_sums, add_products, add_products_part, totals = row_sums(kind, n_rows, n_tokens)
    is_scaled = kind == "fp8"

    @part(kind, n_rows, n_tokens)
    def multiply_rows(first: int, last: int, W: Bytes, scales: Floats, x: Floats, y: Floats, n_x: int) -> None:
        """Compute the rows first, ..., last - 1 of n_x tokens; x and y are flat."""
        n_in, n_out, stride = len(x) // n_x, len(y) // n_x, (last - first + n_rows - 1) // n_rows
        block = FP8_BLOCK if is_scaled else n_in  # inputs that share a scale
        for o in range(first, first + stride):
            rows = Rows(o * n_in, stride * n_in, (last - 1) * n_in)
            for start in range(0, n_in, block):
                stop = min(start + block, n_in)
                for t in range(0, n_x, n_tokens):
                    tokens = Rows(t * n_in, n_in, (n_x - 1) * n_in)
                    sums = no_sums()
                    for i in range(start, stop - 2 * LANES + 1, 2 * LANES):
                        sums = add_products(sums, W, rows, x, tokens, i)
                        sums = add_products(sums, W, rows, x, tokens, i + LANES)
                    for i in range(start + (stop - start) // (2 * LANES) * (2 * LANES), stop, LANES):
                        sums = add_products_part(sums, W, rows, x, tokens, i, min(stop - i, LANES))
                    y_rows = totals(sums)
                    for number in range(n_rows * n_tokens):
                        row, token = o + number // n_tokens * stride, t + number % n_tokens
                        if row >= last or token >= n_x:
                            continue
                        place = token * n_out + row
                        if is_scaled:
                            before = y[place] if start else numba.float32(0.0)
                            y[place] = y_rows[number] * scale_of(scales, row, start) + before
                        else:
                            y[place] = y_rows[number]

    return multiply_rows


def plain_product(W: Floats, x: Floats, y: Floats) -> None:
    """y[t, o] = sum over i of W[o, i] x[t, i]; W is (O, I), x (T, I), y (T, O)."""
    for t in range(len(x)):
        for o in range(len(W)):
            total = 0.0
            for i in range(W.shape[1]):
                total += W[o, i] * x[t, i]
            y[t, o] = total


@made_once
def matvec(kind: str, meeting: tuple[int, int]) -> Kernel:
    """Return a kernel: matvec(W, scales, x, y, threads) does what plain_product does, with W as it lies in the file.

    meeting     ONE or FEW: how many rows and tokens are multiplied together
    W           O * I numbers of the kind, row after row, as bytes (uint8); "pairs" are bf16, and I is even
    scales      of fp8 weights: float32 (1, 1) or (ceil(O/128), ceil(I/128)); not read for other kinds
    x, y        (T, I) and (T, O) float32, T at least 1
    """
    inputs = in_pairs if kind == "pairs" else as_it_is
    multiply_rows = _over_rows(kind, *meeting)

    @kernel(types.void(BYTES, MATRIX_IN, MATRIX_IN, MATRIX_OUT, types.intp), kind, *meeting)
    def matvec(W: Bytes, scales: Floats, x: Floats, y: Floats, threads: int) -> None:
        q = inputs(x.reshape(-1))
        shared_out(multiply_rows, y.shape[1], threads, (W, scales, q, y.reshape(-1), len(y)))

    return matvec
