"""Read a SentencePiece file that may be hostile: how many pieces it has is known before SentencePiece reads it.

The file is a protobuf message: a row of fields. A field is a tag and then either a number, or a length and this many
bytes. The tag holds the field's number and how it is stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mistral_ref.errors import TokenizerError
from mistral_ref.files.paths import refuse_pointer

# A hostile file must not use much memory. A piece takes up to 400 bytes of it, and in the file only 2 bytes. So what
# loading takes grows with the pieces: about 100 MiB for the most. Published files have 32,000 to 256,000 pieces, and up
# to 5 MB. The settings beside the pieces hold a few texts.
MAX_FILE_BYTES = 8 * 2**20
MAX_PIECES = 256_000
MAX_TEXTS = 50_000
_PIECE = 1  # the number of the field that holds one piece


def read_model(path: Path) -> bytes:
    """Return the bytes of a SentencePiece file that the library can read in bounded memory.

    Raises TokenizerError if the file is not a regular one, has more than MAX_FILE_BYTES bytes, has more than MAX_PIECES
    pieces, or has more than MAX_TEXTS texts beside them.
    """
    # Checked before open(), because open() of a named pipe waits until another program writes to it.
    if not os.path.isfile(path):
        raise TokenizerError(f"{path}: there is no such file, or it is not a regular one")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            model = file.read(min(size, MAX_FILE_BYTES) + 1)  # memory for this many bytes is taken first
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    if len(model) > MAX_FILE_BYTES:
        raise TokenizerError(f"{path}: is larger than {MAX_FILE_BYTES} bytes, the maximum for a SentencePiece model")
    refuse_pointer(path, model, TokenizerError)
    try:
        n_pieces, n_texts = count_fields(model)
    except (IndexError, ValueError) as error:
        raise TokenizerError(f"{path}: is not a usable SentencePiece model: {error}") from None
    for found, most, what in ((n_pieces, MAX_PIECES, "pieces"), (n_texts, MAX_TEXTS, "texts beside its pieces")):
        if found > most:
            raise TokenizerError(f"{path}: has more than {most} {what}, the maximum")
    return model


def count_fields(model: bytes) -> tuple[int, int]:
    r"""Return the number of pieces in a SentencePiece file, and the number of texts and messages in its other parts.

    Counting ends when one of the numbers is above its maximum. Raises IndexError or ValueError if the file is not a
    protobuf message.

    >>> count_fields(b"\x0a\x03\x0a\x01a" * 2 + b"\x12\x03\x0a\x01b")
    (2, 2)
    """
    n_pieces = n_texts = 0
    for number, start, stop in fields_of(model, 0, len(model)):
        if number == _PIECE:
            n_pieces += 1
        else:
            n_texts += 1
            for _ in fields_of(model, start, stop):
                n_texts += 1
                if n_texts > MAX_TEXTS:
                    break
        if n_pieces > MAX_PIECES or n_texts > MAX_TEXTS:
            break
    return n_pieces, n_texts


def fields_of(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number of each field with a length, and where its bytes begin and end.

    The message begins at byte `at` of the file and ends before byte `end`.
    """
    while at < end:
        tag, at = _varint(data, at)
        number, stored = tag >> 3, tag & 7
        if stored == 0:
            _, at = _varint(data, at)
        elif stored == 2:
            length, at = _varint(data, at)
            if length > end - at:
                raise ValueError(f"a field has {length} bytes; expected at most {end - at}, the bytes left")
            yield number, at, at + length
            at += length
        elif stored in (1, 5):
            at += 8 if stored == 1 else 4
        else:
            raise ValueError(f"a field is stored as type {stored}; expected type 0, 1, 2 or 5")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the number that begins at byte `at`, and the index of the byte after it.

    Each byte holds seven bits of the number, the lowest first. Its eighth bit says whether another byte follows.
    """
    value = data[at]
    if value < 128:  # most are
        return value, at + 1
    value &= 127
    for n in range(1, 10):
        byte = data[at + n]
        value |= (byte & 127) << 7 * n
        if byte < 128:
            return value, at + n + 1
    raise ValueError("a number takes more than ten bytes")
