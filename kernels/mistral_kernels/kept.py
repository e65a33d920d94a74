"""Compiled kernels on disk: one file a kernel, with a checksum before its content.

A file that was cut or changed does not fit its checksum, so its kernel is compiled again. Code with one wrong bit would
end the process.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from numba.core.compiler import CompileResult
from numba.core.serialize import dumps
from numba.misc.appdirs import AppDirs


def _folders() -> Iterator[Path]:
    """Yield the folders for compiled kernels, in the order in which they are tried.

    It is the one that NUMBA_CACHE_DIR names, or these two: __pycache__ beside the sources, where kernels serve all
    users of an installation, and the user's own cache folder.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        yield Path(chosen)
        return
    yield Path(__file__).parent / "__pycache__"
    own = Path(AppDirs(appname="mistral_kernels", appauthor=False).user_cache_dir)
    if own.is_absolute():  # it is not where the user has no home
        yield own


def load(name: str, target_context: Any) -> CompileResult | None:
    """Return the kernel of this name from the first folder that has it whole; None if there is none."""
    target_context.refresh()
    for folder in _folders():
        with suppress(Exception):  # what is broken in whichever way is compiled again
            content = (folder / name).read_bytes()
            checksum, payload = content[:32], content[32:]
            if hashlib.sha256(payload).digest() == checksum:
                return CompileResult._rebuild(target_context, *pickle.loads(payload))
    return None


def save(name: str, compiled: CompileResult) -> None:
    """Write a kernel into the first folder that can be written. Raises OSError if there is none."""
    payload = dumps(compiled._reduce())
    problem = OSError("there is no folder for them: this user has no home")
    for folder in _folders():
        try:
            _write(folder, name, hashlib.sha256(payload).digest() + payload)
            return
        except OSError as error:
            problem = error
    raise problem


def _write(folder: Path, name: str, content: bytes) -> None:
    """Write a file that appears whole or not at all, also where other processes write the same one."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.{os.getpid()}-{threading.get_ident()}"
    try:
        with open(partial, "xb") as file:  # readable by others, as the user's umask has it
            file.write(content)
        partial.replace(folder / name)
    finally:
        partial.unlink(missing_ok=True)
