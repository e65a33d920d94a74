"""Make a ModelConfig of the metadata of a GGUF file.

The names of most fields begin with the architecture: llama.block_count. "llama" is the architecture of all models of
this line up to Mistral Small 3.2, and of Mixtral; "mistral3" is that of Ministral 3 and Devstral 2. What an absent
field means follows llama.cpp. A field that changes the mathematics is refused unless it changes nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mistral_ref.config import ModelConfig, Yarn, checked_number
from mistral_ref.errors import ConfigError, Field, short_repr, warn
from mistral_ref.files.config_fields import ORIGINAL, Fields, naming, spelled_as
from mistral_ref.files.config_files import magnitude, whole_head_dim
from mistral_ref.files.gguf import GGUF, Texts

ARCHITECTURES = ("llama", "mistral3")
_NAMES = {
    "n_layers": "block_count",
    "dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "value_length": "attention.value_length",
    "rotated": "rope.dimension_count",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "vocab_size": "vocab_size",
    "max_seq_len": "context_length",
    "sliding_window": "attention.sliding_window",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "rope_type": "rope.scaling.type",
    "yarn.factor": "rope.scaling.factor",
    f"yarn.{ORIGINAL}": "rope.scaling.original_context_length",
    "yarn.beta_fast": "rope.scaling.yarn_beta_fast",
    "yarn.beta_slow": "rope.scaling.yarn_beta_slow",
    "yarn.mscale_all_dim": "rope.scaling.yarn_log_multiplier",
    "yarn.attention_factor": "rope.scaling.attn_factor",
    "query_temperature.beta": "attention.temperature_scale",
    "temperature_length": "attention.temperature_length",
}
# Fields that change the mathematics, and the values with which they do not.
# fmt: off
_ONLY: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,), "use_parallel_residual": (False,), "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,), "attention.scale": (0,), "attention.sliding_window_pattern": (0, 1),
    "attention.q_lora_rank": (0,), "attention.kv_lora_rank": (0,), "attention.key_length_mla": (0,),
    "attention.value_length_mla": (0,), "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,),
    "logit_scale": (0, 1), "residual_scale": (0, 1), "embedding_scale": (0, 1), "rope.scale_linear": (0, 1),
    "rope.scaling.yarn_ext_factor": (1,), "expert_shared_count": (0,), "expert_group_count": (0, 1),
    "expert_weights_scale": (0, 1), "expert_weights_norm": (True,), "expert_gating_func": (0, 1),
    "leading_dense_block_count": (0,), "interleave_moe_layer_step": (0, 1), "nextn_predict_layers": (0,),
}
# fmt: on
_HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout"}
_LOST_WINDOW = {"dim": 4096, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8, "head_dim": 128, "rope_theta": 1e4}


def gguf_config(gguf: GGUF) -> ModelConfig:
    """Return the configuration of a GGUF file.

    Raises ConfigError if the architecture is unknown, if a field is missing or wrong, or if it asks for what is not
    computed. Warns of fields that are not known.
    """
    metadata = gguf.metadata
    with naming(gguf.path):
        for name, supported in (("general.type", ("model",)), ("general.architecture", ARCHITECTURES)):
            found = metadata.get(name, "model" if name == "general.type" else None)
            if not isinstance(found, str) or found not in supported:
                raise ConfigError(Field(name), f" is {short_repr(found)}; supported are {', '.join(supported)}")
        prefix = f"{metadata['general.architecture']}."
        _check_only(metadata, prefix)
        fields = Fields(metadata, {field: prefix + name for field, name in _NAMES.items()}, _value_at)
        with spelled_as(fields.names):
            config = _config(gguf, fields)
    known = {prefix + name for name in (*_NAMES.values(), *_ONLY, *_HARMLESS)}
    if unknown := [name for name in metadata if name.startswith(prefix) and name not in known]:
        warn(f"{gguf.path}: unknown fields are ignored: {', '.join(short_repr(name) for name in unknown[:20])}")
    return config


def lost_window(config: ModelConfig) -> bool:
    """Return whether this is Mistral 7B v0.1 without its window, which GGUF files do not hold.

    Its fine-tunes have some added tokens. Later models have another theta, and no window.
    """
    is_first = all(getattr(config, field) == value for field, value in _LOST_WINDOW.items())
    return is_first and config.n_layers <= 32 and 32000 <= config.vocab_size < 32100 and not any(config.sliding_window)


def gguf_eos_ids(gguf: GGUF) -> tuple[int, ...]:
    """Return the ids that end a text: of a document and of a turn; () if the file does not name them."""
    ids = []
    for name in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"):
        found = gguf.metadata.get(name)
        if found is None:
            continue
        if type(found) is not int or found < 0:
            raise ConfigError(f"{gguf.path}: ", Field(name), f" is {short_repr(found)}; expected a token id")
        ids.append(found)
    return tuple(ids)


def _config(gguf: GGUF, fields: Fields) -> ModelConfig:
    values = fields.values
    values.setdefault("rope_theta", 1e4)
    values.setdefault("vocab_size", _vocabulary(gguf))
    values.setdefault("query_temperature.beta", 0)
    if values.get("max_seq_len") is not None:
        values.setdefault(f"yarn.{ORIGINAL}", values["max_seq_len"])
    head_dim = whole_head_dim(fields) if values.get("head_dim") is None else values["head_dim"]
    _check_equal(fields, "value_length", head_dim, "head_dim")
    _check_equal(fields, "rotated", head_dim, "head_dim")
    window = None if values.get("sliding_window") in (None, 0) else fields.count("sliding_window")
    temperature = fields.query_temperature("yarn")
    if temperature is not None and values.get("temperature_length") != 0:
        _check_equal(fields, "temperature_length", temperature.original_max_position_embeddings, f"yarn.{ORIGINAL}")
    return fields.model_config(
        head_dim=head_dim,
        sliding_window=(window,) * fields.count("n_layers"),
        rope_row_order="interleaved",
        yarn=_yarn(fields),
        query_temperature=temperature,
        moe=values.get("num_experts", 0) != 0,
        tied_embeddings=all(tensor.name != "output.weight" for tensor in gguf.tensors),
    )


def _check_equal(fields: Fields, field: str, expected: object, other: str) -> None:
    """Raise ConfigError if a field is there and is not `expected`, the value of another field."""
    found = fields.values.get(field, expected)
    if found != expected:
        raise ConfigError(Field(field), f" is {short_repr(found)}; expected that of ", Field(other), f", {expected}")


def _vocabulary(gguf: GGUF) -> int | None:
    """Return the number of token ids if no field says it: that of the tokens, or of the rows of the embedding."""
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Texts):
        return len(tokens)
    return next((tensor.shape[0] for tensor in gguf.tensors if tensor.name == "token_embd.weight"), None)


def _yarn(fields: Fields) -> Yarn | None:
    kind = fields.values.get("rope_type", "linear")
    factor = fields.values.get("yarn.factor", 1)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        return None
    if kind != "yarn":
        found = f" is {short_repr(kind)} with a factor of {short_repr(factor)}"
        raise ConfigError(Field("rope_type"), f"{found}; supported are none and yarn")
    factor = checked_number("yarn.factor", fields.required("yarn.factor"))
    # llama.cpp divides the magnitude of the factor by that with the multiplier; a multiplier of 0 is none.
    multiplier = checked_number("yarn.mscale_all_dim", fields.values.get("yarn.mscale_all_dim", 0), zero=True)
    more = checked_number("yarn.attention_factor", fields.values.get("yarn.attention_factor", 1))
    return Yarn(
        factor=factor,
        original_max_position_embeddings=fields.count(f"yarn.{ORIGINAL}"),
        beta_fast=fields.number_or(32, "yarn.beta_fast"),
        beta_slow=fields.number_or(1, "yarn.beta_slow"),
        attention_factor=more * magnitude(factor) / magnitude(factor, multiplier),
    )


def _value_at(metadata: dict[str, Any], name: str, default: object = None) -> Any:
    """Return a value of the metadata. Of an array with a number for each layer it is the number, if all are equal."""
    value = metadata.get(name, default)
    if not isinstance(value, np.ndarray):
        return value
    if not len(value) or (value != value[0]).any():
        raise ConfigError(Field(name), f" is {short_repr(value[:8].tolist())}; expected one number for all layers")
    return value[0].item()


def _check_only(metadata: dict[str, Any], prefix: str) -> None:
    """Raise ConfigError if a field changes the mathematics."""
    for name, accepted in _ONLY.items():
        value = _value_at(metadata, prefix + name)
        if value is not None and value not in accepted:
            expected = " or ".join(map(str, accepted))
            raise ConfigError(Field(prefix + name), f" is {short_repr(value)}; supported is {expected}")
