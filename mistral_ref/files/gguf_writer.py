"""Write GGUF files: any fields and tensors, or the fields of another file. gguf.py reads them, and has the format."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mistral_ref.config import ModelConfig
from mistral_ref.files.gguf import MAGIC, open_gguf, raw_fields

TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11}
TYPE_IDS |= {"Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "BF16": 30}
_CODES = {"u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"), "i32": (5, "i")}
_CODES |= {"f32": (6, "f"), "bool": (7, "?"), "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d")}


class Typed(NamedTuple):
    """A value with its type: Typed("u16", 3), or an array Typed("i32", [1, 2])."""

    type: str
    value: Any


class Stored(NamedTuple):
    """A tensor of a file. The shape is NumPy's, with the inputs last.

    dtype   its type, or the number of one
    begin   where its data begin according to the header; None: where they do
    """

    dtype: str | int
    shape: tuple[int, ...]
    raw: bytes
    begin: int | None = None


def text(value: str | bytes) -> bytes:
    """Return a text as a file holds it."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def field(value: Any) -> bytes:
    """Return the type and the value of a field. int is u32, float f32, and a list holds texts."""
    if isinstance(value, str | bytes):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    if isinstance(value, Typed):
        number, code = _CODES[value.type]
        if isinstance(value.value, list):
            return struct.pack(f"<IIQ{len(value.value)}{code}", 9, number, len(value.value), *value.value)
        return struct.pack(f"<I{code}", number, value.value)
    return field(Typed({bool: "bool", int: "u32", float: "f32"}[type(value)], value))


def gguf_bytes(
    fields: Mapping[str, Any], tensors: Mapping[str, Stored] | None = None, *, version: int = 3, alignment: int = 32
) -> bytes:
    """Return the bytes of a file."""
    tensors = {} if tensors is None else tensors
    if alignment != 32:
        fields = {**fields, "general.alignment": alignment}
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    header += b"".join(text(name) + field(value) for name, value in fields.items())
    data = b""
    for name, tensor in tensors.items():
        header += text(name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        kind = TYPE_IDS[tensor.dtype] if isinstance(tensor.dtype, str) else tensor.dtype
        header += struct.pack("<IQ", kind, len(data) if tensor.begin is None else tensor.begin)
        data += tensor.raw + bytes(-len(tensor.raw) % alignment)
    return header + bytes(-len(header) % alignment) + data


def without_tensors(path: Path, config: ModelConfig) -> bytes:
    """Return the bytes of a file with the fields of another file, and no tensors.

    What they say of shards is left out. The size of the vocabulary, which the embedding may say alone, is added.
    """
    fields = {name: raw for name, raw in raw_fields(path).items() if not name.startswith("split.")}
    size = f"{open_gguf(path).metadata['general.architecture']}.vocab_size"
    fields.setdefault(size, text(size) + field(config.vocab_size))
    return MAGIC + struct.pack("<IQQ", 3, 0, len(fields)) + b"".join(fields.values())


def config_fields(config: ModelConfig, architecture: str = "llama") -> dict[str, Any]:
    """Return the fields of a configuration by their names in a file.

    A file has one window for all layers. A configuration whose first layer has none is written without.
    """
    fields: dict[str, Any] = {
        "block_count": config.n_layers,
        "embedding_length": config.dim,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
        "attention.layer_norm_rms_epsilon": config.norm_eps,
        "vocab_size": config.vocab_size,
        "context_length": config.max_seq_len or 2048,
    }
    if config.sliding_window[0] is not None:
        fields["attention.sliding_window"] = config.sliding_window[0]
    if config.moe is not None:
        fields |= {"expert_count": config.moe.num_experts, "expert_used_count": config.moe.num_experts_per_tok}
    if config.yarn is not None:
        fields |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(config.yarn.factor),
            "rope.scaling.original_context_length": config.yarn.original_max_position_embeddings,
            "rope.scaling.yarn_beta_fast": float(config.yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(config.yarn.beta_slow),
        }
        if config.yarn.attention_factor == 1:
            fields["rope.scaling.yarn_log_multiplier"] = 1.0
    if config.query_temperature is not None:
        fields["attention.temperature_scale"] = config.query_temperature.beta
    general = {"general.architecture": architecture, "general.type": "model", "general.name": "tiny"}
    return {**general, **{f"{architecture}.{name}": value for name, value in fields.items()}}
