"""The option for a file that keeps what a model has read from one call to the next."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

from mistral_ref.cache import KVCache
from mistral_ref.errors import InputError
from mistral_ref.files.paths import local_path
from mistral_ref.model import Model


def add_prompt_cache_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the file."""
    parser.add_argument(
        "--prompt-cache",
        metavar="FILE",
        help="keep in this file what the model has read and written; the next call with it reads only what is new in "
        "its prompt, if it begins in the same way (the file's --cache-dtype stays as it is)",
    )


@contextmanager
def prompt_cache(model: Model, name: str | None, dtype: str | None) -> Iterator[KVCache | None]:
    """Yield the cache in a file, or an empty one if there is no such file yet, and save it at the end; or None.

    Raises InputError if the file's folder is missing, and CacheError if the file is not this model's.
    """
    if name is None:
        yield None
        return
    path = local_path(name)
    if not os.path.isdir(path.parent):
        raise InputError(f"{path}: cannot be written: no such folder")
    cache = model.load_cache(path) if os.path.lexists(path) else model.new_cache(dtype=dtype)
    yield cache
    cache.save(path)
