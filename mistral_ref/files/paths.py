"""Paths that a user gave, and names of models in the hub's cache.

`~` is the user's home. What lies there instead of a model is told by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mistral_ref.errors import InputError, MistralRefError, short_repr
from mistral_ref.files import hub

METADATA = "metadata.gguf"  # beside weights that were in a GGUF file: configuration and tokenizer, and no tensors
_OTHER_GGUF = re.compile(r"mmproj|.*-(?!00001-)\d{5}-of-\d{5}\.gguf$", re.DOTALL)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return a path as a Path. `~` at its beginning becomes the user's home, if the user has one.

    Raises InputError for what is no path.
    """
    if not isinstance(path, (str, os.PathLike)) or path == "":
        raise InputError(f"{short_repr(path)} is no path; expected a string or a Path")
    return Path(os.path.expanduser(os.fspath(path)))


def model_path(path: str | os.PathLike[str], error: type[MistralRefError] = InputError) -> Path:
    """Return an existing path as a Path; else the path in the hub's cache of the model that has this name (`hub.find`).

    A path that is neither is returned as it is. Raises `error` if it has the form of a name and is not in the cache.
    """
    found = local_path(path)
    return found if os.path.lexists(found) else hub.find(os.fspath(path), error) or found


def checked_model(path: str | os.PathLike[str]) -> Path:
    """Return the path of a model: of a GGUF file, or of a directory that can be read; `path` may be a name, too.

    A directory with a GGUF file and no safetensors files is the GGUF file in it. Raises InputError if it holds several,
    or if `path` is neither a GGUF file nor a directory that can be read, nor the name of a model in the hub's cache.
    """
    directory = model_path(path)
    if is_gguf(directory):
        return directory
    try:
        names = os.listdir(os.path.join(directory, "."))  # the dot: files in it can be opened, too
    except FileNotFoundError:
        hint = "; load() without a path is the demonstration model" if str(path) == "demo" else ""
        raise InputError(f"{directory}: no such directory{hint}") from None
    except (OSError, ValueError) as error:
        if os.path.isfile(directory):
            raise InputError(
                f"{directory}: a file, not a directory; expected a GGUF file, or the directory that holds this file"
            ) from None
        raise InputError(f"{directory}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if "snapshots" in names and not {"params.json", "config.json"} & set(names):
        snapshot = hub.usual_snapshot(directory)
        raise InputError(f"{directory}: a folder of the hub's cache, not a model's directory; expected {snapshot}")
    return gguf_in(directory, names) or directory


def is_gguf(path: Path) -> bool:
    """Return whether a path is a GGUF file, or is called one."""
    if path.name.endswith(".gguf"):
        return not os.path.isdir(path)
    try:
        if not os.path.isfile(path):  # open() of a named pipe would wait for its other end
            return False
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


def gguf_of(path: Path) -> Path | None:
    """Return the GGUF file with the configuration and the tokenizer of a model; None if it has no such file."""
    if is_gguf(path):
        return path
    return path / METADATA if os.path.lexists(path / METADATA) else None


def begins_gguf_model(name: str) -> bool:
    """Return whether this is the name of a GGUF file with a model in it, or of the first of its shards.

    Files that llama.cpp has beside a model, with the weights for pictures, are none.
    """
    return name.endswith(".gguf") and not _OTHER_GGUF.match(name)


def gguf_in(directory: Path, names: Iterable[str]) -> Path | None:
    """Return the GGUF file, or the first shard, in a directory of these names; None beside safetensors files.

    Raises InputError if there are several GGUF files.
    """
    names = sorted(names)
    if any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return None
    found = [name for name in names if begins_gguf_model(name)]
    if len(found) > 1:
        raise InputError(f"{directory}: holds several GGUF files, {short_repr(found)}; expected the path of one")
    return directory / found[0] if found else None


def refuse_pointer(path: Path, beginning: bytes, error: type[MistralRefError]) -> None:
    """Raise `error` if a file that begins with these bytes is a pointer of Git LFS, in place of the file itself."""
    if beginning.startswith(b"version https://git-lfs.github.com/spec/"):
        raise error(f"{path}: a pointer of Git LFS, not the file itself; expected the file: `git lfs pull` fetches it")
