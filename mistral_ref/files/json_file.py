"""Read JSON files that may be hostile. Reading takes bounded time and memory; a file that needs more is refused."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from mistral_ref.errors import ConfigError, MistralRefError, short_repr

# Python's objects are larger than their JSON: "[]" is 2 bytes in a file and about 100 bytes in memory. With these two
# maximums parsing takes at most 16 MiB. The largest honest file, the index of a mixture of experts, is well below both.
MAX_JSON_BYTES = 512 * 1024
MAX_JSON_CONTAINERS = 20_000


def read_json(path: Path, error: type[MistralRefError] = ConfigError) -> dict[str, Any]:
    """Return the object in a JSON file; raise `error` if the file cannot be read, is too large or holds no object."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # open() of a named pipe would wait for its other end
            raise ValueError("expected a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"expected at most {MAX_JSON_BYTES} bytes")
        value = parse_json(data.decode("utf-8"))
    except OSError as caught:
        problem = str(caught.strerror)
    except ValueError as caught:
        problem = str(caught)
    else:
        if isinstance(value, dict):
            return value
        problem = f"it holds {short_repr(value)}; expected an object"
    raise error(f"{path}: cannot be read as JSON: {problem}")


def parse_json(text: str) -> Any:
    """Return the value of a JSON text; raise ValueError if it is not JSON, or has too many lists and objects."""
    if text.count("[") + text.count("{") > MAX_JSON_CONTAINERS:
        raise ValueError(f"expected at most {MAX_JSON_CONTAINERS} lists and objects")
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
