"""Text to token ids and back: a SentencePiece model behind a small face, and text that arrives id by id.

Three rules, each of which has cost somebody a day elsewhere:

- The beginning-of-sequence id is added in one place, `encode(text, bos=True)`, and exactly once.
- Text is only ever text. `encode("<s>")` spells out the characters and never yields the control id, so nobody who
  supplies text can forge the marks of a conversation.
- Texts of single ids do not add up to the text of all of them: "Hello" loses the space before it where it comes first,
  and one emoji may be four ids. Text that arrives id by id therefore goes through a `TokenStream`.
"""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

from mistral_ref.errors import InputError, TokenizerError, shown

TOKENIZER_FILE = "tokenizer.model"
# As published with instruction models: tokenizer.model.v3, mistral_instruct_tokenizer_241114.model.v7m1, ...
VERSIONED_FILE = re.compile(r".+\.model\.v\d+(m\d+)?")
OTHER_FORMATS = ("tekken.json", "tokenizer.json")
# A hostile file may not cost much memory. SentencePiece takes up to 400 bytes for a piece, which in the file has two
# bytes of value 10, before itself and before its text. The published files have 590,000 bytes and 72,000 tens; these
# limits let vocabularies of 64,000 pieces pass, as models of the same architecture have, and bound memory to 28 MiB.
MAX_FILE_BYTES = 1536 * 2**10
MAX_TENS = 145_000


def find_tokenizer(directory: str | os.PathLike[str]) -> Path | None:
    """Return the SentencePiece file of a model's directory, or None where it has none.

    `tokenizer.model` is preferred; without it, the one file with a versioned name. Whether the file can be read is
    found out by `load_tokenizer`.

    Raises TokenizerError if the directory cannot be listed, or several versioned names leave the choice open.
    """
    directory = Path(directory)
    try:
        names = sorted(os.listdir(directory))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{directory}: cannot be listed: {getattr(error, 'strerror', error)}") from error
    if TOKENIZER_FILE in names:
        return directory / TOKENIZER_FILE
    versioned = [name for name in names if VERSIONED_FILE.fullmatch(name)]
    if len(versioned) > 1:
        raise TokenizerError(f"{directory}: holds several tokenizers, {', '.join(versioned)}; give the path of one")
    return directory / versioned[0] if versioned else None


def load_tokenizer(path: str | os.PathLike[str]) -> SentencePieceTokenizer:
    """Read a SentencePiece model: a file of any name, or the directory of a model as `find_tokenizer` looks at it.

    Only that file is opened, and only if it is a regular file of at most `MAX_FILE_BYTES`.

    Raises TokenizerError, starting with the path, if there is no such file or it is not a usable model.
    """
    path = Path(path)
    if os.path.isdir(path):
        found = find_tokenizer(path)
        if found is None:
            others = [name for name in OTHER_FORMATS if os.path.exists(path / name)]
            raise TokenizerError(
                f"{path}: holds {others[0]}, and this version reads SentencePiece only; token ids work without it"
                if others
                else f"{path}: holds no {TOKENIZER_FILE}"
            )
        path = found
    return SentencePieceTokenizer(_read(path), origin=str(path))


def _read(path: Path) -> bytes:
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
    if model.count(10) > MAX_TENS:
        raise TokenizerError(f"{path}: has more pieces than are read, about {MAX_TENS // 2}")
    return model


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
            raise TokenizerError(f"{origin}: is not a usable SentencePiece model: {shown(str(error))}") from error
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0 or self.bos_id == self.eos_id:
            raise TokenizerError(
                f"{origin}: begins a sequence with id {self.bos_id} and ends it with id {self.eos_id}; "
                "expected two different ids, neither of them absent (-1)"
            )
        self._origin = origin
        # A piece that is text, and no part of a character: what follows it is not at the beginning (see TokenStream).
        self.landmark = next((i for i in range(self.vocab_size) if self.decode([i]).strip("\ufffd")), -1)
        if self.landmark < 0:
            raise TokenizerError(f"{origin}: has no piece that stands for text")

    def encode(self, text: str, *, bos: bool = True, eos: bool = False) -> list[int]:
        """Return the ids of `text`, with the beginning- and end-of-sequence ids around them as asked.

        SentencePiece puts a space before the text where the model was trained so: "Hello" becomes the piece "▁Hello".

        Raises InputError if `text` is not a string that UTF-8 can express (it holds half of a surrogate pair).
        """
        if not isinstance(text, str):
            raise InputError(f"text is {shown(text)}; expected a string")
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
                raise InputError(f"token id {shown(token_id)} is not an integer")
            if not 0 <= token_id < self.vocab_size:
                raise InputError(f"token id {shown(token_id)} is not one of the tokenizer's {self.vocab_size}")
        return [int(token_id) for token_id in ids]

    def __repr__(self) -> str:
        return f"SentencePieceTokenizer({self._origin!r}, vocab_size={self.vocab_size})"


class TokenStream:
    r"""The text of ids that arrive one by one, each character as soon as it can no longer change.

    For any ids, control ids and broken UTF-8 included, and any split of them into context and pushes:

        stable(context) + push(ids[0]) + push(ids[1]) + ... + flush() == decode(context + ids)

    where stable(context) is the text of the context up to, and without, a character that its last ids leave unfinished:
    decode(context) shows U+FFFD there, which is wrong as soon as the character's next byte arrives. For a context that
    ends at the end of a character, as every encoded text does, stable(context) is decode(context).

    What a piece reads as depends on little of what came before: whether text has begun (before that, SentencePiece
    drops a leading space), and which bytes of a character are still open. So a push decodes the new ids behind a
    landmark, a fixed piece that is text itself, and cuts the landmark's text off: constant work, whatever the length,
    and SentencePiece remains the only judge of what a piece reads as.

        pushed      "▁Hi"   "<0xF0>"   "<0x9F>"   "<0x99>"   "<0x82>"   "▁!"
        returned    "Hi"    ""         ""         ""         "🙂"        " !"

    Holds for every model without a denormalizer, a rewriting of decoded text that no model of Mistral's has.
    """

    def __init__(self, tokenizer: SentencePieceTokenizer, context_ids: Iterable[int] = ()) -> None:
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
        self._before = [self.tokenizer.landmark] if text else list(dict.fromkeys(ids))
        return text
