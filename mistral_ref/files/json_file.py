"""Read JSON files that may be hostile. Reading takes bounded time and memory; a file that needs more is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any, NamedTuple

from mistral_ref.errors import ConfigError, MistralRefError, short_repr
from mistral_ref.files.paths import refuse_pointer


class Limits(NamedTuple):
    """How large a JSON file may be. Python's objects are larger than their JSON, so its bytes are not all that counts.

    n_bytes         of the file
    n_containers    lists and objects: "[]" is 2 bytes in a file and about 100 bytes in memory
    n_values        values in lists and objects: "a text" is 8 bytes in a file and about 60 in memory
    """

    n_bytes: int
    n_containers: int
    n_values: int


# Parsing a configuration takes at most 16 MiB. The largest honest file, the index of a mixture of experts, is well
# below these maximums.
MAX_JSON_BYTES = 512 * 1024
CONFIG = Limits(MAX_JSON_BYTES, 20_000, MAX_JSON_BYTES)
# A file with these maximums takes up to 320 MiB. The largest published tokenizers have 20 MB, 280,000 lists and
# objects, and a million values.
TOKENIZER = Limits(32 * 2**20, 400_000, 1_200_000)


def read_json(path: Path, error: type[MistralRefError] = ConfigError, limits: Limits = CONFIG) -> dict[str, Any]:
    """Return the object in a JSON file; raise `error` if the file cannot be read, is too large or holds no object."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # open() of a named pipe would wait for its other end
            raise ValueError("expected a regular file")
        with path.open("rb") as file:
            data = file.read(min(found.st_size, limits.n_bytes) + 1)  # memory for this many bytes is taken first
        if len(data) > limits.n_bytes:
            raise ValueError(f"expected at most {limits.n_bytes} bytes")
        refuse_pointer(path, data, error)
        value = parse_json(data.decode("utf-8"), limits)
    except OSError as caught:
        problem = str(caught.strerror)
    except MistralRefError:
        raise
    except ValueError as caught:
        problem = str(caught)
    else:
        if isinstance(value, dict):
            return value
        problem = f"it holds {short_repr(value)}; expected an object"
    raise error(f"{path}: cannot be read as JSON: {problem}")


def parse_json(text: str, limits: Limits = CONFIG) -> Any:
    """Return the value of a JSON text; raise ValueError if it is not JSON, or has more in it than `limits` allow."""
    n_containers = text.count("[") + text.count("{")
    if n_containers > limits.n_containers:
        raise ValueError(f"expected at most {limits.n_containers} lists and objects")
    if n_containers + text.count(",") > limits.n_values:
        raise ValueError(f"expected at most {limits.n_values} values")
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict; raise ValueError for a key that occurs twice, because readers differ in which value they take."""
    values = dict(pairs)
    if len(values) < len(pairs):
        absent = object()
        twice = next(key for key, _ in pairs if values.pop(key, absent) is absent)
        raise ValueError(f"key {short_repr(twice)} occurs twice")
    return values
