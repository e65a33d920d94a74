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
from typing import NamedTuple

import numba
import numpy as np
from numba import types

from mistral_kernels.arrays import HEADS_IN, HEADS_OUT, Bytes, Floats, Integers, Kernel, Part, written
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.panels import BLOCK, PANEL, PanelStore
from mistral_kernels.processor import LANES
from mistral_kernels.sharing import count_of, shared_out
from mistral_kernels.simd import ask_for, floats, load, store
from mistral_kernels.softmax import SPAN, Scales, Span, Sums, softmax_parts
from mistral_kernels.stored import Place
from mistral_kernels.tile import tile

TOGETHER = 24  # rows of a prompt that meet a key at the same time: few enough for the first cache
SPLIT = 512  # keys in one piece of work, where there are few queries
FEW_TOKENS = 24  # at most these many tokens have few queries
AHEAD = 8192  # bytes to prefetch ahead: with one token, memory is the limit

# Numbers of rows in a tile. Few: the query heads of one token. Many: those of several tokens, as registers allow.
FEW_ROWS, MANY_ROWS = 4, {16: 12, 8: 6, 4: 4}[LANES]


class Keys(NamedTuple):
    """Where the keys lie that a pass may see.

    segments        (n, 3): a row for each run of neighbouring slots, the oldest keys first. A row holds the first slot,
                    the slot after the last one, and the position of the key in the first slot
    first_query     position of the first query
    window          how many keys a query sees, itself included
    """

    segments: Integers
    first_query: int
    window: int


class Queries(NamedTuple):
    """The queries of a pass, and the heads that it computes: (T, H, K), flat."""

    q: Floats
    heads: Floats
    n_tokens: int
    n_heads: int
    n_kv_heads: int
    head_dim: int


class Piece(NamedTuple):
    """Work for one thread: queries first, ..., last - 1 of head g, and keys at positions oldest, ..., newest - 1."""

    g: int
    first: int
    last: int
    oldest: int
    newest: int


class Work(NamedTuple):
    """A thread's own memory: the scaled queries of a piece, and their scores with a span of keys."""

    scaled: Floats
    S: Floats


# Arrays in a tuple must have exactly these types: Numba takes no writable array there for a read-only one.
BYTE_STORE = types.NamedTuple(
    (written(types.uint8, 4), written(types.uint8, 5), written(types.float32, 2), written(types.float32, 2)),
    PanelStore,
)
KEYS = types.NamedTuple((written(types.int64, 2), types.intp, types.intp), Keys)


@part(borrows=True)
def _multiplied(source: Floats, start: int, n: int, factor: float, target: Floats, at: int) -> None:
    """target[at + i] = factor source[start + i] for i < n, in flat offsets."""
    whole = n // LANES * LANES
    for i in range(0, whole, LANES):
        store(target, at + i, load(source, start + i) * factor)
    for i in range(whole, n):
        target[at + i] = factor * source[start + i]


@part(borrows=True)
def _queries_together(group: int) -> int:
    """Return how many tokens meet a key at the same time; each has `group` rows."""
    return max(1, TOGETHER // group)


@part(borrows=True)
def _ask_for_heads(array: Floats, queries: Queries, g: int, first: int, last: int) -> None:
    """Ask for the numbers of head g of the tokens first, ..., last - 1, which need not exist, in an array like q."""
    of_group = queries.n_heads // queries.n_kv_heads * queries.head_dim
    for t in range(first, last):
        ask_for(array, t * queries.n_heads * queries.head_dim + g * of_group, of_group)


@part(borrows=True)
def _merge(sums: Sums, g: int, cut: Cut, queries: Queries) -> None:
    """Merge the results of head g. Those of a token are in n_splits pieces; each had keys of its own."""
    head_dim, group, n_splits = queries.head_dim, queries.n_heads // queries.n_kv_heads, cut.n_splits
    for number in range(queries.n_tokens * group):
        t, row = number // group, number % (cut.n_queries * group)
        at = (t * queries.n_heads + g * group + number % group) * head_dim
        head = queries.heads[at : at + head_dim]
        first = (g * cut.n_tiles + cut.n_tiles - 1 - t // cut.n_queries) * n_splits
        largest = numba.float32(-np.inf)
        for piece in range(first, first + n_splits):
            largest = max(largest, sums.largest[piece, row])
        summed = numba.float32(0)
        head[:] = 0
        for piece in range(first, first + n_splits):
            share = numba.float32(math.exp(sums.largest[piece, row] - largest))
            summed += share * sums.total[piece, row]
            weighted = sums.weighted[piece, row * sums.width : (row + 1) * sums.width]
            for i in range(head_dim):
                head[i] += share * weighted[i]
        share = numba.float32(1) / summed  # as in _finish
        for i in range(head_dim):
            head[i] *= share


@part(borrows=True)
def _finish(sums: Sums, piece: Piece, queries: Queries) -> None:
    """Divide each row of a piece by its total: its heads are done."""
    group = queries.n_heads // queries.n_kv_heads
    for row in range((piece.last - piece.first) * group):
        h = (piece.first + row // group) * queries.n_heads + piece.g * group + row % group
        share = numba.float32(1) / sums.total[row]
        _multiplied(sums.weighted, row * sums.width, queries.head_dim, share, queries.heads, h * queries.head_dim)


def _products(kind: str, n_rows: int) -> tuple[Part, Part]:
    """Return two functions: the product of some queries with keys, and the product of their shares with values."""
    multiply_tile = tile(n_rows, 2, kind, ahead=AHEAD)
    multiply_half = tile(n_rows, 1, kind, of_vectors=2, ahead=AHEAD)

    @part(kind, n_rows, borrows=True)
    def score(work: Work, head_dim: int, rows: int, k: Bytes, first_panel: int, low: int, high: int) -> None:
        """S[row, j] = scaled[row] . k[j] for the keys low, ..., high - 1, and for some around them."""
        for panel in range(low // PANEL, (high + PANEL - 1) // PANEL):
            keys, middle = (first_panel + panel) * head_dim * PANEL, panel * PANEL + LANES
            is_half, skipped = low >= middle or high <= middle, LANES if low >= middle else 0
            for row in range(0, rows, n_rows):
                from_q, to_S = Place(row * head_dim, head_dim), Place(row * SPAN + panel * PANEL + skipped, SPAN)
                if is_half:
                    multiply_half(work.scaled, from_q, k, keys + skipped, head_dim, work.S, to_S, False)
                else:
                    multiply_tile(work.scaled, from_q, k, keys, head_dim, work.S, to_S, False)

    @part(kind, n_rows, borrows=True)
    def add_values(S: Floats, rows: int, v: Bytes, first_block: int, low: int, high: int, sums: Sums) -> None:
        """acc[row] += sum of S[row, j] v[j] over the keys low, ..., high - 1."""
        n_panels = sums.width // PANEL
        for nth in range(low // BLOCK, (high + BLOCK - 1) // BLOCK):
            begin, end = max(low, nth * BLOCK), min(high, (nth + 1) * BLOCK)
            for panel in range(n_panels):
                values = ((first_block + nth) * n_panels + panel) * BLOCK + begin - nth * BLOCK
                for row in range(0, rows, n_rows):
                    from_S = Place(row * SPAN + begin, SPAN)
                    to_acc = Place(row * sums.width + panel * PANEL, sums.width)
                    multiply_tile(S, from_S, v, values * PANEL, end - begin, sums.weighted, to_acc, True)

    return score, add_values


def _attend(kind: str, n_rows: int) -> Part:
    """Return the function that lets some queries attend to some keys of one key/value head."""
    score, add_values = _products(kind, n_rows)
    raise_largest, take_exponentials = softmax_parts(kind == "int8")

    @part(kind, n_rows, borrows=True)
    def begin(queries: Queries, piece: Piece, sums: Sums, scaled: Floats) -> None:
        """Scale the queries of a piece by 1 / sqrt(K), and set its sums to nothing."""
        head_dim = queries.head_dim
        group, n_tokens = queries.n_heads // queries.n_kv_heads, piece.last - piece.first
        scale, n = numba.float32(1 / math.sqrt(head_dim)), group * head_dim
        for t in range(n_tokens):
            start = ((piece.first + t) * queries.n_heads + piece.g * group) * head_dim
            _multiplied(queries.q, start, n, scale, scaled, t * n)
        sums.largest[: n_tokens * group] = -np.inf
        sums.total[: n_tokens * group] = 0
        sums.weighted[:] = 0

    @part(kind, n_rows, borrows=True)
    def attend_span(
        queries: Queries, store: PanelStore, piece: Piece, block: int, span: Span, sums: Sums, work: Work
    ) -> None:
        """Take the queries of a piece through a span of keys, whose key 0 is the first of a block."""
        rows, g, n_blocks = span.n_tokens * span.group, piece.g, store.v.shape[1]
        first_scale = g * store.k_scales.shape[1] + block * BLOCK
        score(work, queries.head_dim, rows, store.k, (g * n_blocks + block) * (BLOCK // PANEL), span.low, span.high)
        # A softmax leaves the memory idle, so what will be needed is asked for: the next queries, and room for heads.
        _ask_for_heads(queries.q, queries, g, piece.first - span.n_tokens, piece.first)
        raise_largest(work.S, span, Scales(store.k_scales, first_scale), sums)
        _ask_for_heads(queries.heads, queries, g, piece.first, piece.last)
        take_exponentials(work.S, span, Scales(store.v_scales, first_scale), sums)
        add_values(work.S, rows, store.v, g * n_blocks + block, span.low, span.high, sums)

    @part(kind, n_rows, borrows=True)
    def attend(queries: Queries, store: PanelStore, keys: Keys, piece: Piece, sums: Sums, work: Work) -> None:
        """Take the queries of a piece through its keys.

        For row (t - first) * H/G + r of the sums, m is the largest score, total the sum of exp(score - m), and acc the
        sum of exp(score - m) v. The number of rows in acc and in `work` is rounded up to whole tiles.
        """
        segments, first_query, window = keys
        group = queries.n_heads // queries.n_kv_heads
        begin(queries, piece, sums, work.scaled)
        for segment in range(len(segments)):
            shift = segments[segment, 2] - segments[segment, 0]  # from slot to position
            start = max(segments[segment, 0], max(piece.oldest, first_query + piece.first - window + 1) - shift)
            stop = min(segments[segment, 1], min(piece.newest, first_query + piece.last) - shift)
            if start >= stop:
                continue
            # Spans begin at multiples of SPAN. So a token's sums do not depend on which tokens are beside it.
            for block in range(start // SPAN * (SPAN // BLOCK), (stop + BLOCK - 1) // BLOCK, SPAN // BLOCK):
                base = block * BLOCK + shift  # position of the first slot; all that follows counts from there
                low, high = max(start - block * BLOCK, 0), min(stop - block * BLOCK, SPAN)
                newest = first_query + piece.first - base
                span = Span(low, high, piece.last - piece.first, group, newest, window)
                attend_span(queries, store, piece, block, span, sums, work)

    return attend


class Cut(NamedTuple):
    """How the work is cut into pieces: n_splits of keys, from position `first` on, `size` in each; n_tiles of tokens.

    n_queries tokens are in a tile. The last tile, whose tokens see most keys, is the first.
    """

    n_splits: int
    first: int
    size: int
    n_tiles: int
    n_queries: int


def _thread_share(kind: str, n_rows: int) -> Part:
    """Return the function that does one thread's share of the work."""
    attend = _attend(kind, n_rows)

    @part(kind, n_rows)
    def do_share(
        thread: int, next_thread: int, queries: Queries, store: PanelStore, keys: Keys, cut: Cut, sums: Sums,
        n_threads: int,
    ) -> None:  # fmt: skip
        """Do one thread's pieces of the work: every n_threads-th piece, or all pieces of every n_threads-th head.

        In the second case, merge the pieces of a head if its keys are split.
        """
        n_kv_heads, (n_splits, oldest, size, n_tiles, n_queries) = queries.n_kv_heads, cut
        in_tiles = sums.weighted.shape[1] // sums.width
        work = Work(np.zeros(in_tiles * queries.head_dim, np.float32), floats(in_tiles * SPAN))
        takes_heads = n_kv_heads % n_threads == 0
        n_together = n_tiles * n_splits if takes_heads else 1
        for turn in range(thread, n_kv_heads * n_tiles * n_splits // n_together, n_threads):
            for number in range(turn * n_together, (turn + 1) * n_together):
                kept = number if n_splits > 1 else thread
                own = Sums(sums.largest[kept], sums.total[kept], sums.weighted[kept], sums.width)
                start = oldest + number % n_splits * size
                first = (n_tiles - 1 - number // n_splits % n_tiles) * n_queries  # those that see most keys first
                last = min(first + n_queries, queries.n_tokens)
                newest = min(start + size, keys.first_query + queries.n_tokens)
                piece = Piece(number // (n_tiles * n_splits), first, last, start, newest)
                attend(queries, store, keys, piece, own, work)
                if n_splits == 1:
                    _finish(own, piece, queries)
            if n_splits > 1 and takes_heads:
                _merge(sums, turn, cut, queries)

    return do_share


def plain_attention(q: Floats, k: Floats, v: Floats, window: int, heads: Floats) -> None:
    """heads[t, h] = sum over s of softmax(q[t, h] . k[s, g] / sqrt(K)) v[s, g], over the keys that token t sees.

    q, heads (T, H, K); k, v (S, G, K), the oldest first, the last T of them those of the queries' own positions.
    """
    (n_tokens, n_heads, head_dim), (n_keys, n_kv_heads, _) = q.shape, k.shape
    for t in range(n_tokens):
        own = n_keys - n_tokens + t
        seen = range(max(0, own - window + 1), own + 1)
        for h in range(n_heads):
            g = h // (n_heads // n_kv_heads)
            scores = [sum(q[t, h] * k[s, g]) / math.sqrt(head_dim) for s in seen]
            shares = [math.exp(score - max(scores)) for score in scores]
            heads[t, h] = sum(share * v[s, g] for share, s in zip(shares, seen, strict=True)) / sum(shares)


@made_once
def attention(kind: str, n_rows: int) -> Kernel:
    """Return a kernel: attention(q, store, keys, heads, threads).

    kind            the kind of numbers in the store: "f32", "f16", "bf16", "int8"
    n_rows          rows of a tile: FEW_ROWS or MANY_ROWS

    q, heads        (T, H, K) float32
    store           a PanelStore whose k and v are seen as bytes; the scales are read only if kind is "int8"
    keys            Keys: the runs of slots, the first query's position, and the window

    It does what plain_attention does.
    """
    do_share = _thread_share(kind, n_rows)

    @kernel(types.void(HEADS_IN, BYTE_STORE, KEYS, HEADS_OUT, types.intp), kind, n_rows)
    def attention(q: Floats, store: PanelStore, keys: Keys, heads: Floats, threads: int) -> None:
        n_threads = count_of(threads)
        (n_tokens, n_heads, head_dim), n_kv_heads = q.shape, store.v.shape[0]
        group, width = n_heads // n_kv_heads, store.v.shape[2] * PANEL
        n_queries = _queries_together(group)
        n_tiles = (n_tokens + n_queries - 1) // n_queries
        # Few queries: their keys are split, and each piece keeps its sums. Many queries: all keys are one piece.
        oldest = keys.segments[0, 2] // SPLIT * SPLIT  # pieces begin at multiples, whichever key is visible first
        n_keys = keys.first_query + n_tokens - oldest
        n_splits = (n_keys + SPLIT - 1) // SPLIT if n_tokens <= FEW_TOKENS else 1
        cut = Cut(n_splits, oldest, SPLIT if n_splits > 1 else n_keys, n_tiles, n_queries)
        n_kept = n_kv_heads * n_tiles * n_splits if n_splits > 1 else n_threads
        most_rows = min(n_tokens, n_queries) * group
        row_size = most_rows + 64  # so no two threads write to one cache line, or to two that are fetched together
        in_tiles = (most_rows + n_rows - 1) // n_rows * n_rows
        acc = floats(n_kept * in_tiles * width).reshape((n_kept, in_tiles * width))
        m, total = np.empty((n_kept, row_size), np.float32), np.empty((n_kept, row_size), np.float32)
        sums = Sums(m, total, acc, width)
        queries = Queries(q.reshape(-1), heads.reshape(-1), n_tokens, n_heads, n_kv_heads, head_dim)
        shared_out(do_share, n_threads, threads, (queries, store, keys, cut, sums, n_threads))
        if n_splits > 1 and n_kv_heads % n_threads:
            for g in range(n_kv_heads):
                _merge(sums, g, cut, queries)

    return attention
