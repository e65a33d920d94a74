r"""Byte-level BPE: text to the ids of pieces, by merging bytes.

Three steps make ids of a text:

    split   a pattern cuts the text into words, about as one would say them:   "I saw them"  ->  "I", " saw", " them"
    merge   each word begins as its bytes. Of all pairs of neighbours that may be merged, the one that training merged
            earliest is merged, the leftmost if it occurs twice. This repeats until no pair can be merged
    look up each piece that is left has an id

        " them"     ▁|t|h|e|m     ▁t|h|e|m     ▁t|he|m     ▁the|m     ▁them

So there is no unknown text: what was never merged stays bytes. `merges` shows the second step, and the ids do not
depend on how it is done.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import regex

_LETTERS = r"\p{L}\p{N}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
# The patterns that are known. A pattern of strangers is never compiled: it could take for ever on a short text.
TEKKEN = (
    rf"[^\r\n{_LETTERS}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n{_LETTERS}]?[{_UPPER}]+[{_LOWER}]*"
    rf"|\p{{N}}| ?[^\s{_LETTERS}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LONGEST_KEPT, _MOST_KEPT = 32, 2**16  # characters of a word, words: their ids are kept, in about 10 MB at most


class ByteBPE:
    """The three steps, with one vocabulary.

    patterns    how a text is split: by the first, then each part by the next
    ids         the id of each piece, a string of bytes
    """

    def __init__(self, patterns: Sequence[str], ids: Mapping[bytes, int]) -> None:
        self._patterns = [regex.compile(pattern) for pattern in patterns]
        self.ids = ids
        self._ids_of_word = lru_cache(_MOST_KEPT)(self._merge_word)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_ids_of_word"}  # it cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._ids_of_word = lru_cache(_MOST_KEPT)(self._merge_word)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = []
        for word in self.split(text):
            ids += self._ids_of_word(word) if len(word) <= _LONGEST_KEPT else self._merge_word(word)
        return ids

    def split(self, text: str) -> list[str]:
        """Return the words of a text; together they are the text."""
        words = [text]
        for pattern in self._patterns:
            words = [part for word in words for part in pattern.findall(word)]
        return words

    def rank(self, left: bytes, right: bytes) -> int | None:
        """Return how early training merged this pair, 0 first; None: it may not be merged."""
        return self.ids.get(left + right)

    def _merge_word(self, word: str) -> tuple[int, ...]:
        """Return the ids of one word."""
        piece = word.encode()
        if (token_id := self.ids.get(piece)) is not None:
            return (token_id,)
        parts = merge([piece[at : at + 1] for at in range(len(piece))], self.rank)
        return tuple(self.ids[part] for part in parts)

    def merges(self, word: str) -> Iterator[list[bytes]]:
        """Yield the parts of a word before each merge, and after the last one."""
        piece = word.encode()
        parts = [piece[at : at + 1] for at in range(len(piece))]
        yield parts
        while True:
            ranks = [self.rank(*pair) for pair in pairwise(parts)]
            allowed = [(rank, at) for at, rank in enumerate(ranks) if rank is not None]
            if not allowed:
                return
            _, at = min(allowed)
            parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
            yield parts


def merge(parts: list[Any], rank: Callable[[Any, Any], int | None]) -> list[Any]:
    """Return what is left of the parts of a word when no pair of neighbours can be merged.

    The pairs wait in a heap, so the time is in proportion to n log n for n parts. A merge does not search the heap for
    the pairs that it ends: when one of them comes up, its parts are no longer there. A part that was merged into the
    part before it is None.
    """
    n = len(parts)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap: list[tuple[int, int, Any, Any]] = []

    def add(at: int, to: int) -> None:
        found = rank(parts[at], parts[to])
        if found is not None:
            heapq.heappush(heap, (found, at, parts[at], parts[to]))

    for at in range(n - 1):
        add(at, at + 1)
    while heap:
        _, at, left, right = heapq.heappop(heap)
        to = after[at]
        if to == n or parts[at] is not left or parts[to] is not right:
            continue
        parts[at], parts[to] = left + right, None
        after[at] = beyond = after[to]
        if beyond < n:
            before[beyond] = at
            add(at, beyond)
        if before[at] >= 0:
            add(before[at], at)
    return [part for part in parts if part is not None]
