"""Write the arrays and settings of a cache to a safetensors file, and read them. Only cache.py makes a KVCache of them.

    layers.N.k, layers.N.v      keys and values (S, G, K) of one layer, oldest position first

The metadata hold the settings, and the configuration of the model that the cache belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError, CheckpointError, escaped, short_repr
from mistral_ref.files.json_file import parse_json
from mistral_ref.files.paths import local_path
from mistral_ref.files.tensor_file import open_with_metadata, write_tensor_file

_FORMAT = "mistral_ref.cache.v1"
_SETTINGS = {"length", "chunk", "max_tokens", "dtype"}
_MAX_LENGTH = 2**40  # below it float64 holds every position exactly, and no sum of positions overflows


class SavedCache(NamedTuple):
    """The contents of a file.

    settings    "length", "chunk", "max_tokens" and "dtype" of the cache
    layers      for each layer its keys and its values, (S, G, K) each
    """

    settings: dict[str, Any]
    layers: list[tuple[np.ndarray, np.ndarray]]


def write_cache_file(
    path: str | os.PathLike[str],
    config: ModelConfig,
    settings: Mapping[str, object],
    layers: Iterable[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write a cache's settings and layers to a file. The file gets its name only when it is complete.

    Raises CacheError if it cannot be written.
    """
    tensors = {
        f"layers.{number}.{name}": np.ascontiguousarray(array)
        for number, pair in enumerate(layers)
        for name, array in zip("kv", pair, strict=True)
    }
    metadata = {_FORMAT: json.dumps(dict(settings)), "config": _config_json(config)}
    write_tensor_file(path, tensors, metadata, CacheError)


def read_cache_file(path: str | os.PathLike[str], config: ModelConfig) -> SavedCache:
    """Return the contents of a file that `write_cache_file` wrote; float32 and float64 arrays stay mapped.

    Raises CacheError if the file is not a saved cache, is damaged, or belongs to another configuration.
    """
    path = local_path(path)
    try:
        found, metadata = open_with_metadata(path)
        if _FORMAT not in metadata or "config" not in metadata:
            raise CheckpointError(f"{path}: its metadata lack {_FORMAT} or config; expected both")
        settings = parse_json(metadata[_FORMAT])
        if not isinstance(settings, dict) or settings.keys() != _SETTINGS:
            raise CheckpointError(
                f"{path}: its settings are {short_repr(settings)}; expected {', '.join(sorted(_SETTINGS))}"
            )
        if metadata["config"] != _config_json(config):
            raise CacheError(f"{path}: this cache belongs to a model of another configuration")
        length = settings["length"]
        if type(length) is not int or not 0 <= length < _MAX_LENGTH:
            raise CheckpointError(f"{path}: length is {short_repr(length)}; expected 0 to {_MAX_LENGTH - 1}")
        tensors = {tensor.name: tensor for tensor in found}
        names = [[f"layers.{number}.{which}" for which in "kv"] for number in range(config.n_layers)]
        if missing := [name for pair in names for name in pair if name not in tensors]:
            raise CheckpointError(f"{path}: {missing[0]} is missing")
        return SavedCache(settings, [(tensors[k].floats(), tensors[v].floats()) for k, v in names])
    except CacheError:
        raise
    except ValueError as error:
        raise not_a_cache(path, error) from None


def not_a_cache(path: str | os.PathLike[str], problem: object) -> CacheError:
    """Return the error for a file that is not a cache, or is damaged. Its message has the path once, at the start."""
    path = local_path(path)
    problem = str(problem).removeprefix(escaped(f"{path}: "))
    return CacheError(f"{path}: the file is damaged, or save() did not write it: {problem}")


def _config_json(config: ModelConfig) -> str:
    """Return, as JSON, the fields that two models must share to share a cache: all fields except rope_row_order."""
    fields = dataclasses.asdict(config)
    del fields["rope_row_order"]
    return json.dumps(fields, sort_keys=True)
