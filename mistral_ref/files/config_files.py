"""Read the ModelConfig of a directory from Mistral's own params.json, or from Hugging Face's config.json.

`config_fields.py` has the names of the fields in both files. This module has their meaning: the value of an absent
field, values that follow from several fields, and values that are refused because the forward pass would be wrong.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mistral_ref.config import ModelConfig, Yarn, checked_number
from mistral_ref.errors import ConfigError, Field, short_repr, warn
from mistral_ref.files.config_fields import (
    NAMES,
    ORIGINAL,
    Fields,
    check_only,
    difference_text,
    differences,
    naming,
    spelled_as,
    value_at,
)
from mistral_ref.files.json_file import parse_json, read_json

# fmt: off
# Fields that change the mathematics. The forward pass is right only if a field has the value given here, is absent, or
# is null.
_PARAMS_JSON_ONLY = {
    "model_type": "transformer", "activation": "silu", "causal": True, "use_biases": False,
    "ada_rms_norm_t_cond": False, "lora": None, "q_lora_rank": None, "kv_lora_rank": None,
}
_CONFIG_JSON_ONLY = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "q_lora_rank": None, "kv_lora_rank": None,
    "partial_rotary_factor": 1, "rope_parameters.partial_rotary_factor": 1, "rope_scaling.partial_rotary_factor": 1,
}
# fmt: on
# Other fields of published params.json files. They do not change the results of the text model.
_PARAMS_JSON_HARMLESS = {"vision_encoder", "audio", "multimodal", "quantization", "quantization_config"}
_PARAMS_JSON_HARMLESS |= {"dtype", "max_batch_size", "model_parallel", "model_max_length"}
# The supported model types, and for each the values that fields have if config.json does not hold them. They are the
# defaults of transformers' classes (5.23, models/*/configuration_*.py). Every field that is not listed must be there.
_PLAIN = {"head_dim": None, "rope_type": "default", "query_temperature.beta": 0}
_MEANING_OF_ABSENCE: dict[str, dict[str, object]] = {
    "mistral": _PLAIN | {"rope_theta": 1e4, "sliding_window": 4096, "norm_eps": 1e-6},
    "mixtral": _PLAIN | {"rope_theta": 1e6, "sliding_window": None, "norm_eps": 1e-5},
    "ministral": _PLAIN | {"sliding_window": 4096, "norm_eps": 1e-6},
    "ministral3": {},
    "llama": _PLAIN | {"rope_theta": 1e4, "sliding_window": None, "norm_eps": 1e-6},
}
# A wrapper is a model type that holds a whole text model. The fields of the text model are under text_config.
_WRAPPER, _WRAPPED = "mistral3", ("mistral", "ministral3")


def read_config(directory: Path) -> ModelConfig:
    """Return the configuration in `directory`.

    If both files are there, params.json is used, and a warning names the fields that differ. Theta, the longest
    sequence and tied embeddings are taken from config.json if only config.json says them. `rope_row_order` is
    "interleaved" for params.json and "halves" for config.json; `open_model` replaces it by the order of the weights.
    Raises ConfigError. The message names the file, the field, its value and the expected value.
    """
    params_json, config_json = directory / "params.json", directory / "config.json"
    if not os.path.lexists(params_json):
        if not os.path.lexists(config_json):
            raise ConfigError(f"{directory}: holds no configuration; expected params.json or config.json")
        return read_config_json(config_json)
    other = None
    if os.path.lexists(config_json):
        try:
            other = read_config_json(config_json)
        except ConfigError as error:
            warn(f"{error}; params.json is used")
    config = read_params_json(params_json, {} if other is None else _said(config_json, other))
    if other is not None and (found := "; ".join(difference_text(*one) for one in differences(config, other))):
        warn(f"{config_json}: params.json disagrees and is used: {found}")
    return config


def magnitude(factor: float, mscale: float = 1.0) -> float:
    """Return YaRN's scale of cosines and sines, 0.1 * mscale * ln(factor) + 1 (arXiv:2309.00071, section 3.4).

    >>> round(magnitude(16), 3)
    1.277
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _said(config_json: Path, config: ModelConfig) -> dict[str, Any]:
    """Return the fields of config.json that count if params.json does not hold them: those whose absence says nothing.

    config      what config.json was read as
    """
    said: dict[str, Any] = {"rope_theta": config.rope_theta, "max_seq_len": config.max_seq_len}
    file = read_json(config_json)
    if any(value_at(file, f"{level}tie_word_embeddings") is not None for level in ("", "text_config.")):
        said["tied_embeddings"] = config.tied_embeddings
    return said


def read_params_json(path: Path, beside: Mapping[str, Any] = MappingProxyType({})) -> ModelConfig:
    """Return the configuration in params.json. `beside` has the fields that count if the file does not hold them.

    Raises ConfigError. Warns if theta is assumed, and of unknown fields.
    """
    file = read_json(path)
    with naming(path):
        fields = Fields(file, {field: names for field, (names, _) in NAMES.items()})
        with spelled_as(fields.names):
            check_only(file, _PARAMS_JSON_ONLY)
            has_yarn, has_temperature, has_moe = (
                bool(value_at(file, name)) for name in ("yarn", "llama_4_scaling", "moe")
            )
            windows = _params_json_windows(fields)
            fields.values |= {field: value for field, value in beside.items() if fields.values.get(field) is None}
            if fields.values.get("rope_theta") is None and (None not in windows or not any(windows)):
                theta, which = (1e4, "a") if any(windows) else (1e6, "no")
                warn(f"{path}: rope_theta is missing; {theta:g} is assumed, because there is {which} sliding window")
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
    if unknown := unknown_in_params_json(file):
        warn(f"{path}: unknown fields are ignored: {', '.join(short_repr(name) for name in unknown[:20])}")
    return config


def unknown_in_params_json(file: dict[str, Any]) -> list[str]:
    """Return the names of fields that are not known here."""
    known = {*" ".join(names for names, _ in NAMES.values()).split(), *_PARAMS_JSON_ONLY, *_PARAMS_JSON_HARMLESS}
    blocks = {name.partition(".")[0] for name in known if "." in name}
    nested = [f"{block}.{name}" for block in sorted(blocks) for name in file.get(block) or ()]
    return [name for name in [*file, *nested] if name not in known | blocks]


def _params_json_windows(fields: Fields) -> tuple[Any, ...]:
    """Return the window of each layer. The file holds one window for all layers, or a list that is repeated.

    Either may be a string (mistral-inference, cache.py).
    """
    window, n_layers = fields.values.get("sliding_window"), fields.count("n_layers")
    if isinstance(window, str):
        try:
            window = parse_json(window.replace("None", "null"))
        except ValueError:
            expected = "a whole number, null or a list of these"
            raise ConfigError(Field("sliding_window"), f" is {short_repr(window)}; expected {expected}") from None
    windows = window if isinstance(window, list) else [window]
    if not windows or n_layers % len(windows):
        raise ConfigError(
            Field("sliding_window"),
            f" has {len(windows)} entries; expected a divisor of ",
            Field("n_layers"),
            f", {n_layers}",
        )
    return tuple(windows) * (n_layers // len(windows))


def _params_json_yarn(fields: Fields) -> Yarn:
    factor = checked_number("yarn.factor", fields.required("yarn.factor"))
    return Yarn(
        factor=factor,
        original_max_position_embeddings=fields.count(f"yarn.{ORIGINAL}"),
        beta_fast=fields.required("yarn.beta_fast"),
        beta_slow=fields.required("yarn.beta_slow"),
        attention_factor=magnitude(factor) if fields.flag("yarn.apply_scale") else 1.0,
    )


def read_config_json(path: Path) -> ModelConfig:
    """Return the configuration in config.json. Raises ConfigError."""
    file = read_json(path)
    with naming(path):
        level = "text_config." if file.get("model_type") == _WRAPPER else ""
        # transformers 4 writes rope_scaling beside rope_theta. transformers 5 writes rope_parameters; if a file holds
        # both, it prefers rope_scaling.
        rope = level + ("rope_scaling" if value_at(file, f"{level}rope_scaling") else "rope_parameters")
        names = {field: " ".join(level + name for name in names.split()) for field, (_, names) in NAMES.items()}
        fields = Fields(file, {field: name.replace(f"{level}rope_parameters", rope) for field, name in names.items()})
        with spelled_as(fields.names):
            model_type = fields.required("model_type")
            supported = _WRAPPED if level else (*_MEANING_OF_ABSENCE, _WRAPPER)
            if model_type not in supported:
                raise ConfigError(
                    Field("model_type"), f" is {short_repr(model_type)}; supported are {', '.join(supported)}"
                )
            check_only(file, _CONFIG_JSON_ONLY, level)
            if any(isinstance(value, dict) for value in (value_at(file, rope) or {}).values()):
                raise ConfigError(Field(rope), " has a RoPE for each kind of layer; expected one RoPE for all layers")
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


def _config_json_head_dim(fields: Fields) -> Any:
    head_dim = fields.required("head_dim")
    return whole_head_dim(fields) if head_dim is None else head_dim


def whole_head_dim(fields: Fields) -> int:
    """Return D / H, the width of a head if the file does not say it; raise ConfigError unless it is a whole number."""
    dim, n_heads = fields.count("dim"), fields.count("n_heads")
    if dim % n_heads:
        raise ConfigError(
            Field("n_heads"),
            f" is {n_heads}; expected a divisor of ",
            Field("dim"),
            f", {dim}, because ",
            Field("head_dim"),
            " is not given",
        )
    return dim // n_heads


def _config_json_windows(fields: Fields, model_type: str) -> tuple[int | None, ...]:
    n_layers = fields.count("n_layers")
    window = None if fields.required("sliding_window") is None else fields.count("sliding_window")
    if window is not None and model_type == "llama":
        raise ConfigError(Field("sliding_window"), f" is {window}; expected null in a llama model")
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        return (window,) * n_layers
    kinds = ("full_attention", "sliding_attention")
    one_each = isinstance(layer_types, list) and len(layer_types) == n_layers
    if not one_each or any(kind not in kinds for kind in layer_types):
        expected = f"{' or '.join(kinds)} for each of {n_layers} layers"
        raise ConfigError(Field("layer_types"), f" is {short_repr(layer_types)}; expected {expected}")
    if window is None and kinds[1] in layer_types:
        raise ConfigError(
            Field("sliding_window"),
            " is None; expected a whole number, because ",
            Field("layer_types"),
            f" has {kinds[1]}",
        )
    windows = tuple(window if kind == kinds[1] else None for kind in layer_types)
    # transformers reads layer_types only for ministral. For other types a pattern of kinds contradicts sliding_window.
    if model_type != "ministral" and windows != (window,) * n_layers:
        raise ConfigError(
            Field("layer_types"),
            " contradicts ",
            Field("sliding_window"),
            f", {window}; only a ministral model may mix the two",
        )
    return windows


def _config_json_yarn(fields: Fields) -> Yarn | None:
    """Return the Yarn of config.json; None without YaRN.

    The rules are those of transformers 5.23 (_compute_yarn_parameters).
    """
    rope_type = fields.required("rope_type")
    if rope_type == "default":
        return None
    if rope_type != "yarn":
        raise ConfigError(Field("rope_type"), f" is {short_repr(rope_type)}; supported are default and yarn")
    original, factor = fields.count(f"yarn.{ORIGINAL}"), fields.required("yarn.factor")
    factor = fields.count("max_seq_len") / original if factor is None else checked_number("yarn.factor", factor)
    attention_factor = fields.values.get("yarn.attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = fields.number_or(0, "yarn.mscale"), fields.number_or(0, "yarn.mscale_all_dim")
        if not mscale or not mscale_all_dim:  # transformers ignores one without the other
            mscale, mscale_all_dim = 1, 0
        attention_factor = magnitude(factor, mscale) / magnitude(factor, mscale_all_dim)
    return Yarn(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fields.number_or(32, "yarn.beta_fast"),
        beta_slow=fields.number_or(1, "yarn.beta_slow"),
        attention_factor=attention_factor,
        truncate=fields.flag("yarn.truncate", default=True),
    )


def _config_json_tied(file: dict[str, Any], level: str) -> bool:
    """Return whether the embeddings are tied.

    They are tied if tie_word_embeddings is true at the top of the file, or in the text_config of a wrapper. A wrapper's
    embeddings are also tied if the field is at neither place: the default of the wrapper's class is true.
    """
    said = {name: value_at(file, name) for name in (f"{level}tie_word_embeddings", "tie_word_embeddings")}
    for name, tied in said.items():
        if not isinstance(tied, bool | None):
            raise ConfigError(Field(name), f" is {short_repr(tied)}; expected true or false")
    return True in said.values() or (bool(level) and False not in said.values())
