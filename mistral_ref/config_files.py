"""A directory's configuration: Mistral's own params.json, Hugging Face's config.json, or both -> ModelConfig.

One table holds what the two files call each field. Both are read under our names; an error that comes of it, here or in
ModelConfig, is translated back, so that it names the file, and the field as the file spells it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mistral_ref.config import MixtureOfExperts, ModelConfig, QueryTemperature, Yarn, checked_count, checked_number
from mistral_ref.errors import ConfigError, MistralRefError, MistralRefWarning, shown

# Python's objects are larger than their JSON: "[]" is 2 bytes in a file, about 100 in memory. The largest honest file,
# the index of a mixture of experts, stays well within both limits, and parsing takes at most 16 MiB.
MAX_JSON_BYTES = 512 * 1024
MAX_JSON_CONTAINERS = 20_000

_ORIGINAL = "original_max_position_embeddings"

# A dot leads into a nested object. Where a file has several names for a field, the first that holds a value counts.
# fmt: off
_NAMES = {
    # ours                            params.json                            config.json
    "model_type":                    ("model_type",                         "model_type"),
    "dim":                           ("dim",                                "hidden_size"),
    "n_layers":                      ("n_layers",                           "num_hidden_layers"),
    "n_heads":                       ("n_heads",                            "num_attention_heads"),
    "n_kv_heads":                    ("n_kv_heads",                         "num_key_value_heads"),
    "head_dim":                      ("head_dim",                           "head_dim"),
    "hidden_dim":                    ("hidden_dim",                         "intermediate_size"),
    "vocab_size":                    ("vocab_size",                         "vocab_size"),
    "norm_eps":                      ("norm_eps",                           "rms_norm_eps"),
    "max_seq_len":                   ("max_seq_len max_position_embeddings", "max_position_embeddings"),
    "tied_embeddings":               ("tied_embeddings",                    "tie_word_embeddings"),
    "sliding_window":                ("sliding_window _sliding_window",     "sliding_window"),
    "layer_types":                   ("",                                   "layer_types"),
    "num_experts":                   ("moe.num_experts",                    "num_local_experts"),
    "num_experts_per_tok":           ("moe.num_experts_per_tok",            "num_experts_per_tok"),
    "rope_theta":                    ("rope_theta",                         "rope_parameters.rope_theta rope_theta"),
    "rope_type":                     ("",                  "rope_parameters.rope_type rope_parameters.type"),
    "yarn.factor":                   ("yarn.factor",                        "rope_parameters.factor"),
    "yarn.beta_fast":                ("yarn.beta",                          "rope_parameters.beta_fast"),
    "yarn.beta_slow":                ("yarn.alpha",                         "rope_parameters.beta_slow"),
    "yarn.apply_scale":              ("yarn.apply_scale",                   ""),
    "yarn.attention_factor":         ("",                                   "rope_parameters.attention_factor"),
    "yarn.mscale":                   ("",                                   "rope_parameters.mscale"),
    "yarn.mscale_all_dim":           ("",                                   "rope_parameters.mscale_all_dim"),
    "yarn.truncate":                 ("",                                   "rope_parameters.truncate"),
    f"yarn.{_ORIGINAL}":             (f"yarn.{_ORIGINAL}",
                                      f"{_ORIGINAL} rope_parameters.{_ORIGINAL} max_position_embeddings"),
    "query_temperature.beta":        ("llama_4_scaling.beta",               "rope_parameters.llama_4_scaling_beta"),
    f"query_temperature.{_ORIGINAL}": (f"llama_4_scaling.{_ORIGINAL}",      f"rope_parameters.{_ORIGINAL}"),
}
# Fields that change the mathematics, and the one value of each (or absence, or null) that the forward pass computes.
_PARAMS_JSON_ONLY = {
    "model_type": "transformer", "activation": "silu", "causal": True, "use_biases": False,
    "ada_rms_norm_t_cond": False, "lora": None, "q_lora_rank": None, "kv_lora_rank": None,
}
_CONFIG_JSON_ONLY = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "q_lora_rank": None, "kv_lora_rank": None,
    "partial_rotary_factor": 1, "rope_parameters.partial_rotary_factor": 1, "rope_scaling.partial_rotary_factor": 1,
}
# fmt: on
# What else published params.json files hold, without influence on what the text model computes.
_PARAMS_JSON_HARMLESS = ("vision_encoder", "audio", "multimodal", "quantization", "max_batch_size", "model_parallel")

# The supported model types, and what a field left out of config.json means in each: the defaults of transformers'
# classes (5.23, models/*/configuration_*.py). A field that is not listed must be there.
_PLAIN = {"head_dim": None, "rope_type": "default", "query_temperature.beta": 0}
_MEANING_OF_ABSENCE: dict[str, dict[str, object]] = {
    "mistral": _PLAIN | {"rope_theta": 1e4, "sliding_window": 4096, "norm_eps": 1e-6},
    "mixtral": _PLAIN | {"rope_theta": 1e6, "sliding_window": None, "norm_eps": 1e-5},
    "ministral": _PLAIN | {"sliding_window": 4096, "norm_eps": 1e-6},
    "ministral3": {},
    "llama": _PLAIN | {"rope_theta": 1e4, "sliding_window": None, "norm_eps": 1e-6},
}
_WRAPPER, _WRAPPED = "mistral3", ("mistral", "ministral3")


def read_config(directory: Path) -> ModelConfig:
    """Return the configuration in `directory`; params.json wins over config.json, with a warning if they disagree.

    `rope_row_order` is that of the weights each file comes with; the tensors' names have the last word.
    Raises ConfigError: the file, the field, the value found, what was expected.
    """
    params_json, config_json = directory / "params.json", directory / "config.json"
    if not os.path.lexists(params_json):
        if not os.path.lexists(config_json):
            raise ConfigError(f"{directory}: neither params.json nor config.json is there")
        return _from_config_json(config_json)
    config = _from_params_json(params_json)
    if os.path.lexists(config_json):
        try:
            if differences := _differences(config, _from_config_json(config_json)):
                _warn(f"{config_json}: params.json disagrees and is used: {differences}")
        except ConfigError as error:
            _warn(f"{error}; params.json is used")
    return config


def read_eos_ids(directory: Path) -> tuple[int, ...]:
    """Return the ids that end a text, from generation_config.json or else config.json; () where neither says."""
    for path in (directory / "generation_config.json", directory / "config.json"):
        file = read_json(path) if os.path.lexists(path) else {}
        with _renamed({}, f"{path}: "):
            for name in ("eos_token_id", "text_config.eos_token_id"):
                if (found := _at(file, name)) is not None:
                    ids = found if isinstance(found, list) else [found]
                    if not all(type(token) is int and token >= 0 for token in ids):
                        raise ConfigError(f"{name} is {shown(found)}; expected token ids, whole numbers from 0")
                    return tuple(ids)
    return ()


def read_json(path: Path, error: type[MistralRefError] = ConfigError) -> dict[str, Any]:
    """Return the object in a JSON file, in bounded time and memory; raise `error` if it does not hold one."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for its other end
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
        problem = f"it holds {shown(value)}; expected an object"
    raise error(f"{path}: cannot be read as JSON: {problem}")


def parse_json(text: str) -> Any:
    """Return what JSON `text` holds; raise ValueError if it is none, or costs too much."""
    if text.count("[") + text.count("{") > MAX_JSON_CONTAINERS:
        raise ValueError(f"expected at most {MAX_JSON_CONTAINERS} lists and objects")
    try:
        return json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("lists or objects are nested too deeply") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Readers differ in which value of a repeated key they take, so neither is taken."""
    values = dict(pairs)
    if len(values) < len(pairs):
        absent = object()
        twice = next(key for key, _ in pairs if values.pop(key, absent) is absent)
        raise ValueError(f"key {shown(twice)} occurs twice")
    return values


def _warn(message: str) -> None:
    warnings.warn(message, MistralRefWarning, stacklevel=3)


def _differences(config: ModelConfig, other: ModelConfig) -> str:
    """Say in which fields params.json's reading differs from config.json's, with both values.

    Left aside are the row order, which follows the layout, and `tied_embeddings`: files are often silent about it, and
    it only says what a missing output matrix means.
    """
    differences = []
    for field in (field.name for field in dataclasses.fields(ModelConfig)):
        pair = getattr(config, field), getattr(other, field)
        left_aside = field in ("rope_row_order", "tied_embeddings") or (field == "max_seq_len" and None in pair)
        if pair[0] != pair[1] and not left_aside:
            ours, theirs = (shown(value) if field == "sliding_window" else repr(value) for value in pair)
            differences.append(f"{field} is {theirs}, in params.json {ours}")
    return "; ".join(differences)


def _at(file: object, dotted: str, default: object = None) -> Any:
    """Return what stands in `file` under a dotted name, or `default`; raise ConfigError if it leads into no object.

    >>> _at({"yarn": {"factor": 16}}, "yarn.factor")
    16
    """
    path = dotted.split(".")
    for depth, name in enumerate(path):
        if file is None:
            return default
        if not isinstance(file, dict):
            raise ConfigError(f"{'.'.join(path[:depth])} is {shown(file)}; expected an object")
        if name not in file:
            return default
        file = file[name]
    return file


@contextmanager
def _renamed(names: Mapping[str, str], prefix: str = "") -> Iterator[None]:
    """Let a ConfigError raised inside say `names` in place of our fields, after a prefix."""
    try:
        yield
    except ConfigError as error:
        # Fields are bare words. What follows a quotation mark is a value that was found, and stays.
        message = re.sub(r"(?<!['\w.])[a-z][\w.]*", lambda word: names.get(word[0], word[0]), str(error))
        raise ConfigError(prefix + message) from None


class _Fields:
    """What a file says, under our names: `values` holds the fields that are there, `names` what the file calls each."""

    def __init__(self, file: dict[str, Any], names: Mapping[str, str]) -> None:
        absent = object()
        several = {field: text.split() for field, text in names.items() if text}
        self.names = {
            field: next((name for name in names if _at(file, name) is not None), names[0])
            for field, names in several.items()
        }
        found = {field: _at(file, name, absent) for field, name in self.names.items()}
        self.values = {field: value for field, value in found.items() if value is not absent}

    def required(self, field: str) -> Any:
        if field not in self.values:
            raise ConfigError(f"{field} is missing")
        return self.values[field]

    def count(self, field: str) -> int:
        last = field.rpartition(".")[2]
        with _renamed({last: field}):
            return checked_count(last, self.required(field))

    def number_or(self, default: float, field: str) -> float:
        """Return a number of at least 0, or `default` for one that is absent, null or 0, as in transformers."""
        value = self.values.get(field)
        return checked_number(field, default if value is None else value, zero=True) or default

    def flag(self, field: str, default: bool | None = None) -> bool:
        value = self.required(field) if default is None else self.values.get(field, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{field} is {shown(value)}; expected true or false")
        return value

    def query_temperature(self, block: str) -> QueryTemperature | None:
        """Return what `beta` and the length in `block` say; a beta of 0 leaves queries as they are."""
        beta = checked_number("query_temperature.beta", self.required("query_temperature.beta"), zero=True)
        return QueryTemperature(beta=beta, **{_ORIGINAL: self.count(f"{block}.{_ORIGINAL}")}) if beta else None

    def model_config(self, *, moe: bool, **others: Any) -> ModelConfig:
        """Return the ModelConfig of the fields that both files give alike and of `others`."""
        alike = ("dim", "n_layers", "n_heads", "hidden_dim", "vocab_size", "norm_eps", "rope_theta")
        experts = ("num_experts", "num_experts_per_tok")
        n_kv_heads = self.values.get("n_kv_heads")
        return ModelConfig(
            **{field: self.required(field) for field in alike},
            n_kv_heads=self.required("n_heads") if n_kv_heads is None else n_kv_heads,
            max_seq_len=self.values.get("max_seq_len"),
            moe=MixtureOfExperts(**{field: self.required(field) for field in experts}) if moe else None,
            **others,
        )


def _check_only(file: dict[str, Any], accepted: Mapping[str, object], level: str = "") -> None:
    for name, only in accepted.items():
        value = _at(file, level + name)
        if value is not None and value != only:
            raise ConfigError(f"{level}{name} is {shown(value)}; only {json.dumps(only)} is supported")


def _magnitude(factor: float, mscale: float = 1.0) -> float:
    """Return 0.1 * mscale * ln(factor) + 1: how much YaRN sharpens attention (arXiv:2309.00071, section 3.4).

    >>> round(_magnitude(16), 3)
    1.277
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _from_params_json(path: Path) -> ModelConfig:
    file = read_json(path)
    with _renamed({}, f"{path}: "):
        fields = _Fields(file, {field: names for field, (names, _) in _NAMES.items()})
        with _renamed(fields.names):
            _check_only(file, _PARAMS_JSON_ONLY)
            has_yarn, has_temperature, has_moe = (bool(_at(file, name)) for name in ("yarn", "llama_4_scaling", "moe"))
            windows = _params_json_windows(fields)
            if fields.values.get("rope_theta") is None and (None not in windows or not any(windows)):
                theta, which = (1e4, "a") if any(windows) else (1e6, "no")
                _warn(f"{path}: rope_theta is missing; {theta:g} is assumed, since there is {which} sliding window")
                fields.values["rope_theta"] = theta
            config = fields.model_config(
                head_dim=fields.required("head_dim"),
                sliding_window=windows,
                rope_row_order="interleaved",
                yarn=_params_json_yarn(fields) if has_yarn else None,
                query_temperature=fields.query_temperature("query_temperature") if has_temperature else None,
                moe=has_moe,
                tied_embeddings=fields.flag("tied_embeddings", default=False),
            )
    if unknown := _unknown_in_params_json(file):
        _warn(f"{path}: unknown fields are left aside: {', '.join(shown(name) for name in unknown[:20])}")
    return config


def _unknown_in_params_json(file: dict[str, Any]) -> list[str]:
    known = {*" ".join(names for names, _ in _NAMES.values()).split(), *_PARAMS_JSON_ONLY, *_PARAMS_JSON_HARMLESS}
    blocks = {name.partition(".")[0] for name in known if "." in name}
    nested = [f"{block}.{name}" for block in sorted(blocks) for name in file.get(block) or ()]
    return [name for name in [*file, *nested] if name not in known | blocks]


def _params_json_windows(fields: _Fields) -> tuple[Any, ...]:
    """One window holds for every layer; a list is repeated (mistral-inference, cache.py); either may be a string."""
    window, n_layers = fields.values.get("sliding_window"), fields.count("n_layers")
    if isinstance(window, str):
        try:
            window = parse_json(window.replace("None", "null"))
        except ValueError:
            expected = "a whole number, null or a list of these"
            raise ConfigError(f"sliding_window is {shown(window)}; expected {expected}") from None
    windows = window if isinstance(window, list) else [window]
    if not windows or n_layers % len(windows):
        raise ConfigError(f"sliding_window has {len(windows)} entries; expected a divisor of n_layers, {n_layers}")
    return tuple(windows) * (n_layers // len(windows))


def _params_json_yarn(fields: _Fields) -> Yarn:
    factor = checked_number("yarn.factor", fields.required("yarn.factor"))
    return Yarn(
        factor=factor,
        original_max_position_embeddings=fields.count(f"yarn.{_ORIGINAL}"),
        beta_fast=fields.required("yarn.beta_fast"),
        beta_slow=fields.required("yarn.beta_slow"),
        attention_factor=_magnitude(factor) if fields.flag("yarn.apply_scale") else 1.0,
    )


def _from_config_json(path: Path) -> ModelConfig:
    file = read_json(path)
    with _renamed({}, f"{path}: "):
        level = "text_config." if file.get("model_type") == _WRAPPER else ""
        # transformers 4 wrote rope_scaling beside rope_theta. 5 writes rope_parameters, and still prefers the former.
        rope = level + ("rope_scaling" if _at(file, f"{level}rope_scaling") else "rope_parameters")
        names = {field: " ".join(level + name for name in names.split()) for field, (_, names) in _NAMES.items()}
        fields = _Fields(file, {field: name.replace(f"{level}rope_parameters", rope) for field, name in names.items()})
        with _renamed(fields.names):
            model_type = fields.required("model_type")
            supported = _WRAPPED if level else (*_MEANING_OF_ABSENCE, _WRAPPER)
            if model_type not in supported:
                raise ConfigError(f"model_type is {shown(model_type)}; supported are {', '.join(supported)}")
            _check_only(file, _CONFIG_JSON_ONLY, level)
            if any(isinstance(value, dict) for value in (_at(file, rope) or {}).values()):
                raise ConfigError(f"{rope} differs by kind of layer; expected one RoPE for all layers")
            fields.values = _MEANING_OF_ABSENCE[model_type] | fields.values
            yarn = _config_json_yarn(fields)
            return fields.model_config(
                head_dim=_config_json_head_dim(fields),
                sliding_window=_config_json_windows(fields, model_type),
                rope_row_order="halves",
                yarn=yarn,
                query_temperature=fields.query_temperature("yarn" if yarn else "query_temperature"),
                moe=model_type == "mixtral",
                tied_embeddings=_config_json_tied(file, level),
            )


def _config_json_head_dim(fields: _Fields) -> Any:
    head_dim = fields.required("head_dim")
    if head_dim is not None:
        return head_dim
    dim, n_heads = fields.count("dim"), fields.count("n_heads")
    if dim % n_heads:
        raise ConfigError(f"n_heads is {n_heads}; expected a divisor of dim, {dim}, since head_dim is not given")
    return dim // n_heads


def _config_json_windows(fields: _Fields, model_type: str) -> tuple[int | None, ...]:
    n_layers = fields.count("n_layers")
    window = None if fields.required("sliding_window") is None else fields.count("sliding_window")
    if window is not None and model_type == "llama":
        raise ConfigError(f"sliding_window is {window}; expected null in a llama model")
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        return (window,) * n_layers
    kinds = ("full_attention", "sliding_attention")
    one_each = isinstance(layer_types, list) and len(layer_types) == n_layers
    if not one_each or any(kind not in kinds for kind in layer_types):
        expected = f"{' or '.join(kinds)} for each of {n_layers} layers"
        raise ConfigError(f"layer_types is {shown(layer_types)}; expected {expected}")
    if window is None and kinds[1] in layer_types:
        raise ConfigError(f"sliding_window is None; expected a whole number, since layer_types has {kinds[1]}")
    return tuple(window if kind == kinds[1] else None for kind in layer_types)


def _config_json_yarn(fields: _Fields) -> Yarn | None:
    """Follow transformers 5.23, modeling_rope_utils.py, _compute_yarn_parameters."""
    rope_type = fields.required("rope_type")
    if rope_type == "default":
        return None
    if rope_type != "yarn":
        raise ConfigError(f"rope_type is {shown(rope_type)}; supported are default and yarn")
    original, factor = fields.count(f"yarn.{_ORIGINAL}"), fields.required("yarn.factor")
    factor = fields.count("max_seq_len") / original if factor is None else checked_number("yarn.factor", factor)
    attention_factor = fields.values.get("yarn.attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = fields.number_or(0, "yarn.mscale"), fields.number_or(0, "yarn.mscale_all_dim")
        if not mscale or not mscale_all_dim:  # one without the other counts for nothing
            mscale, mscale_all_dim = 1, 0
        attention_factor = _magnitude(factor, mscale) / _magnitude(factor, mscale_all_dim)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fields.number_or(32, "yarn.beta_fast"),
        beta_slow=fields.number_or(1, "yarn.beta_slow"),
        attention_factor=attention_factor,
        truncate=fields.flag("yarn.truncate", default=True),
    )


def _config_json_tied(file: dict[str, Any], level: str) -> bool:
    """Tied if either level says so, or if a wrapper says nothing: its class's default is true."""
    said = {name: _at(file, name) for name in (f"{level}tie_word_embeddings", "tie_word_embeddings")}
    for name, tied in said.items():
        if not isinstance(tied, bool | None):
            raise ConfigError(f"{name} is {shown(tied)}; expected true or false")
    return True in said.values() or (bool(level) and False not in said.values())
