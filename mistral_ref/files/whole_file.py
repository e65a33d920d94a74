"""Write a file or a directory completely or not at all: it gets its name only when it is complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from mistral_ref.errors import CheckpointError, InputError, MistralRefError, printable


@contextmanager
def whole_file(path: str | os.PathLike[str], error: type[MistralRefError] = CheckpointError) -> Iterator[Path]:
    """Give a path at which to write a file; at the end the file is renamed to `path`.

    If the writing stops early, the unfinished file is deleted, after Ctrl-C too. Raises `error` if writing fails.
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


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Give a new directory to fill; at the end it is renamed to `target`. If the filling fails, it is deleted.

    Raises InputError if the directory cannot be written.
    """
    if not target.absolute().parent.is_dir():
        raise InputError(f"{target}: cannot be written: there is no directory {target.absolute().parent}")
    try:
        directory = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
        try:
            directory.chmod(0o755)
            yield directory
            directory.rename(target)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from None
