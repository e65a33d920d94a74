"""The online softmax of attention: it turns the scores of some rows into shares, SPAN keys at a time.

    share[r, s] = exp(score[r, s] - m[r])        total[r] = sum over s of share[r, s]        acc[r] = share[r] V

m[r] is the largest score of row r so far. When a larger score turns up, the sums are scaled down (Milakov and
Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). So the scores of a span can be dropped after that
span. With int8 keys and values, a score is multiplied by its key's scale, and a share by its value's scale.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from mistral_kernels.compiling import part
from mistral_kernels.instructions import LANES
from mistral_kernels.panels import BLOCK
from mistral_kernels.simd import (
    add,
    ask_for,
    exp,
    larger,
    largest_of,
    load,
    multiply,
    splat,
    store,
    subtract,
    sum_of,
    within,
    zeros,
)

SPAN = 4 * BLOCK  # keys that go through a softmax together


@part(borrows=True)
def _seen(newest: int, window: int, low: int, high: int) -> tuple[int, int]:
    """Return the first key and the end of the keys that a query sees, within low, ..., high - 1.

    `newest` is the query's own key. The rule is that of mistral_ref's `attends`: 0 <= query - key < window.
    """
    return max(low, newest - window + 1), min(high, newest + 1)


@part(borrows=True)
def _multiply_by_scales(S: Any, row: int, low: int, high: int, scales: Any, first_scale: int) -> None:
    """Multiply a row's numbers in S for the keys low, ..., high - 1 by the scales of these keys."""
    for j in range(low // LANES * LANES, high, LANES):
        store(S, row * SPAN + j, multiply(load(S, row * SPAN + j), load(scales, first_scale + j)))


@part(borrows=True)
def _nothing(S: Any, row: int, low: int, high: int) -> None:
    """Set a row of S to 0 from `low`, where a vector begins, up to `high`."""
    for j in range(low, high, LANES):
        store(S, row * SPAN + j, zeros())


@part(borrows=True)
def _raise_largest(S: Any, row: int, low: int, high: int, m: Any, total: Any, acc: Any, width: int) -> None:
    """Raise m[row] to the largest of a row's scores low, ..., high - 1, and scale the row's total and acc down."""
    is_whole = high - low == SPAN  # as nearly all are where there is no window
    maximum = splat(-np.inf)
    for j in range(low // LANES * LANES, high, LANES):
        score = load(S, row * SPAN + j)
        maximum = larger(maximum, score if is_whole else within(score, low - j, high - j, -np.inf))
    before, now = m[row], max(m[row], largest_of(maximum))
    m[row] = now
    if -np.inf < before < now:
        shrink = numba.float32(math.exp(before - now))
        total[row] *= shrink
        for i in range(row * width, (row + 1) * width, LANES):
            store(acc, i, multiply(load(acc, i), splat(shrink)))


@part(borrows=True)
def _exponentials(S: Any, row: int, low: int, high: int, all_low: int, all_high: int, m: Any, total: Any) -> None:
    """Turn a row's scores low, ..., high - 1 into shares, and set its others from all_low to all_high to 0."""
    first, last = low // LANES * LANES, (high + LANES - 1) // LANES * LANES  # whole vectors around them
    is_whole = high - low == SPAN
    summed = zeros()
    for j in range(first, last, LANES):
        share = exp(subtract(load(S, row * SPAN + j), splat(m[row])))
        share = share if is_whole else within(share, low - j, high - j, 0.0)
        store(S, row * SPAN + j, share)
        summed = add(summed, share)
    total[row] += sum_of(summed)
    _nothing(S, row, all_low // LANES * LANES, first)
    _nothing(S, row, last, all_high)


def shares(has_scales: bool) -> Any:
    """Return the function that turns the scores of some tokens' queries into shares."""

    @part(has_scales, borrows=True)
    def into_shares(
        S: Any, n_tokens: int, group: int, newest: int, window: int, low: int, high: int, scales: Any, first_scale: int,
        sums: Any, width: int, first_asked: Any, then_asked: Any, strides: Any,
    ) -> None:  # fmt: skip
        """Turn each row's scores of the keys low, ..., high - 1 of a span into shares, those unseen into 0.

        The `group` rows of a token see the same keys. `newest` is the number of the first token's own key.

        scales          of keys and of values; those of this span start at first_scale
        sums            m, total and acc; a row of acc has `width` numbers
        first_asked, then_asked     an array, and where in it the first row lies of what will be needed: a softmax
                        leaves the memory idle, so it is asked for here
        strides         from token to token and from row to row, of what is asked for
        """
        k_scales, v_scales = scales
        m, total, acc = sums
        of_token, of_row = strides
        for t in range(n_tokens):
            t_low, t_high = _seen(newest + t, window, low, high)
            for r in range(group):
                ask_for(first_asked[0], first_asked[1] + t * of_token + r * of_row, of_row)
                row = t * group + r
                if t_low < t_high:
                    if has_scales:
                        _multiply_by_scales(S, row, t_low, t_high, k_scales, first_scale)
                    _raise_largest(S, row, t_low, t_high, m, total, acc, width)
        # In a loop of its own: a row waits for its largest score, and meanwhile other rows' can be found.
        for t in range(n_tokens):
            t_low, t_high = _seen(newest + t, window, low, high)
            for r in range(group):
                ask_for(then_asked[0], then_asked[1] + t * of_token + r * of_row, of_row)
                row = t * group + r
                if t_low < t_high:
                    _exponentials(S, row, t_low, t_high, low, high, m, total)
                    if has_scales:
                        _multiply_by_scales(S, row, t_low, t_high, v_scales, first_scale)
                else:
                    _nothing(S, row, low // LANES * LANES, high)

    return into_shares
