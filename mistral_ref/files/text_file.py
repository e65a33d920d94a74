"""Read a small text file that lies beside a model: whole, of a bounded size, and never from a pipe."""

from __future__ import annotations

import os
from pathlib import Path

from mistral_ref.errors import MistralRefError


def read_text(path: Path, error: type[MistralRefError], most_bytes: int) -> str:
    """Return the text of a UTF-8 file.

    Raises `error` if there is no such file, if it is not a regular one, cannot be read, is not UTF-8, or has more than
    `most_bytes` bytes.
    """
    if not os.path.isfile(path):  # open() of a named pipe would wait for its other end
        raise error(f"{path}: there is no such file, or it is not a regular file")
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
        text = data.decode()
    except OSError as caught:
        raise error(f"{path}: cannot be read: {caught.strerror}") from None
    except UnicodeDecodeError as caught:
        raise error(f"{path}: is not UTF-8 text: {caught.reason} at {caught.start}") from None
    if len(data) > most_bytes:
        raise error(f"{path}: is larger than {most_bytes} bytes, the maximum")
    return text
