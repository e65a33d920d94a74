"""TokenStream: the text of token ids that arrive one by one. A character is returned once it cannot change."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Protocol


class TokenIds(Protocol):
    """The ids of a tokenizer.

    vocab_size  number of ids
    """

    vocab_size: int

    def checked(self, ids: Iterable[int]) -> list[int]:
        """Return these ids as a list; raise InputError unless each is one of the tokenizer's ids."""
        ...


class TokenStream(ABC):
    r"""The text of ids that arrive one by one. A character is returned once it cannot change.

        pushed      "▁Hi"   "<0xF0>"   "<0x9F>"   "<0x99>"   "<0x82>"   "▁!"
        returned    "Hi"    ""         ""         ""         "🙂"        " !"

    The following holds for any ids, also for control ids and broken UTF-8, and for any split of them into context and
    pushes:

        stable(context) + push(ids[0]) + push(ids[1]) + ... + flush() == decode(context + ids)

    stable(context) is the text of the context without an unfinished character at its end. decode(context) shows U+FFFD
    for an unfinished character, which is wrong if the character's next byte follows. If the context ends with a whole
    character, as every encoded text does, stable(context) is decode(context).
    """

    tokenizer: TokenIds

    def push(self, token_id: int) -> str:
        """Return the text that this id makes certain; raise InputError if it is not one of the tokenizer's ids."""
        return self._advance(self.tokenizer.checked([token_id]))

    @abstractmethod
    def flush(self) -> str:
        """Return the text of the bytes that are held back, as U+FFFD. Call this after the last id."""

    @abstractmethod
    def _advance(self, ids: list[int]) -> str:
        """Return the text that these ids make certain."""


class BytesOfIds(TokenIds, Protocol):
    """The ids of a tokenizer whose pieces are bytes."""

    def bytes_of(self, token_id: int) -> bytes | None:
        """Return the bytes that an id adds to a text; None if it has no text."""
        ...


class ByteStream(TokenStream):
    """The text of ids whose pieces are bytes. A character ends at an id without text."""

    def __init__(self, tokenizer: BytesOfIds, context_ids: Iterable[int] = ()) -> None:
        self.tokenizer: BytesOfIds = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._advance(tokenizer.checked(context_ids))

    def flush(self) -> str:
        """Return the text of the bytes that are held back, as U+FFFD. Call this after the last id."""
        return self._decoder.decode(b"", final=True)

    def _advance(self, ids: list[int]) -> str:
        text = ""
        for piece in map(self.tokenizer.bytes_of, ids):
            text += self.flush() if piece is None else self._decoder.decode(piece)
        return text


class StreamedTokenizer(TokenIds, Protocol):
    """The methods and attributes that a stream needs of a SentencePiece tokenizer.

    anchor_id   the id of a piece of text that is not part of a character
    """

    anchor_id: int

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of these ids."""
        ...

    def byte(self, token_id: int) -> int | None:
        """Return the byte that a piece stands for; None if the piece is not a single byte."""
        ...


class SentencePieceStream(TokenStream):
    r"""The text of ids of SentencePiece.

    The text of a piece depends on two facts about the ids before it: whether the text has begun (if not, SentencePiece
    drops a leading space), and which bytes of an unfinished character are there. So a push decodes the new ids behind a
    fixed piece of text (`anchor_id`) and removes the text of that piece. The work of a push does not grow with the
    text, and SentencePiece alone decides the text of a piece.

    The equation of `TokenStream` does not hold for a model with a denormalizer, which rewrites decoded text. No model
    of Mistral's has one.
    """

    def __init__(self, tokenizer: StreamedTokenizer, context_ids: Iterable[int] = ()) -> None:
        self.tokenizer: StreamedTokenizer = tokenizer
        self._before: list[int] = []  # a few ids; later ids have the same text behind these as behind all earlier ids
        self._open: list[int] = []  # the ids of the bytes of an unfinished character
        self._advance(tokenizer.checked(context_ids))

    def flush(self) -> str:
        """Return the text of the bytes that are held back, one U+FFFD for each. Call this after the last id."""
        ids, self._open = self._open, []
        return self._read(ids)

    def _advance(self, ids: list[int]) -> str:
        ids = self._open + ids
        certain = len(ids) - self._count_open(ids)
        self._open = ids[certain:]
        return self._read(ids[:certain])

    def _count_open(self, ids: list[int]) -> int:
        """Return how many of the last ids are bytes of an unfinished character: 0 to 3."""
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
        """Return the text of `ids` behind all earlier ids."""
        ids = self._before + ids
        text = self.tokenizer.decode(ids)[len(self.tokenizer.decode(self._before)) :]
        # Ids without text may still change the text of later ids: one may be the leading space that is dropped. An id
        # that occurs twice changes nothing more, so each is kept once.
        self._before = [self.tokenizer.anchor_id] if text else list(dict.fromkeys(ids))
        return text
