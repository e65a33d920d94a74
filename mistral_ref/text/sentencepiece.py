"""Text to token ids and back: a SentencePiece model behind a small face, and text that arrives id by id.

Three rules, each of which has cost somebody a day elsewhere:

- The beginning-of-sequence id is added in one place, `encode(text, bos=True)`, and exactly once.
- Text is only ever text. `encode("<s>")` spells out the characters and never yields the control id, so nobody who
  supplies text can forge the marks of a conversation.
- Texts of single ids do not add up to the text of all of them: "Hello" loses the space before it where it comes first,
  and one emoji may be four ids. Text that arrives id by id therefore goes through a `TokenStream`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from mistral_ref.errors import InputError, TokenizerError, short_repr
from mistral_ref.text.stream import TokenStream

TOKENIZER_FILE = "tokenizer.model"
# A hostile file may not cost much memory. SentencePiece takes up to 400 bytes for a piece, and less for any other text
# or message, which may take 2 bytes in the file. The published files have 590,000 bytes and 32,768 pieces; these limits
# let vocabularies of 64,000 pass, as models of the same architecture have, and bound memory to 28 MiB.
MAX_FILE_BYTES = 1536 * 2**10
MAX_PIECES = 72_500
_PIECE = 1  # the number of the field that is repeated for each piece


def read_model(path: Path) -> bytes:
    """Return the bytes of a SentencePiece file that is safe to hand to the library.

    Raises TokenizerError if it is no regular file, larger than MAX_FILE_BYTES, or of more than MAX_PIECES pieces.
    """
    # Asked before opening, since opening a named pipe waits for somebody to write to it.
    if not os.path.isfile(path):
        raise TokenizerError(f"{path}: there is no such file, or it is not a regular one")
    try:
        with path.open("rb") as file:
            model = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    if len(model) > MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: is larger than {MAX_FILE_BYTES} bytes; expected a SentencePiece model")
    try:
        n_pieces = count_pieces(model)
    except (IndexError, ValueError) as error:
        raise TokenizerError(f"{path}: is not a usable SentencePiece model: {error}") from None
    if n_pieces > MAX_PIECES:
        raise TokenizerError(f"{path}: has {n_pieces} pieces, or texts beside them; at most {MAX_PIECES} are read")
    return model


def count_pieces(model: bytes) -> int:
    r"""Return how many pieces a SentencePiece file holds, and texts and messages in its other parts.

    A file is a protobuf message: fields one after the other, each a tag (its number and how it is stored) and then a
    number, or a length and so many bytes. Raises IndexError or ValueError where it is none.

    >>> count_pieces(b"\x0a\x03\x0a\x01a" * 2)
    2
    """
    data = memoryview(model)
    return sum(1 if number == _PIECE else 1 + sum(1 for _ in _fields(part)) for number, part in _fields(data))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the number and the bytes of each field of a message that has a length."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, stored = tag >> 3, tag & 7
        if stored == 0:
            _, at = _varint(message, at)
        elif stored == 2:
            length, at = _varint(message, at)
            if length > len(message) - at:
                raise ValueError(f"a field of {length} bytes, where {len(message) - at} are left")
            yield number, message[at : at + length]
            at += length
        elif stored in (1, 5):
            at += 8 if stored == 1 else 4
        else:
            raise ValueError(f"a field is stored as type {stored}, as none of a SentencePiece model is")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at `at`, seven bits a byte, the lowest first; and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number takes more than ten bytes")


class SentencePieceTokenizer:
    """Text to ids and back, for one SentencePiece model given as the bytes of its file.

    `origin` begins every message about the model, which is checked whole before the first text: the ids that begin and
    end a sequence exist and differ, and every piece is text. Raises TokenizerError otherwise.
    """

    def __init__(self, model: bytes, origin: str = TOKENIZER_FILE) -> None:
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            self.vocab_size: int = self._processor.get_piece_size()
            # Every piece is asked for and decoded once, so that no later call meets one that is not valid UTF-8.
            self._pieces: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
            for first in range(0, self.vocab_size, 1024):  # all at once would take megabytes
                self._processor.decode(list(range(first, min(first + 1024, self.vocab_size))))
        except Exception as error:  # the library's statuses arrive as a handful of unrelated built-in exceptions
            raise TokenizerError(f"{origin}: is not a usable SentencePiece model: {short_repr(str(error))}") from error
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0 or self.bos_id == self.eos_id:
            raise TokenizerError(
                f"{origin}: begins a sequence with id {self.bos_id} and ends it with id {self.eos_id}; "
                "expected two different ids, neither of them absent (-1)"
            )
        self._origin = origin
        # A piece that is text, and no part of a character: what follows it is not at the beginning (see TokenStream).
        self.anchor_id = next((i for i in range(self.vocab_size) if self.decode([i]).strip("\ufffd")), -1)
        if self.anchor_id < 0:
            raise TokenizerError(f"{origin}: has no piece that stands for text")

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Return the ids of `text`, with the beginning- and end-of-sequence ids around them as asked.

        SentencePiece puts a space before the text where the model was trained so: "Hello" becomes the piece "▁Hello".

        Raises InputError if `text` is not a string that UTF-8 can express (it holds half of a surrogate pair).
        """
        if not isinstance(text, str):
            raise InputError(f"text is {short_repr(text)}; expected a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"text holds {text[error.start]!a} at {error.start}, half of a surrogate pair; expected valid Unicode"
            ) from error
        ids: list[int] = self._processor.encode(text)
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Control ids are silent; bytes that form no character become U+FFFD, one for each.

        Raises InputError unless every id is an integer in [0, vocab_size).
        """
        return self._processor.decode(self.checked(ids))

    def stream(self, context_ids: Iterable[int] = ()) -> TokenStream:
        """Return a stream for the text of the ids that follow `context_ids`, whose own text it does not repeat."""
        return TokenStream(self, context_ids)

    def piece(self, token_id: int) -> str:
        r"""Return the name of one piece for a table: "▁Hello", "<s>", "<0x0A>"; what cannot be printed is escaped."""
        (token_id,) = self.checked([token_id])
        return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in self._pieces[token_id])

    def byte(self, token_id: int) -> int | None:
        """Return the byte that a piece such as "<0x0A>" stands for, or None for every other piece."""
        return int(self._pieces[token_id][1:-1], 16) if self._processor.is_byte(token_id) else None

    def checked(self, ids: Iterable[int]) -> list[int]:
        """Return `ids` as a list of Python integers; raise InputError unless each is an integer in [0, vocab_size)."""
        ids = list(ids)
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
                raise InputError(f"token id {short_repr(token_id)} is not an integer")
            if not 0 <= token_id < self.vocab_size:
                raise InputError(f"token id {short_repr(token_id)} is not one of the tokenizer's {self.vocab_size}")
        return [int(token_id) for token_id in ids]

    def __repr__(self) -> str:
        return f"SentencePieceTokenizer({self._origin!r}, vocab_size={self.vocab_size})"
