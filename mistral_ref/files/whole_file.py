"""Writing a file all or nothing: it appears under its name only when it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from mistral_ref.errors import CheckpointError, MistralRefError, printable


@contextmanager
def whole_file(path: str | os.PathLike[str], error: type[MistralRefError] = CheckpointError) -> Iterator[Path]:
    """Give the path to write a file at, which gets its own name once that has gone well; raise `error` if it has not.

    Whatever ends the writing, Ctrl-C too, nothing unfinished is left.
    """
    partial = Path(f"{os.fspath(path)}.partial")
    if not partial.parent.is_dir():
        raise error(f"{path}: cannot be written: there is no directory {partial.parent}")
    try:
        yield partial
        partial.replace(path)
    except (OSError, SafetensorError) as caught:
        raise error(f"{path}: cannot be written: {printable(str(caught))}") from None
    finally:
        with suppress(OSError):
            partial.unlink()
