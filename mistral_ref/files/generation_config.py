"""Read the ids that begin and end a text from generation_config.json, or from config.json."""

from __future__ import annotations

import os
from pathlib import Path

from mistral_ref.errors import ConfigError, Field, short_repr
from mistral_ref.files.config_fields import naming, value_at
from mistral_ref.files.json_file import read_json


def read_eos_ids(directory: Path) -> tuple[int, ...]:
    """Return the ids that end a text, from generation_config.json, else from config.json; () if neither holds them.

    Raises ConfigError if a file cannot be read or holds something else than token ids.
    """
    return _read_ids(directory, "eos_token_id")


def read_bos_ids(directory: Path) -> tuple[int, ...]:
    """Return the id that begins a text, as `read_eos_ids` does."""
    return _read_ids(directory, "bos_token_id")


def _read_ids(directory: Path, field: str) -> tuple[int, ...]:
    for path in (directory / "generation_config.json", directory / "config.json"):
        file = read_json(path) if os.path.lexists(path) else {}
        with naming(path):
            for name in (field, f"text_config.{field}"):
                if (found := value_at(file, name)) is not None:
                    ids = found if isinstance(found, list) else [found]
                    if not all(type(token) is int and token >= 0 for token in ids):
                        raise ConfigError(
                            Field(name), f" is {short_repr(found)}; expected token ids, whole numbers from 0"
                        )
                    return tuple(ids)
    return ()
