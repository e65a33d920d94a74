"""Write a model of the kit in Mistral's layout, in Hugging Face's, and as GGUF files, with the same weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError
from mistral_ref.files.gguf_writer import Stored, config_fields, gguf_bytes
from mistral_ref.files.tensor_names import gguf_name, huggingface_name
from mistral_ref.files.whole_file import whole_file
from mistral_ref.measure.synthetic import PlannedTensor, encoded, params_json, write_planned
from mistral_ref.study.conform.cases import Case, Codes
from mistral_ref.weights import bf16_bits

GGUF_TYPES = ("F32", "BF16", "Q8_0")
_ARCHITECTURES = {
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
_Q8_0_WEIGHTS = 32  # in a block


def write_mistral(case: Case, folder: Path) -> None:
    """Write params.json and consolidated.safetensors."""
    params = params_json(case.config)
    if case.is_fp8:
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "NO_SCALES"}
    _write_json(folder / "params.json", params)
    _write_tensors(folder / "consolidated.safetensors", _stored(case, case.codes()))


def write_huggingface(case: Case, folder: Path) -> None:
    """Write config.json and model.safetensors."""
    config = config_json(case.config, case.model_type)
    if case.is_fp8:
        quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
        config["quantization_config"] = quantization
    _write_json(folder / "config.json", config)
    n_heads = {"wq": case.config.n_heads, "wk": case.config.n_kv_heads}

    def in_their_order(name: str, codes: Codes) -> Codes:
        heads = n_heads.get(name.removesuffix(".weight").rpartition(".")[2])
        return codes if heads is None else codes._replace(codes=rows_in_halves(codes.codes, heads))

    theirs = {name: in_their_order(name, codes) for name, codes in case.codes().items()}
    tensors = {huggingface_name(name): tensor for name, tensor in _stored(case, theirs).items()}
    _write_tensors(folder / "model.safetensors", tensors)


def write_gguf(case: Case, kind: str, path: Path) -> None:
    """Write a GGUF file whose matrices have this type, one of GGUF_TYPES; norms and routers are F32."""
    assert case.architecture is not None
    fields = config_fields(case.config, case.architecture) | {
        "general.name": f"conform {case.name}",
        "tokenizer.ggml.model": "none",
    }
    by_name: dict[str, list[Codes]] = {}
    for name, codes in case.codes().items():  # all experts of a layer are one tensor
        by_name.setdefault(gguf_name(name), []).append(codes)
    tensors = {}
    for name, parts in by_name.items():
        is_matrix = parts[0].codes.ndim == 2 and "ffn_gate_inp" not in name
        encode = _GGUF_ENCODINGS[kind] if is_matrix else _as_f32
        shape = parts[0].codes.shape if len(parts) == 1 else (len(parts), *parts[0].codes.shape)
        raw = b"".join(encode(part).tobytes() for part in parts)
        tensors[name] = Stored(kind if is_matrix else "F32", shape, raw)
    with whole_file(path, InputError) as file:
        file.write(gguf_bytes(fields, tensors))


def config_json(config: ModelConfig, model_type: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Return the content of config.json, as transformers 5 spells it."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (yarn := config.yarn) is not None:
        names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
        rope |= {"rope_type": "yarn"} | {name: getattr(yarn, name) for name in names}
        if yarn.attention_factor == 1:
            rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    if config.query_temperature is not None:
        rope["llama_4_scaling_beta"] = config.query_temperature.beta
    fields: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[model_type]],
        "model_type": model_type,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len or 2**15,
        "sliding_window": max((window for window in config.sliding_window if window), default=None),
        "rope_parameters": rope,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "dtype": dtype,
    }
    if model_type == "ministral":
        kinds = ("full_attention" if window is None else "sliding_attention" for window in config.sliding_window)
        fields["layer_types"] = list(kinds)
    if config.moe is not None:
        fields |= {"num_local_experts": config.moe.num_experts, "num_experts_per_tok": config.moe.num_experts_per_tok}
    return fields


def rows_in_halves(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Return the rows (heads * K, I) of wq or wk with each head's pairs torn apart: 0, 2, 4, ... then 1, 3, 5, ...

    >>> rows_in_halves(np.arange(8).reshape(8, 1), n_heads=2).ravel().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return rows.reshape(n_heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _stored(case: Case, weights: Mapping[str, Codes]) -> dict[str, tuple[str, np.ndarray]]:
    """Return tensors with their dtypes in safetensors: bf16, and fp8 with a scale beside each tensor."""
    stored: dict[str, tuple[str, np.ndarray]] = {}
    for name, codes in weights.items():
        if case.is_stored_as_fp8(name):  # 16 times the code, at most 240, has at most 4 significant bits
            stored[name] = "F8_E4M3", encoded(16 * codes.codes.astype(np.float32), "fp8")
            scale_name = name.replace(".weight", ".qscale_weight")
            stored[scale_name] = "F32", np.ldexp(np.float32(1 / 16), -codes.exponent)
        else:
            stored[name] = "BF16", bf16_bits(codes.values())
    return stored


def _write_tensors(path: Path, tensors: Mapping[str, tuple[str, np.ndarray]]) -> None:
    def planned(name: str, dtype: str, values: np.ndarray) -> PlannedTensor:
        return PlannedTensor(name, dtype, values.shape, lambda: [values.reshape(-1)])

    write_planned(path, [planned(name, *tensor) for name, tensor in tensors.items()], {"format": "pt"})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with whole_file(path, InputError) as file:
        file.write(json.dumps(content, indent=2).encode() + b"\n")


def _as_f32(codes: Codes) -> np.ndarray:
    return codes.values().astype("<f4")


def _as_q8_0(codes: Codes) -> np.ndarray:
    """Return blocks of 32 weights: a scale as float16, 2^-exponent, and 32 codes."""
    rows = codes.codes.astype(np.int8).reshape(-1, _Q8_0_WEIGHTS)
    blocks = np.empty(len(rows), [("scale", "<f2"), ("codes", "i1", _Q8_0_WEIGHTS)])
    blocks["scale"], blocks["codes"] = 2.0**-codes.exponent, rows
    return blocks


_GGUF_ENCODINGS = {
    "F32": _as_f32,
    "BF16": lambda codes: bf16_bits(codes.values()).astype("<u2"),
    "Q8_0": _as_q8_0,
}
