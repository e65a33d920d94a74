"""Write GGUF files: any fields and tensors, and the tiny families. Nothing here needs the package gguf."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sentencepiece import SentencePieceProcessor
from support.checkpoints import Family, Tensors, draw_weights, to_bfloat16

from mistral_ref.config import ModelConfig
from mistral_ref.text.byte_bpe import LETTERS
from mistral_ref.text.byte_tokenizer import ByteTokenizer
from mistral_ref.text.sentencepiece_file import fields_of

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


NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
IN_LAYER = {
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
}


def config_fields(config: ModelConfig, architecture: str = "llama") -> dict[str, Any]:
    """Return the fields of a configuration."""
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


def stored(values: np.ndarray, dtype: str = "F32") -> Stored:
    """Return float32 values as a tensor of floats."""
    encode = {"F32": lambda v: v, "F16": lambda v: v.astype(np.float16), "BF16": to_bfloat16}[dtype]
    return Stored(dtype, values.shape, encode(np.ascontiguousarray(values, np.float32)).tobytes())


def family_tensors(weights: Tensors, dtype: str = "F32", *, stacked: bool = True) -> dict[str, Stored]:
    """Return weights, under Mistral's own names, as the tensors of a GGUF file; norms and routers are F32.

    stacked     all experts of a layer in one tensor, and not one by one as in older files
    """
    tensors: dict[str, Stored] = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for full_name, values in weights.items():
        name = full_name.removesuffix(".weight")
        if name in NAMES:
            tensors[f"{NAMES[name]}.weight"] = stored(values, "F32" if values.ndim == 1 else dtype)
            continue
        _, layer, rest = name.split(".", 2)
        if ".experts." in rest:
            _, _, expert, which = rest.split(".")
            their = IN_LAYER[f"feed_forward.{which}"]
            if stacked:
                stacks.setdefault(f"blk.{layer}.{their}_exps.weight", []).append(values)
            else:
                tensors[f"blk.{layer}.{their}.{expert}.weight"] = stored(values, dtype)
            continue
        is_plain = values.ndim == 1 or rest == "feed_forward.gate"
        tensors[f"blk.{layer}.{IN_LAYER[rest]}.weight"] = stored(values, "F32" if is_plain else dtype)
    return tensors | {name: stored(np.stack(parts), dtype) for name, parts in stacks.items()}


def write_gguf(path: Path, family: Family, fields: Mapping[str, Any] | None = None, *, stacked: bool = True) -> None:
    """Write a family, with weights of its own dtype; `fields` may describe a tokenizer, or overrule a field."""
    config = family.config
    architecture = "mistral3" if family.model_type == "ministral3" else "llama"
    tensors = family_tensors(draw_weights(family), family.dtype.upper(), stacked=stacked)
    path.write_bytes(gguf_bytes(config_fields(config, architecture) | dict(fields or {}), tensors))


def sentencepiece_fields(model: bytes) -> dict[str, Any]:
    """Return the fields of a SentencePiece model."""
    processor = SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    ids = range(processor.get_piece_size())
    # The last field of a piece is its type; without one the piece is normal.
    pieces = [model[start:end] for number, start, end in fields_of(model, 0, len(model)) if number == 1]
    kinds = [piece[-1] if piece[-2] == 0x18 and piece[-1] < 7 else 1 for piece in pieces]

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [processor.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": Typed("f32", [processor.get_score(i) for i in ids]),
        "tokenizer.ggml.token_type": Typed("i32", kinds),
        "tokenizer.ggml.bos_token_id": processor.bos_id(),
        "tokenizer.ggml.eos_token_id": processor.eos_id(),
        "tokenizer.ggml.unknown_token_id": processor.unk_id(),
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": processor.encode("a")[0] != processor.piece_to_id("a"),
    }


def tekken_fields(tokenizer: ByteTokenizer) -> dict[str, Any]:
    """Return the fields of a tokenizer that was read of a tekken.json."""
    tokens = {token_id: name for name, token_id in tokenizer.controls.items()}
    tokens |= {token_id: "".join(LETTERS[byte] for byte in piece) for piece, token_id in tokenizer.bpe.ids.items()}
    controls = set(tokenizer.controls.values())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "tekken",
        "tokenizer.ggml.tokens": [tokens[token_id] for token_id in range(tokenizer.vocab_size)],
        "tokenizer.ggml.token_type": Typed("i32", [3 if i in controls else 1 for i in sorted(tokens)]),
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
    }


def byte_bpe_fields(document: Mapping[str, Any], pre: str) -> dict[str, Any]:
    """Return the fields of a tokenizer.json; tokens that no piece has the id of are unused."""
    ids, added = document["model"]["vocab"], {token["id"]: token for token in document["added_tokens"]}
    n = 1 + max((*ids.values(), *added))
    tokens, kinds = [f"[UNUSED{i}]" for i in range(n)], [5] * n
    for token, i in ids.items():
        tokens[i], kinds[i] = token, 1
    for i, token in added.items():
        tokens[i], kinds[i] = token["content"], 3 if token["special"] else 4
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in document["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed("i32", kinds),
        "tokenizer.ggml.merges": merges,
    }
