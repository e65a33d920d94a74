"""Attention over the ring of a layer, with an online softmax: for one query or many, with or without a window.

    heads[t, h] = sum over s of softmax(q[t, h] . k[s, g] / sqrt(K)) v[s, g]        g = h // (H/G)

over the keys s that token t sees. The H/G query heads that share a key/value head are rows of one small matrix, so each
key is read once for all of them. softmax.py takes their scores, SPAN keys at a time. panels.py says how keys and values
lie in memory.

The work is cut by key/value head, by queries and by keys, never by the number of threads. So the result does not depend
on how many threads there are.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types

from mistral_kernels.compiling import FIRST, kernel, made_once, part
from mistral_kernels.instructions import LANES
from mistral_kernels.panels import BLOCK, HEADS_IN, PANEL
from mistral_kernels.simd import floats, load, multiply, splat, store
from mistral_kernels.softmax import SPAN, shares
from mistral_kernels.tile import tile

TOGETHER = 24  # rows of a prompt that meet a key at the same time: few enough for the first cache
SPLIT = 512  # keys in one piece of work, where there are few queries
AHEAD = 8192  # bytes to prefetch ahead: with one token, memory is the limit

# Numbers of rows in a tile. Few: the query heads of one token. Many: those of several tokens, as registers allow.
FEW_ROWS, MANY_ROWS = 4, {16: 12, 8: 6, 4: 4}[LANES]

HEADS_OUT = types.Array(types.float32, 3, "C")
PANELS = types.Array(types.uint8, 1, "C")
SEGMENTS = types.Array(types.int64, 2, "C", readonly=True)
SCALES = types.Array(types.float32, 2, "C", readonly=True)
SIGNATURE = types.void(
    HEADS_IN,
    PANELS,
    PANELS,
    SCALES,
    SCALES,
    types.intp,
    types.intp,
    SEGMENTS,
    types.intp,
    types.intp,
    HEADS_OUT,
    types.intp,
)


@part(borrows=True)
def _multiplied(source: Any, start: int, n: int, factor: float, target: Any, at: int) -> None:
    """target[at + i] = factor source[start + i] for i < n, in flat offsets."""
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        store(target, at + i, multiply(load(source, start + i), splat(factor)))
    for i in range(whole, n):
        target[at + i] = factor * source[start + i]


@part(borrows=True)
def _queries_together(group: int) -> int:
    """Return how many tokens meet a key at the same time; each has `group` rows."""
    return max(1, TOGETHER // group)


@part(borrows=True)
def _merge(m: Any, total: Any, acc: Any, width: int, g: int, n_splits: int, heads: Any, n_kv_heads: int) -> None:
    """Merge the results of the pieces g * n_splits, ..., (g + 1) * n_splits - 1; each piece had keys of its own."""
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


def _products(kind: str, n_rows: int) -> tuple[Any, Any]:
    """Return two functions: the product of some queries with keys, and the product of their shares with values."""
    multiply_tile = tile(n_rows, 2, kind, ahead=AHEAD)
    multiply_half = tile(n_rows, 1, kind, of_vectors=2, ahead=AHEAD)

    @part(kind, n_rows, borrows=True)
    def score(scaled: Any, head_dim: int, rows: int, k: Any, first_panel: int, low: int, high: int, S: Any) -> None:
        """S[row, j] = scaled[row] . k[j] for the keys low, ..., high - 1, and for some around them."""
        for panel in range(low // PANEL, (high + PANEL - 1) // PANEL):
            keys, middle = (first_panel + panel) * head_dim * PANEL, panel * PANEL + LANES
            is_half, skipped = low >= middle or high <= middle, LANES if low >= middle else 0
            for row in range(0, rows, n_rows):
                from_q, to_S = (row * head_dim, head_dim), (row * SPAN + panel * PANEL + skipped, SPAN)
                if is_half:
                    multiply_half(scaled, from_q, k, keys + skipped, head_dim, S, to_S, False)
                else:
                    multiply_tile(scaled, from_q, k, keys, head_dim, S, to_S, False)

    @part(kind, n_rows, borrows=True)
    def add_values(S: Any, rows: int, v: Any, first_block: int, low: int, high: int, n_panels: int, acc: Any) -> None:
        """acc[row] += sum of S[row, j] v[j] over the keys low, ..., high - 1."""
        for nth in range(low // BLOCK, (high + BLOCK - 1) // BLOCK):
            begin, end = max(low, nth * BLOCK), min(high, (nth + 1) * BLOCK)
            for panel in range(n_panels):
                values = ((first_block + nth) * n_panels + panel) * BLOCK + begin - nth * BLOCK
                for row in range(0, rows, n_rows):
                    from_S, to_acc = (row * SPAN + begin, SPAN), ((row * n_panels + panel) * PANEL, n_panels * PANEL)
                    multiply_tile(S, from_S, v, values * PANEL, end - begin, acc, to_acc, True)

    return score, add_values


def _attend(kind: str, n_rows: int) -> Any:
    """Return the function that lets some queries attend to some keys of one key/value head."""
    score, add_values = _products(kind, n_rows)
    into_shares = shares(kind == "int8")

    @part(kind, n_rows, borrows=True)
    def attend(
        q: Any, shape: Any, panels: Any, n_blocks: int, segments: Any, first_query: int, window: int,
        g: int, first: int, last: int, oldest: int, newest: int, sums: Any, work: Any, heads: Any,
    ) -> None:  # fmt: skip
        """Take the queries first, ..., last - 1 through the keys at positions oldest, ..., newest - 1.

        q and heads are flat; their shape is H, G, K. For row (t - first) * H/G + r of the sums, m is the largest score,
        total the sum of exp(score - m), and acc the sum of exp(score - m) v. `work` is room for the scaled queries and
        the scores. The number of rows in acc and in `work` is rounded up to whole tiles.
        """
        k, v, k_scales, v_scales = panels
        m, total, acc = sums
        scaled, S = work
        n_heads, n_kv_heads, head_dim = shape
        group, n_panels = n_heads // n_kv_heads, (head_dim + PANEL - 1) // PANEL
        width, rows = n_panels * PANEL, (last - first) * group
        own, of_token = (first * n_heads + g * group) * head_dim, n_heads * head_dim
        next_ones = own - _queries_together(group) * of_token
        scale, n = numba.float32(1 / math.sqrt(head_dim)), group * head_dim
        for t in range(last - first):
            _multiplied(q, own + t * of_token, n, scale, scaled, t * n)
        m[:rows] = -np.inf
        total[:rows] = 0
        acc[:] = 0
        for segment in range(len(segments)):
            shift = segments[segment, 2] - segments[segment, 0]  # from slot to position
            start = max(segments[segment, 0], max(oldest, first_query + first - window + 1) - shift)
            stop = min(segments[segment, 1], min(newest, first_query + last) - shift)
            if start >= stop:
                continue
            for block in range(start // BLOCK, (stop + BLOCK - 1) // BLOCK, SPAN // BLOCK):
                base = block * BLOCK + shift  # position of the first slot; all that follows counts from there
                low, high = max(start - block * BLOCK, 0), min(stop - block * BLOCK, SPAN)
                score(scaled, head_dim, rows, k, (g * n_blocks + block) * (BLOCK // PANEL), low, high, S)
                into_shares(
                    S, last - first, group, first_query + first - base, window, low, high, (k_scales, v_scales),
                    g * k_scales.shape[1] + block * BLOCK, sums, width, (q, next_ones), (heads, own),
                    (of_token, head_dim),
                )  # fmt: skip
                add_values(S, rows, v, g * n_blocks + block, low, high, n_panels, acc)

    return attend


def _thread_share(kind: str, n_rows: int) -> Any:
    """Return the function that does one thread's share of the work."""
    attend = _attend(kind, n_rows)

    @part(kind, n_rows)
    def do_share(
        q: Any, panels: Any, n_kv_heads: int, n_blocks: int, segments: Any, first_query: int, window: int,
        heads: Any, n_splits: int, split: int, m: Any, total: Any, acc: Any, thread: int, n_threads: int,
    ) -> None:  # fmt: skip
        """Do one thread's pieces of the work: every n_threads-th piece, or all pieces of every n_threads-th head.

        In the second case, merge the pieces of a head if its keys are split.
        """
        n_tokens, n_heads, head_dim = q.shape
        shape = n_heads, n_kv_heads, head_dim
        flat_q, flat_heads, flat_acc = q.reshape(-1), heads.reshape(-1), acc.reshape(-1)
        group, width = n_heads // n_kv_heads, (head_dim + PANEL - 1) // PANEL * PANEL
        n_queries = _queries_together(group)
        n_tiles = (n_tokens + n_queries - 1) // n_queries
        in_tiles = acc.shape[1] // width
        work = np.zeros(in_tiles * head_dim, np.float32), floats(in_tiles * SPAN)
        takes_heads = n_kv_heads % n_threads == 0
        n_together = n_tiles * n_splits if takes_heads else 1
        for turn in range(thread, n_kv_heads * n_tiles * n_splits // n_together, n_threads):
            for piece in range(turn * n_together, (turn + 1) * n_together):
                kept = piece if n_splits > 1 else thread
                g, start = piece // (n_tiles * n_splits), segments[0, 2] + piece % n_splits * split
                first = (n_tiles - 1 - piece // n_splits % n_tiles) * n_queries  # those that see most keys first
                last = min(first + n_queries, n_tokens)
                attend(
                    flat_q, shape, panels, n_blocks, segments, first_query, window, g, first, last,
                    start, min(start + split, first_query + n_tokens), (m[kept], total[kept], acc[kept]), work,
                    flat_heads,
                )  # fmt: skip
                if n_splits == 1:
                    for row in range((last - first) * group):
                        h = (first + row // group) * n_heads + g * group + row % group
                        share = numba.float32(1) / total[kept, row]
                        _multiplied(
                            flat_acc, (kept * in_tiles + row) * width, head_dim, share, flat_heads, h * head_dim
                        )
            if n_splits > 1 and takes_heads:
                _merge(m, total, acc, width, turn, n_splits, heads, n_kv_heads)

    return do_share


@made_once
def attention(kind: str, n_rows: int) -> Any:
    """Return a kernel.

    attention(q, k, v, k_scales, v_scales, n_kv_heads, n_blocks, segments, first_query, window, heads, n_threads)

    kind            the kind of numbers in the store: "f32", "f16", "bf16", "int8"
    n_rows          rows of a tile: FEW_ROWS or MANY_ROWS

    q, heads        (T, H, K) float32
    k, v            a PanelStore's arrays as bytes, of n_blocks blocks a head
    k_scales, v_scales    a PanelStore's, not read unless kind is "int8"
    segments        (n, 3): a row for each run of neighbouring slots, the oldest keys first. A row holds the first slot,
                    the slot after the last one, and the position of the key in the first slot
    first_query     position of q[0]
    window          how many keys a query sees, itself included
    """
    do_share = _thread_share(kind, n_rows)

    @kernel(SIGNATURE, kind, n_rows)
    def attention(
        q: Any, k: Any, v: Any, k_scales: Any, v_scales: Any, n_kv_heads: int, n_blocks: int, segments: Any,
        first_query: int, window: int, heads: Any, n_threads: int,
    ) -> None:  # fmt: skip
        n_tokens, n_heads, head_dim = q.shape
        group, width = n_heads // n_kv_heads, (head_dim + PANEL - 1) // PANEL * PANEL
        n_queries = _queries_together(group)
        n_tiles = (n_tokens + n_queries - 1) // n_queries
        oldest, newest = segments[0, 2], first_query + n_tokens
        # Few queries: their keys are split, and each piece keeps its sums. Many queries: all keys are one piece.
        n_splits = (newest - oldest + SPLIT - 1) // SPLIT if n_tiles == 1 else 1
        split = SPLIT if n_splits > 1 else newest - oldest
        panels = k, v, k_scales, v_scales
        n_kept, most_rows = n_kv_heads * n_splits if n_splits > 1 else n_threads, min(n_tokens, n_queries) * group
        row_size = most_rows + 64  # so no two threads write to one cache line, or to two that are fetched together
        m, total = np.empty((n_kept, row_size), np.float32), np.empty((n_kept, row_size), np.float32)
        in_tiles = (most_rows + n_rows - 1) // n_rows * n_rows
        acc = floats(n_kept * in_tiles * width).reshape((n_kept, in_tiles * width))
        if n_threads == 1:
            do_share(
                q, panels, n_kv_heads, n_blocks, segments, first_query, window, heads, n_splits, split, m, total, acc,
                FIRST, n_threads,
            )  # fmt: skip
        else:
            for index in numba.prange(n_threads):  # `index` is unsigned; with a signed number it would give floats
                do_share(
                    q, panels, n_kv_heads, n_blocks, segments, first_query, window, heads, n_splits, split, m, total,
                    acc, numba.intp(index), n_threads,
                )  # fmt: skip
        if n_splits > 1 and n_kv_heads % n_threads:
            for g in range(n_kv_heads):
                _merge(m, total, acc, width, g, n_splits, heads, n_kv_heads)

    return attention
