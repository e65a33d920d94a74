"""Text to token ids and back, with a SentencePiece model.

Three rules that other programs often break:

- Only `encode(text, bos=True)` adds the beginning-of-sequence id, and it adds it exactly once.
- Text is always text. `encode("<s>")` returns the ids of the three characters, never the control id. So a text cannot
  forge the marks of a conversation.
- The text of several ids is not the joined texts of the single ids. SentencePiece drops the space before a piece if
  the piece comes first, and one emoji may be four ids. So text that arrives id by id goes through a `TokenStream`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from mistral_ref.errors import InputError, TokenizerError, escaped, short_repr
from mistral_ref.text.stream import TokenStream

TOKENIZER_FILE = "tokenizer.model"
# A hostile file must not use much memory. SentencePiece takes up to 400 bytes of memory for a piece, and less for any
# other text or message; in the file these may take only 2 bytes. The published files have 590,000 bytes and 32,768
# pieces, and models of the same architecture have up to 64,000 pieces. These two maximums allow both, and the memory
# stays below 28 MiB.
MAX_FILE_BYTES = 1536 * 2**10
MAX_PIECES = 72_500
_PIECE = 1  # the number of the field that holds one piece


def read_model(path: Path) -> bytes:
    """Return the bytes of a SentencePiece file that the library can read in bounded memory.

    Raises TokenizerError if the file is not a regular one, has more than MAX_FILE_BYTES bytes, or has more than
    MAX_PIECES pieces.
    """
    # Checked before open(), because open() of a named pipe waits until another program writes to it.
    if not os.path.isfile(path):
        raise TokenizerError(f"{path}: there is no such file, or it is not a regular one")
    try:
        with path.open("rb") as file:
            model = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    if len(model) > MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: is larger than {MAX_FILE_BYTES} bytes, the maximum for a SentencePiece model")
    try:
        n_pieces = count_pieces(model)
    except (IndexError, ValueError) as error:
        raise TokenizerError(f"{path}: is not a usable SentencePiece model: {error}") from None
    if n_pieces > MAX_PIECES:
        raise TokenizerError(f"{path}: has {n_pieces} pieces and texts beside them; expected at most {MAX_PIECES}")
    return model


def count_pieces(model: bytes) -> int:
    r"""Return the number of pieces in a SentencePiece file, plus the number of texts and messages in its other parts.

    The file is a protobuf message: a row of fields. A field is a tag and then either a number, or a length and this
    many bytes. The tag holds the field's number and how it is stored. Raises IndexError or ValueError if the file is
    not such a message.

    >>> count_pieces(b"\x0a\x03\x0a\x01a" * 2)
    2
    """
    data = memoryview(model)
    return sum(1 if number == _PIECE else 1 + sum(1 for _ in _fields(part)) for number, part in _fields(data))


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield the field number and the bytes of each field with a length in a message. Other fields are skipped."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, stored = tag >> 3, tag & 7
        if stored == 0:
            _, at = _varint(message, at)
        elif stored == 2:
            length, at = _varint(message, at)
            if length > len(message) - at:
                raise ValueError(f"a field has {length} bytes; expected at most {len(message) - at}, the bytes left")
            yield number, message[at : at + length]
            at += length
        elif stored in (1, 5):
            at += 8 if stored == 1 else 4
        else:
            raise ValueError(f"a field is stored as type {stored}; expected type 0, 1, 2 or 5")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return the number that begins at byte `at`, and the index of the byte after it.

    Each byte holds seven bits of the number, the lowest first. Its eighth bit says whether another byte follows.
    """
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number takes more than ten bytes")


class SentencePieceTokenizer:
    """Text to ids and back, with one SentencePiece model.

    model       the bytes of the model's file
    origin      begins every message about the model, for example the path of its file

    The whole model is checked at creation: the ids that begin and end a sequence must exist and differ, and every
    piece must be valid text. Raises TokenizerError if they are not.
    """

    def __init__(self, model: bytes, origin: str = TOKENIZER_FILE) -> None:
        self._processor = SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            self.vocab_size: int = self._processor.get_piece_size()
            # Every piece is read and decoded once here, so a piece that is not valid UTF-8 cannot fail a later call.
            self._pieces: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
            for first in range(0, self.vocab_size, 1024):  # one call for all pieces would take megabytes
                self._processor.decode(list(range(first, min(first + 1024, self.vocab_size))))
        except Exception as error:  # the library raises several unrelated built-in exceptions
            raise TokenizerError(f"{origin}: is not a usable SentencePiece model: {short_repr(str(error))}") from error
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0 or self.bos_id == self.eos_id:
            raise TokenizerError(
                f"{origin}: begins a sequence with id {self.bos_id} and ends it with id {self.eos_id}; "
                "expected two different ids of at least 0 (-1 means absent)"
            )
        self._origin = origin
        # The first piece of whole characters. TokenStream decodes ids behind it, so they do not begin a text.
        self.anchor_id = next((i for i in range(self.vocab_size) if self.decode([i]).strip("\ufffd")), -1)
        if self.anchor_id < 0:
            raise TokenizerError(f"{origin}: has no piece of text; expected at least one")

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Return the ids of `text`. `bos` and `eos` add the ids that begin and end a sequence.

        If the model was trained in this way, SentencePiece puts a space before the text: "Hello" becomes the piece
        "▁Hello". Raises InputError if `text` is not a string, or holds half of a surrogate pair, which UTF-8 cannot
        express.
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
        """Return the text of `ids`. Control ids have no text. A byte that is not part of a character becomes U+FFFD.

        Raises InputError unless every id is an integer in [0, vocab_size).
        """
        return self._processor.decode(self.checked(ids))

    def stream(self, context_ids: Iterable[int] = ()) -> TokenStream:
        """Return a stream for the text of the ids that follow `context_ids`. It does not repeat the context's text."""
        return TokenStream(self, context_ids)

    def piece(self, token_id: int) -> str:
        r"""Return the name of one piece, for tables: "▁Hello", "<s>", "<0x0A>". Other characters are escaped.

        Raises InputError unless the id is an integer in [0, vocab_size).
        """
        (token_id,) = self.checked([token_id])
        return escaped(self._pieces[token_id])

    def byte(self, token_id: int) -> int | None:
        """Return the byte that a piece like "<0x0A>" stands for; None for every other piece."""
        return int(self._pieces[token_id][1:-1], 16) if self._processor.is_byte(token_id) else None

    def checked(self, ids: Iterable[int]) -> list[int]:
        """Return `ids` as a list of Python integers; raise InputError unless each is an integer in [0, vocab_size)."""
        ids = list(ids)
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
                raise InputError(f"token id is {short_repr(token_id)}; expected an integer")
            if not 0 <= token_id < self.vocab_size:
                raise InputError(f"token id is {short_repr(token_id)}; expected at least 0 and below {self.vocab_size}")
        return [int(token_id) for token_id in ids]

    def __repr__(self) -> str:
        return f"SentencePieceTokenizer({self._origin!r}, vocab_size={self.vocab_size})"
