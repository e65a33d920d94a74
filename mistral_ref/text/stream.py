"""The text of ids that arrive one by one, each character as soon as it can no longer change."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Protocol


class StreamedTokenizer(Protocol):
    """What a stream asks of its tokenizer.

    anchor_id   the id of a piece that is text, and no part of a character
    """

    vocab_size: int
    anchor_id: int

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of these ids."""
        ...

    def byte(self, token_id: int) -> int | None:
        """Return the byte that a piece stands for; None for a piece that is no single byte."""
        ...

    def checked(self, ids: Iterable[int]) -> list[int]:
        """Return these ids as a list; raise InputError for one that is none of the tokenizer's."""
        ...


class TokenStream:
    r"""The text of ids that arrive one by one, each character as soon as it can no longer change.

    For any ids, control ids and broken UTF-8 included, and any split of them into context and pushes:

        stable(context) + push(ids[0]) + push(ids[1]) + ... + flush() == decode(context + ids)

    where stable(context) is the text of the context up to, and without, a character that its last ids leave unfinished:
    decode(context) shows U+FFFD there, which is wrong as soon as the character's next byte arrives. For a context that
    ends at the end of a character, as every encoded text does, stable(context) is decode(context).

    What a piece reads as depends on little of what came before: whether text has begun (before that, SentencePiece
    drops a leading space), and which bytes of a character are still open. So a push decodes the new ids behind a
    fixed piece that is text itself (`anchor_id`), and cuts that piece's text off: constant work, whatever the length,
    and SentencePiece remains the only judge of what a piece reads as.

        pushed      "▁Hi"   "<0xF0>"   "<0x9F>"   "<0x99>"   "<0x82>"   "▁!"
        returned    "Hi"    ""         ""         ""         "🙂"        " !"

    Holds for every model without a denormalizer, a rewriting of decoded text that no model of Mistral's has.
    """

    def __init__(self, tokenizer: StreamedTokenizer, context_ids: Iterable[int] = ()) -> None:
        self.tokenizer = tokenizer
        self._before: list[int] = []  # reads on like everything whose text is out, and is short
        self._open: list[int] = []  # the bytes of a character that is not complete
        self._advance(tokenizer.checked(context_ids))

    def push(self, token_id: int) -> str:
        """Return the text that became certain with this id; raise InputError if it is not one of the tokenizer's."""
        return self._advance(self.tokenizer.checked([token_id]))

    def flush(self) -> str:
        """Return the text of the bytes held back: one U+FFFD for each, since no more will come."""
        ids, self._open = self._open, []
        return self._read(ids)

    def _advance(self, ids: list[int]) -> str:
        ids = self._open + ids
        certain = len(ids) - self._count_open(ids)
        self._open = ids[certain:]
        return self._read(ids[:certain])

    def _count_open(self, ids: list[int]) -> int:
        """Return how many of the last ids are bytes of a character that further bytes could complete (0 to 3)."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in ids[-3:]:
            byte = self.tokenizer.byte(token_id)
            if byte is None:
                decoder.reset()
            else:
                decoder.decode(bytes([byte]))
        held_back, _ = decoder.getstate()
        return len(held_back)

    def _read(self, ids: list[int]) -> str:
        """Return what `ids` read as after all that came before them."""
        ids = self._before + ids
        text = self.tokenizer.decode(ids)[len(self.tokenizer.decode(self._before)) :]
        # Without new text, the ids may still have mattered (one of them the space that is dropped), each of them once.
        self._before = [self.tokenizer.anchor_id] if text else list(dict.fromkeys(ids))
        return text
