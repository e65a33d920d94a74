"""A cache in a safetensors file: arrays and settings in and out. Only cache.py makes a KVCache of them.

    layers.N.k, layers.N.v      keys and values (S, G, K) of one layer, oldest position first

The metadata hold the settings, and the configuration of the model that the cache belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError, CheckpointError, short_repr
from mistral_ref.files.json_file import parse_json
from mistral_ref.files.tensor_file import open_with_metadata, write_tensor_file

_FORMAT = "mistral_ref.cache.v1"
_SETTINGS = {"length", "chunk", "max_tokens", "dtype"}
_MAX_LENGTH = 2**40  # positions stay exact in float64 angles and far from overflow


class SavedCache(NamedTuple):
    """What a file holds: the settings "length", "chunk", "max_tokens" and "dtype", and each layer's keys and values."""

    settings: dict[str, Any]
    layers: list[tuple[np.ndarray, np.ndarray]]


def write_cache_file(
    path: str | os.PathLike[str],
    config: ModelConfig,
    settings: Mapping[str, object],
    layers: Iterable[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write a file, which appears under its name only when it is complete; raise CacheError if that fails."""
    tensors = {
        f"layers.{number}.{name}": np.ascontiguousarray(array)
        for number, pair in enumerate(layers)
        for name, array in zip("kv", pair, strict=True)
    }
    metadata = {_FORMAT: json.dumps(dict(settings)), "config": _config_json(config)}
    write_tensor_file(path, tensors, metadata, CacheError)


def read_cache_file(path: str | os.PathLike[str], config: ModelConfig) -> SavedCache:
    """Return what a file holds for a model of this configuration; arrays stay mapped.

    Raises CacheError if the file is none, is damaged, or belongs to another configuration.
    """
    try:
        found, metadata = open_with_metadata(Path(path))
        if _FORMAT not in metadata or "config" not in metadata:
            raise CheckpointError(f"{path}: its metadata do not say that it is a cache")
        settings = parse_json(metadata[_FORMAT])
        if not isinstance(settings, dict) or settings.keys() != _SETTINGS:
            raise CheckpointError(
                f"{path}: its settings are {short_repr(settings)}; expected {', '.join(sorted(_SETTINGS))}"
            )
        if metadata["config"] != _config_json(config):
            raise CacheError(f"{path}: this cache belongs to a model of another configuration")
        length = settings["length"]
        if not isinstance(length, int) or not 0 <= length < _MAX_LENGTH:
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
    """Return the error for a file that is no cache, or damaged; the path stands before the problem once."""
    problem = str(problem).removeprefix(f"{path}: ")
    return CacheError(f"{path}: not a cache that save() wrote, or damaged: {problem}")


def _config_json(config: ModelConfig) -> str:
    """Return what two models have to agree on to share a cache: all but the order of rows in wq and wk."""
    fields = dataclasses.asdict(config)
    del fields["rope_row_order"]
    return json.dumps(fields, sort_keys=True)
