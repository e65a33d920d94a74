r"""Byte-level BPE: text to the ids of pieces, by merging bytes.

Three steps make ids of a text:

    split   a pattern cuts the text into words, about as one would say them:   "I saw them"  ->  "I", " saw", " them"
    merge   each word begins as its bytes. Of all pairs of neighbours that may be merged, the one that training merged
            first is merged, the leftmost if it occurs twice. This repeats until no pair can be merged
    look up each part that is left is a piece of the vocabulary, and has an id

        " them"     ▁|t|h|e|m     ▁t|h|e|m     ▁t|he|m     ▁the|m     ▁them

So no text is unknown: what was never merged stays bytes. Files differ in how they say which pairs training merged. In
tekken.json a pair may be merged if it is a piece, and pieces are in the order of training (`ByteBPE`). tokenizer.json
and GGUF files have a list of merges (`MergeListBPE`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mistral_ref.text.split_patterns import split

_LONGEST_KEPT, _MOST_KEPT = 32, 2**15  # characters of a word, words: their ids are kept, in about 10 MB at most


class ByteBPE:
    """The three steps, with one vocabulary. A pair of parts may be merged if together they are a piece.

    patterns    how a text is split (split_patterns.py)
    ids         the ids of the pieces, in the order of the merges. Each byte is a piece
    """

    def __init__(self, patterns: Sequence[str], ids: Mapping[Any, int]) -> None:
        self.patterns, self.ids = patterns, ids
        self._kept: dict[str, list[int]] = {}  # ids of words: a text says many words often

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text."""
        ids: list[int] = []
        for word in self.words(text):
            found = self._kept.get(word)
            if found is None:
                found = self._ids_of_word(word)
                if len(word) <= _LONGEST_KEPT:
                    if len(self._kept) >= _MOST_KEPT:
                        self._kept.clear()
                    self._kept[word] = found
            ids += found
        return ids

    def words(self, text: str) -> list[str]:
        """Return the words of a text. Together they are the text, and each is merged by itself."""
        return split(text, self.patterns)

    def _ids_of_word(self, word: str) -> list[int]:
        spelled = word.encode()
        whole = self.whole(spelled)
        return [self.ids[part] for part in merged(self.parts(spelled), self.rank)] if whole is None else [whole]

    def merges(self, word: bytes) -> Iterator[list[bytes]]:
        """Yield the parts of a word before each merge, and at the end."""
        for parts in merge_by_merge(self.parts(word), self.rank):
            yield [self.bytes_of(part) for part in parts]

    def parts(self, word: bytes) -> list[Any]:
        """Return what a word is before the first merge: its bytes, as pieces have them."""
        return [word[at : at + 1] for at in range(len(word))]

    def bytes_of(self, piece: Any) -> bytes:
        """Return the bytes of a piece."""
        return piece

    def rank(self, left: Any, right: Any) -> int | None:
        """Return the place of a merge in the order of training; None: this pair may not be merged."""
        return self.ids.get(left + right)

    def whole(self, word: bytes) -> int | None:
        """Return the id of a word that is a piece, so that nothing is merged; None for other words."""
        return self.ids.get(word)


# GPT-2 writes each byte as a character that can be printed, so that a list of pieces is a text. It is the character of
# this number if that can be printed. The others, from U+0100 on, stand for the rest of the bytes: "Ġ" is the space.
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_REST = [byte for byte in range(256) if byte not in _PRINTABLE]
_LETTER = {byte: byte for byte in _PRINTABLE} | {byte: 0x100 + n for n, byte in enumerate(_REST)}
_BYTE = {letter: byte for byte, letter in _LETTER.items()}
LETTERS = "".join(chr(_LETTER[byte]) for byte in range(256))


class MergeListBPE(ByteBPE):
    """The pairs that may be merged are listed. Pieces are written in GPT-2's letters for bytes, `LETTERS`.

    ids             the ids of the pieces. A byte that is no piece is left out of every text
    ranks           the ranks of the merges, each written as "Ġt he"
    whole_words     a word that is a piece is not merged. Without this a piece that no merges lead to is never found
    """

    def __init__(
        self, patterns: Sequence[str], ids: Mapping[str, int], ranks: Mapping[str, int], *, whole_words: bool
    ) -> None:
        super().__init__(patterns, ids)
        self._ranks, self._whole_words = ranks, whole_words

    def parts(self, word: bytes) -> list[Any]:
        return [letter for letter in _in_letters(word) if letter in self.ids]

    def bytes_of(self, piece: Any) -> bytes:
        try:
            return bytes_of_letters(piece)
        except KeyError:  # an unusual piece is written as it is
            return piece.encode()

    def rank(self, left: Any, right: Any) -> int | None:
        return self._ranks.get(f"{left} {right}")

    def whole(self, word: bytes) -> int | None:
        return self.ids.get(_in_letters(word)) if self._whole_words else None


def bytes_of_letters(piece: str) -> bytes:
    """Return the bytes that GPT-2's letters stand for; raise KeyError if a character is none of them."""
    return bytes(map(_BYTE.__getitem__, map(ord, piece)))


def _in_letters(word: bytes) -> str:
    r"""Return bytes in GPT-2's letters.

    >>> _in_letters(" né\n".encode())
    'ĠnÃ©Ċ'
    """
    return word.decode("latin-1").translate(_LETTER)


def merge_by_merge(parts: Sequence[Any], rank: Callable[[Any, Any], float | None]) -> Iterator[list[Any]]:
    """Yield the parts of a word before each merge, and at the end. `merged` finds the same end faster.

    >>> ranks = {"he": 0, "th": 1, "the": 2}
    >>> list(merge_by_merge("the", lambda left, right: ranks.get(left + right)))
    [['t', 'h', 'e'], ['t', 'he'], ['the']]
    """
    parts = list(parts)
    while True:
        yield list(parts)
        ranks = [(rank(left, right), at) for at, (left, right) in enumerate(pairwise(parts))]
        allowed = [(found, at) for found, at in ranks if found is not None]
        if not allowed:
            return
        _, at = min(allowed)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def merged(parts: list[Any], rank: Callable[[Any, Any], int | None]) -> list[Any]:
    """Return what is left of the parts of a word when no pair of neighbours can be merged. `parts` is used up.

    The pairs wait in a heap, so n parts take a time in proportion to n log n. A merge does not search the heap for the
    pairs that it ends: when such a pair comes up, its parts are no longer there. A part that was merged into the part
    before it is None.
    """
    n = len(parts)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    ranks = [(rank(*pair), at, *pair) for at, pair in enumerate(pairwise(parts))]
    heap = [entry for entry in ranks if entry[0] is not None]
    heapq.heapify(heap)
    while heap:
        _, at, left, right = heapq.heappop(heap)
        to = after[at]
        if to == n or parts[at] is not left or parts[to] is not right:
            continue
        parts[at], parts[to] = left + right, None
        after[at] = beyond = after[to]
        if beyond < n:
            before[beyond] = at
        for first, second in ((before[at], at), (at, beyond)):
            if first >= 0 and second < n:
                left, right = parts[first], parts[second]
                found = rank(left, right)
                if found is not None:
                    heapq.heappush(heap, (found, first, left, right))
    return [part for part in parts if part is not None]
