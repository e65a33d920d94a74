"""Write the arrays and settings of a cache to a safetensors file, and read them. Only cache.py makes a KVCache of them.

    tokens                      the ids of all tokens (N,), int64
    layers.N.k, layers.N.v      keys and values (S, G, K) of one layer, oldest position first

The metadata hold the settings, and the configuration of the model that the cache belongs to.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError, CheckpointError, escaped, first_difference, short_repr
from mistral_ref.files.json_file import parse_json
from mistral_ref.files.mapped_file import require_regular_file
from mistral_ref.files.paths import local_path
from mistral_ref.files.tensor_file import Tensor, open_tensor_file, write_tensor_file

_FORMAT = "mistral_ref.cache.v2"
_WITHOUT_TOKENS = "mistral_ref.cache.v1"
_SETTINGS = {"chunk", "max_tokens", "dtype", "weights"}


class SavedCache(NamedTuple):
    """The contents of a file.

    settings    "chunk", "max_tokens" and "dtype" of the cache; "weights", a fingerprint of the model's; None: not known
    tokens      the ids of its tokens (N,)
    layers      for each layer its keys and its values, (S, G, K) each
    """

    settings: dict[str, Any]
    tokens: np.ndarray
    layers: list[tuple[np.ndarray, np.ndarray]]


def write_cache_file(
    path: str | os.PathLike[str],
    config: ModelConfig,
    settings: Mapping[str, object],
    tokens: Sequence[int],
    layers: Iterable[tuple[np.ndarray, np.ndarray]],
) -> None:
    """Write a cache's settings, tokens and layers to a file. The file gets its name only when it is complete.

    Raises CacheError if it cannot be written.
    """
    tensors = {
        f"layers.{number}.{name}": np.ascontiguousarray(array)
        for number, pair in enumerate(layers)
        for name, array in zip("kv", pair, strict=True)
    }
    tensors["tokens"] = np.array(tokens, np.int64)
    metadata = {_FORMAT: json.dumps(dict(settings)), "config": _config_json(config)}
    write_tensor_file(path, tensors, metadata, CacheError)


def read_cache_file(path: str | os.PathLike[str], config: ModelConfig) -> SavedCache:
    """Return the contents of a file that `write_cache_file` wrote; float32 and float64 arrays stay mapped.

    Raises CacheError if the file is not a saved cache, is damaged, or belongs to another configuration.
    """
    path = local_path(path)
    try:
        require_regular_file(path)
    except CheckpointError as error:
        raise CacheError(str(error)) from None
    try:
        file = open_tensor_file(path)
        metadata = file.metadata
        if _WITHOUT_TOKENS in metadata:
            raise CacheError(f"{path}: mistral_ref 0.1.0 saved this cache, without its token ids; compute it again")
        if _FORMAT not in metadata or "config" not in metadata:
            raise CheckpointError(f"{path}: its metadata lack {_FORMAT} or config; expected both")
        settings = parse_json(metadata[_FORMAT])
        if not isinstance(settings, dict) or settings.keys() != _SETTINGS:
            raise CheckpointError(
                f"{path}: its settings are {short_repr(settings)}; expected {', '.join(sorted(_SETTINGS))}"
            )
        if difference := first_difference(parse_json(metadata["config"]), parse_json(_config_json(config))):
            raise CacheError(f"{path}: this cache belongs to a model of another configuration: {difference}")
        tensors = {tensor.name: tensor for tensor in file}
        names = [[f"layers.{number}.{which}" for which in "kv"] for number in range(config.n_layers)]
        if missing := [name for name in ("tokens", *(name for pair in names for name in pair)) if name not in tensors]:
            raise CheckpointError(f"{path}: {missing[0]} is missing")
        layers = [(tensors[k].floats(), tensors[v].floats()) for k, v in names]
        return SavedCache(settings, _token_ids(tensors["tokens"], config.vocab_size), layers)
    except CacheError:
        raise
    except ValueError as error:
        raise not_a_cache(path, error) from None


def _token_ids(tensor: Tensor, vocab_size: int) -> np.ndarray:
    if tensor.dtype != "I64" or len(tensor.shape) != 1:
        raise CheckpointError(f"tokens is {tensor.dtype} {short_repr(tensor.shape)}; expected I64 of one axis")
    ids = tensor.raw.view("<i8")
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.size:
        raise CheckpointError(f"tokens holds the id {outside[0]}; expected 0 to {vocab_size - 1}")
    return ids


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
