"""Attention over the ring of a layer, with an online softmax: for one query or many, with or without a window.

    heads[t, h] = sum over s of softmax(q[t, h] . k[s, g] / sqrt(K)) v[s, g]        g = h // (H/G)

over the keys s that t sees. The H/G query heads that share a key/value head are rows of one small matrix, so that each
key is read once for all of them. SPAN keys go through a softmax together. For each row the largest score so far is
kept, and what has been summed up is scaled down when a larger one turns up (Milakov and Gimelshein 2018,
arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), so that no score outlives its span.

Keys and values lie as panels.py says. Of int8, a score is multiplied by the step of its key, a share by that of its
value, before it meets the value.

Work is cut by key/value head, queries and keys, never by the number of threads, so the result does not depend on it.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types

from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.instructions import LANES
from mistral_kernels.panels import BLOCK, HEADS_IN, PANEL
from mistral_kernels.simd import (
    add,
    exp,
    floats,
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
from mistral_kernels.tile import tile

SPAN = 4 * BLOCK  # keys that go through a softmax together
TOGETHER = 24  # rows of a prompt that go through the keys together: few enough for the first cache
SPLIT = 512  # keys that one piece of work goes through, for few queries
AHEAD = 8192  # bytes; how far ahead keys and values are asked for: one token uses them as fast as memory gives them

# Rows of a tile: the query heads of one token, or those of several, as many as the registers hold.
FEW_ROWS, MANY_ROWS = 4, {16: 12, 8: 6, 4: 4}[LANES]

HEADS_OUT = types.Array(types.float32, 3, "C")
PANELS = types.Array(types.uint8, 1, "C")
SEGMENTS = types.Array(types.int64, 2, "C", readonly=True)
STEPS = types.Array(types.float32, 2, "C", readonly=True)


@part()
def _scale(S: Any, row: int, low: int, high: int, steps: Any, g: int, slot: int) -> None:
    """Multiply what a row of S holds for the keys low, ..., high - 1, counted from a slot, by their steps."""
    for j in range(low // LANES * LANES, high, LANES):
        store(S, row * SPAN + j, multiply(load(S, row * SPAN + j), load(steps, g * steps.shape[1] + slot + j)))


@part()
def _nothing(S: Any, row: int, low: int, high: int) -> None:
    """Turn the vectors of a row of S from `low` on, where one begins, up to `high` into 0."""
    for j in range(low, high, LANES):
        store(S, row * SPAN + j, zeros())


@part()
def _softmax(
    S: Any, row: int, low: int, high: int, all_low: int, all_high: int, m: Any, total: Any, acc: Any, width: int
) -> None:
    """Turn the scores low, ..., high - 1 of a row of S into exp(score - m), the others from all_low to all_high into 0.

    m[row] becomes the largest score so far, and what total and acc hold for the row is scaled down if it has grown.
    """
    at = row * SPAN
    first, last = low // LANES * LANES, (high + LANES - 1) // LANES * LANES  # whole vectors around them
    is_whole = high - low == SPAN  # as nearly all are
    maximum = splat(-np.inf)
    for j in range(first, last, LANES):
        score = load(S, at + j)
        maximum = larger(maximum, score if is_whole else within(score, low - j, high - j, -np.inf))
    before, now = m[row], max(m[row], largest_of(maximum))
    summed = zeros()
    for j in range(first, last, LANES):
        share = exp(subtract(load(S, at + j), splat(now)))
        share = share if is_whole else within(share, low - j, high - j, 0.0)
        store(S, at + j, share)
        summed = add(summed, share)
    _nothing(S, row, all_low // LANES * LANES, first)
    _nothing(S, row, last, all_high)
    # Each array is used on every way through: those last used in a branch would have their references counted.
    has_grown = now != before
    shrink = numba.float32(math.exp(before - now)) if has_grown else numba.float32(1)
    m[row] = now
    total[row] = total[row] * shrink + sum_of(summed)
    for i in range(row * width, row * width + (width if has_grown else 0), LANES):
        store(acc, i, multiply(load(acc, i), splat(shrink)))


@part()
def _scaled_queries(q: Any, n_kv_heads: int, g: int, first: int, last: int, n_rows: int) -> Any:
    """Return q / sqrt(K) of the heads that share key/value head g: a row (K,) for each token, then for each head.

    There are n rows; those beyond the last are 0.
    """
    n_heads, head_dim = q.shape[1:]
    group, scale = n_heads // n_kv_heads, numba.float32(1 / math.sqrt(head_dim))
    scaled = floats(n_rows * head_dim)
    scaled[(last - first) * group * head_dim :] = 0
    for row in range((last - first) * group):
        for i in range(head_dim):
            scaled[row * head_dim + i] = q[first + row // group, g * group + row % group, i] * scale
    return scaled


@part()
def _queries_together(group: int) -> int:
    """Return how many tokens go through the keys together, of which each is `group` rows."""
    return max(1, TOGETHER // group)


@part()
def _merge(m: Any, total: Any, acc: Any, width: int, g: int, n_splits: int, heads: Any, n_kv_heads: int) -> None:
    """Put together what the pieces g * n_splits, ..., (g + 1) * n_splits - 1 have found, each for keys of its own."""
    n_tokens, n_heads, head_dim = heads.shape
    group = n_heads // n_kv_heads
    for row in range(n_tokens * group):
        t, h = row // group, g * group + row % group
        largest = numba.float32(-np.inf)
        for piece in range(g * n_splits, (g + 1) * n_splits):
            largest = max(largest, m[piece, row])
        summed = numba.float32(0)
        heads[t, h] = 0
        for piece in range(g * n_splits, (g + 1) * n_splits):
            share = numba.float32(math.exp(m[piece, row] - largest))
            summed += share * total[piece, row]
            for i in range(head_dim):
                heads[t, h, i] += share * acc[piece, row * width + i]
        for i in range(head_dim):
            heads[t, h, i] /= summed


def _shares(has_steps: bool) -> Any:
    """Return the part of a kernel that turns the scores of some queries into shares."""

    @part(has_steps)
    def into_shares(
        S: Any, rows: int, group: int, query: int, window: int, low: int, high: int, k_steps: Any, v_steps: Any,
        g: int, slot: int, m: Any, total: Any, acc: Any, width: int,
    ) -> None:  # fmt: skip
        """Turn each row's scores of the keys low, ..., high - 1, counted from a slot, into shares, those unseen into 0.

        query       of row 0, counted from the slot too
        """
        for row in range(rows):
            newest = query + row // group
            row_low, row_high = max(low, newest - window + 1), min(high, newest + 1)
            if row_low < row_high:
                if has_steps:
                    _scale(S, row, row_low, row_high, k_steps, g, slot)
                _softmax(S, row, row_low, row_high, low, high, m, total, acc, width)
                if has_steps:
                    _scale(S, row, row_low, row_high, v_steps, g, slot)
            else:
                _nothing(S, row, low // LANES * LANES, high)

    return into_shares


def _attend(kind: str, n_rows: int) -> Any:
    """Return the part of a kernel that takes some queries through some keys of one key/value head."""
    multiply_tile = tile(n_rows, 2, kind, AHEAD)
    into_shares = _shares(kind == "int8")

    @part(kind, n_rows)
    def attend(
        q: Any, panels: Any, n_kv_heads: int, n_blocks: int, segments: Any, first_query: int, window: int,
        g: int, first: int, last: int, oldest: int, newest: int, m: Any, total: Any, acc: Any,
    ) -> None:  # fmt: skip
        """Take the queries first, ..., last - 1 through the keys at positions oldest, ..., newest - 1.

        For row (t - first) * H/G + r: m is the largest score, total the sum of exp(score - m), acc that of
        exp(score - m) v, with room for the rows of whole tiles.
        """
        k, v, k_steps, v_steps = panels
        n_heads, head_dim = q.shape[1:]
        group, n_panels = n_heads // n_kv_heads, (head_dim + PANEL - 1) // PANEL
        width, rows = n_panels * PANEL, (last - first) * group
        in_tiles = len(acc) // width
        scaled = _scaled_queries(q, n_kv_heads, g, first, last, in_tiles)
        S = floats(in_tiles * SPAN)
        m[:rows] = -np.inf
        total[:rows] = 0
        acc[: in_tiles * width] = 0
        for segment in range(len(segments)):
            shift = segments[segment, 2] - segments[segment, 0]  # from slot to position
            start = max(segments[segment, 0], max(oldest, first_query + first - window + 1) - shift)
            stop = min(segments[segment, 1], min(newest, first_query + last) - shift)
            if start >= stop:
                continue
            for block in range(start // BLOCK, (stop + BLOCK - 1) // BLOCK, SPAN // BLOCK):
                base = block * BLOCK + shift  # position of the first slot; all that follows counts from there
                low, high = max(start - block * BLOCK, 0), min(stop - block * BLOCK, SPAN)
                for panel in range(low // PANEL, (high + PANEL - 1) // PANEL):
                    keys = ((g * n_blocks + block) * (BLOCK // PANEL) + panel) * head_dim * PANEL
                    for row in range(0, rows, n_rows):
                        from_q, to_S = (row * head_dim, head_dim), (row * SPAN + panel * PANEL, SPAN)
                        multiply_tile(scaled, from_q, k, keys, head_dim, S, to_S, False)
                into_shares(
                    S, rows, group, first_query + first - base, window, low, high, k_steps, v_steps, g, block * BLOCK,
                    m, total, acc, width,
                )  # fmt: skip
                for nth in range(low // BLOCK, (high + BLOCK - 1) // BLOCK):
                    begin, end = max(low, nth * BLOCK), min(high, (nth + 1) * BLOCK)
                    for panel in range(n_panels):
                        values = ((g * n_blocks + block + nth) * n_panels + panel) * BLOCK + begin - nth * BLOCK
                        for row in range(0, rows, n_rows):
                            from_S, to_acc = (row * SPAN + begin, SPAN), (row * width + panel * PANEL, width)
                            multiply_tile(S, from_S, v, values * PANEL, end - begin, acc, to_acc, True)

    return attend


def _turns(kind: str, n_rows: int) -> Any:
    """Return the part of a kernel that does a thread's share of the work."""
    attend = _attend(kind, n_rows)

    @part(kind, n_rows)
    def take_turns(
        q: Any, panels: Any, n_kv_heads: int, n_blocks: int, segments: Any, first_query: int, window: int,
        heads: Any, n_splits: int, split: int, m: Any, total: Any, acc: Any, thread: int, n_threads: int,
    ) -> None:  # fmt: skip
        """Do every n_threads-th piece of the work, or all pieces of every n_threads-th head, and put those together."""
        n_tokens, n_heads, head_dim = q.shape
        group, width = n_heads // n_kv_heads, (head_dim + PANEL - 1) // PANEL * PANEL
        n_queries = _queries_together(group)
        n_tiles = (n_tokens + n_queries - 1) // n_queries
        takes_heads = n_kv_heads % n_threads == 0
        n_together = n_tiles * n_splits if takes_heads else 1
        for turn in range(thread, n_kv_heads * n_tiles * n_splits // n_together, n_threads):
            for piece in range(turn * n_together, (turn + 1) * n_together):
                kept = piece if n_splits > 1 else thread
                g, start = piece // (n_tiles * n_splits), segments[0, 2] + piece % n_splits * split
                first = (n_tiles - 1 - piece // n_splits % n_tiles) * n_queries  # those with most keys come first
                last = min(first + n_queries, n_tokens)
                attend(
                    q, panels, n_kv_heads, n_blocks, segments, first_query, window, g, first, last,
                    start, min(start + split, first_query + n_tokens), m[kept], total[kept], acc[kept],
                )  # fmt: skip
                if n_splits == 1:
                    for row in range((last - first) * group):
                        t, h, summed = first + row // group, g * group + row % group, total[kept, row]
                        for i in range(head_dim):
                            heads[t, h, i] = acc[kept, row * width + i] / summed
            if n_splits > 1 and takes_heads:
                _merge(m, total, acc, width, turn, n_splits, heads, n_kv_heads)

    return take_turns


@made_once
def attention(kind: str, n_rows: int) -> Any:
    """Return a kernel: attention(q, k, v, k_steps, v_steps, n_kv_heads, n_blocks, segments, first_query, window, heads,
    n_threads).

    kind            of the numbers in the store: "f32", "f16", "bf16", "int8"
    n_rows          rows of a tile: FEW_ROWS or MANY_ROWS

    q, heads        (T, H, K) float32
    k, v            a PanelStore's arrays as bytes, of n_blocks blocks a head
    k_steps, v_steps    a PanelStore's, not read unless kind is "int8"
    segments        (n, 3): first slot, slot past the last one, and position of the key in the first, oldest key first
    first_query     position of q[0]
    window          how many keys a query sees, itself included
    """
    take_turns = _turns(kind, n_rows)

    @kernel(
        types.void(
            HEADS_IN,
            PANELS,
            PANELS,
            STEPS,
            STEPS,
            types.intp,
            types.intp,
            SEGMENTS,
            types.intp,
            types.intp,
            HEADS_OUT,
            types.intp,
        ),
        kind,
        n_rows,
    )
    def attention(
        q: Any, k: Any, v: Any, k_steps: Any, v_steps: Any, n_kv_heads: int, n_blocks: int, segments: Any,
        first_query: int, window: int, heads: Any, n_threads: int,
    ) -> None:  # fmt: skip
        n_tokens, n_heads, head_dim = q.shape
        group, width = n_heads // n_kv_heads, (head_dim + PANEL - 1) // PANEL * PANEL
        n_queries = _queries_together(group)
        n_tiles = (n_tokens + n_queries - 1) // n_queries
        oldest, newest = segments[0, 2], first_query + n_tokens
        # Few queries: their keys are split, and each piece keeps what it found. Many: all keys are one piece.
        n_splits = (newest - oldest + SPLIT - 1) // SPLIT if n_tiles == 1 else 1
        split = SPLIT if n_splits > 1 else newest - oldest
        panels = k, v, k_steps, v_steps
        n_kept, most_rows = n_kv_heads * n_splits if n_splits > 1 else n_threads, min(n_tokens, n_queries) * group
        apart = most_rows + 64  # no two threads write to one cache line, nor to the one that is fetched with it
        m, total = np.empty((n_kept, apart), np.float32), np.empty((n_kept, apart), np.float32)
        in_tiles = (most_rows + n_rows - 1) // n_rows * n_rows
        acc = floats(n_kept * in_tiles * width).reshape((n_kept, in_tiles * width))
        if n_threads == 1:
            take_turns(
                q, panels, n_kv_heads, n_blocks, segments, first_query, window, heads, n_splits, split, m, total, acc,
                0, 1,
            )  # fmt: skip
        else:
            for index in numba.prange(n_threads):  # unsigned numbers, which become floats beside signed ones
                take_turns(
                    q, panels, n_kv_heads, n_blocks, segments, first_query, window, heads, n_splits, split, m, total,
                    acc, numba.intp(index), n_threads,
                )  # fmt: skip
        if n_splits > 1 and n_kv_heads % n_threads:
            for g in range(n_kv_heads):
                _merge(m, total, acc, width, g, n_splits, heads, n_kv_heads)

    return attention
