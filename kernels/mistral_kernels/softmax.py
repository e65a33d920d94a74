"""The online softmax of attention: it turns the scores of some rows into shares, SPAN keys at a time.

    share[r, s] = exp(score[r, s] - m[r])        total[r] = sum over s of share[r, s]        acc[r] = share[r] V

m[r] is the largest score of row r so far. When a larger score turns up, the sums are scaled down (Milakov and
Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). So the scores of a span can be dropped after that
span. With int8 keys and values, a score is multiplied by its key's scale, and a share by its value's scale.

    for r in range(rows):
        before, m[r] = m[r], max(m[r], max(score[r, s] for s in seen[r]))
        share[r] = [exp(score[r, s] - m[r]) if s in seen[r] else 0 for s in span]
        total[r] = total[r] * exp(before - m[r]) + sum(share[r])
        acc[r] = acc[r] * exp(before - m[r]) + share[r] @ V
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np

from mistral_kernels.arrays import Floats, Part
from mistral_kernels.compiling import part
from mistral_kernels.panels import BLOCK
from mistral_kernels.processor import LANES
from mistral_kernels.simd import exp, larger, largest_of, load, splat, store, sum_of, within, zeros

SPAN = 4 * BLOCK  # keys that go through a softmax together


class Sums(NamedTuple):
    """What is known of some rows so far: for each row the largest score, the total, and the weighted sum of values."""

    largest: Floats  # m
    total: Floats
    weighted: Floats  # acc, a row after the other
    width: int  # numbers in a row of acc


class Span(NamedTuple):
    """The keys low, ..., high - 1 of a span, and the tokens whose queries meet them.

    The `group` rows of a token see the same keys. `newest` is the number of the first token's own key.
    """

    low: int
    high: int
    n_tokens: int
    group: int
    newest: int
    window: int


class Scales(NamedTuple):
    """The scales of a span's int8 keys, or of its values: those of its key 0 lie at `first`."""

    numbers: Floats
    first: int


@part(borrows=True)
def _seen(span: Span, t: int) -> tuple[int, int]:
    """Return the first key and the end of the keys that token t sees.

    The rule is that of mistral_ref's `attends`: 0 <= query - key < window.
    """
    query = span.newest + t
    return max(span.low, query - span.window + 1), min(span.high, query + 1)


@part(borrows=True)
def _multiply_by_scales(S: Floats, row: int, low: int, high: int, scales: Scales) -> None:
    """Multiply a row's numbers in S for the keys low, ..., high - 1 by the scales of these keys."""
    for j in range(low // LANES * LANES, high, LANES):
        store(S, row * SPAN + j, load(S, row * SPAN + j) * load(scales.numbers, scales.first + j))


@part(borrows=True)
def _nothing(S: Floats, row: int, low: int, high: int) -> None:
    """Set a row of S to 0 from `low`, where a vector begins, up to `high`."""
    for j in range(low, high, LANES):
        store(S, row * SPAN + j, zeros())


@part(borrows=True)
def _raise_largest(S: Floats, row: int, low: int, high: int, sums: Sums) -> None:
    """Raise m[row] to the largest of a row's scores low, ..., high - 1, and scale the row's total and acc down."""
    is_whole = high - low == SPAN  # as nearly all are where there is no window
    maximum = splat(-np.inf)
    for j in range(low // LANES * LANES, high, LANES):
        score = load(S, row * SPAN + j)
        maximum = larger(maximum, score if is_whole else within(score, low - j, high - j, -np.inf))
    before, now = sums.largest[row], max(sums.largest[row], largest_of(maximum))
    sums.largest[row] = now
    if -np.inf < before < now:
        shrink = numba.float32(math.exp(before - now))
        sums.total[row] *= shrink
        for i in range(row * sums.width, (row + 1) * sums.width, LANES):
            store(sums.weighted, i, load(sums.weighted, i) * shrink)


@part(borrows=True)
def _exponentials(S: Floats, row: int, low: int, high: int, span: Span, sums: Sums) -> None:
    """Turn a row's scores low, ..., high - 1 into shares, and set its others in the span to 0."""
    first, last = low // LANES * LANES, (high + LANES - 1) // LANES * LANES  # whole vectors around them
    is_whole = high - low == SPAN
    summed = zeros()
    for j in range(first, last, LANES):
        share = exp(load(S, row * SPAN + j) - sums.largest[row])
        share = share if is_whole else within(share, low - j, high - j, 0.0)
        store(S, row * SPAN + j, share)
        summed = summed + share
    sums.total[row] += sum_of(summed)
    _nothing(S, row, span.low // LANES * LANES, first)
    _nothing(S, row, last, span.high)


def softmax_parts(has_scales: bool) -> tuple[Part, Part]:
    """Return two functions, which together turn each row's scores into shares, those of unseen keys into 0.

    They take turns over all rows: a row waits for its largest score, and meanwhile other rows' can be found.
    """

    @part(has_scales, borrows=True)
    def raise_largest(S: Floats, span: Span, scales: Scales, sums: Sums) -> None:
        """Find the largest score of each row; scores of int8 keys are multiplied by their scales first."""
        for t in range(span.n_tokens):
            low, high = _seen(span, t)
            if low < high:
                for row in range(t * span.group, (t + 1) * span.group):
                    if has_scales:
                        _multiply_by_scales(S, row, low, high, scales)
                    _raise_largest(S, row, low, high, sums)

    @part(has_scales, borrows=True)
    def take_exponentials(S: Floats, span: Span, scales: Scales, sums: Sums) -> None:
        """Turn scores into shares; shares of int8 values are multiplied by their scales afterwards."""
        for t in range(span.n_tokens):
            low, high = _seen(span, t)
            for row in range(t * span.group, (t + 1) * span.group):
                if low < high:
                    _exponentials(S, row, low, high, span, sums)
                    if has_scales:
                        _multiply_by_scales(S, row, low, high, scales)
                else:
                    _nothing(S, row, span.low // LANES * LANES, span.high)

    return raise_largest, take_exponentials
