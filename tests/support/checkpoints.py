"""Tiny models of every family of the line, and real checkpoint directories of them in both published layouts.

One set of weights per family, drawn under Mistral's own names with rows of wq and wk interleaved, is written

    write_consolidated   consolidated.safetensors + params.json, as Mistral publishes
    write_hf             model.safetensors or shards + config.json, as Hugging Face does: other names, q and k in halves

so that a reader of either can be held against the other. transformers reads what `write_hf` writes, and
`golden/make_goldens.py` keeps the logits that it computes. Nothing here needs torch, nor the library's own reader.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mistral_ref.config import MixtureOfExperts, ModelConfig, QueryTemperature, Yarn, tensor_shapes

Tensors = dict[str, np.ndarray]
Stored = dict[str, tuple[str, np.ndarray]]  # name -> (dtype in a safetensors header, array of the same bytes)

ARCHITECTURES = {
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "llama": "LlamaForCausalLM",
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny model: its configuration (in Mistral's own row order), and how its weights are drawn and stored.

    model_type      in config.json; decides the class of transformers
    n_tokens        length of the golden sequence; several windows, and several original lengths where there is one
    dtype           of the files
    stream          size of what is added to the residual stream; at 1/32 norm_eps matters, as it does in real models
    old_spelling    write RoPE as `rope_theta` and `rope_scaling` beside each other, as before transformers 5
    """

    name: str
    model_type: str
    seed: int
    n_tokens: int
    config: ModelConfig
    dtype: Literal["f32", "f16", "bf16"] = "f32"
    stream: float = 1.0
    old_spelling: bool = False


def _config(
    *,
    width: tuple[int, int, int],
    heads: tuple[int, int, int],
    layers: int,
    theta: float,
    window: int | tuple[int | None, ...] | None,
    **switches: Any,
) -> ModelConfig:
    """Return a configuration from widths (D, F, V), heads (H, G, K), and one window or one for each layer."""
    dim, hidden_dim, vocab_size = width
    n_heads, n_kv_heads, head_dim = heads
    return ModelConfig(
        dim=dim,
        n_layers=layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope_theta=theta,
        sliding_window=window if isinstance(window, tuple) else (window,) * layers,
        rope_row_order="interleaved",
        max_seq_len=2048,
        **switches,
    )


# Widths are multiples of nothing that a kernel likes. Every mistake in test_golden.py moves the logits of every family
# that it concerns by far more than the hundred tolerances asked there: norm_eps by 700 at least, any other by 3000.
# fmt: off
_FAMILIES = (
    Family(name="dense_windowed", model_type="mistral", seed=1, n_tokens=70,
           config=_config(width=(40, 92, 101), heads=(6, 2, 8), layers=3, theta=1e4, window=5)),
    Family(name="dense_no_window", model_type="mistral", seed=2, n_tokens=48,
           config=_config(width=(40, 44, 97), heads=(4, 2, 10), layers=3, theta=1e6, window=None)),
    Family(name="interleaved_windows", model_type="ministral", seed=3, n_tokens=60,
           config=_config(width=(36, 52, 83), heads=(4, 2, 12), layers=4, theta=1e8, window=(None, 6, 6, 6))),
    Family(name="tied_multi_query", model_type="mistral", seed=4, n_tokens=64,
           config=_config(width=(30, 50, 89), heads=(5, 1, 8), layers=3, theta=1e4, window=8, tied_embeddings=True)),
    Family(name="float16", model_type="mistral", seed=5, n_tokens=48, dtype="f16",
           config=_config(width=(36, 58, 79), heads=(6, 3, 10), layers=2, theta=1e4, window=7)),
    Family(name="bfloat16", model_type="mistral", seed=6, n_tokens=48, dtype="bf16",
           config=_config(width=(44, 60, 71), heads=(4, 2, 14), layers=3, theta=1e6, window=None)),
    # Nemo: H * K = 64 is not D = 40, so the softmax scale is not sqrt(H / D).
    Family(name="nemo", model_type="mistral", seed=7, n_tokens=56, dtype="bf16",
           config=_config(width=(40, 66, 103), heads=(4, 2, 16), layers=3, theta=1e6, window=None)),
    Family(name="mixtral", model_type="mixtral", seed=8, n_tokens=48, stream=1 / 32,
           config=_config(width=(36, 44, 97), heads=(4, 2, 10), layers=3, theta=1e6, window=None,
                          moe=MixtureOfExperts(num_experts=8, num_experts_per_tok=2))),
    Family(name="mixtral_windowed", model_type="mixtral", seed=9, n_tokens=48, dtype="bf16",
           config=_config(width=(28, 34, 67), heads=(4, 2, 8), layers=2, theta=1e4, window=6,
                          moe=MixtureOfExperts(num_experts=5, num_experts_per_tok=3))),
    # Yarn-Mistral: config.json gives only the factor, so the attention factor is 0.1 ln 8 + 1.
    Family(name="yarn_mistral", model_type="mistral", seed=10, n_tokens=100, old_spelling=True,
           config=_config(width=(40, 58, 73), heads=(4, 2, 16), layers=3, theta=1e4, window=24,
                          yarn=Yarn(factor=8, original_max_position_embeddings=256, beta_fast=32, beta_slow=1,
                                    attention_factor=0.1 * math.log(8) + 1))),
    # Ministral 3: mscale = mscale_all_dim = 1, so the attention factor is 1. The ramp goes over pairs 1 to 4 of 12.
    Family(name="ministral3", model_type="ministral3", seed=11, n_tokens=210,
           config=_config(width=(44, 70, 83), heads=(4, 2, 24), layers=3, theta=1e6, window=None, tied_embeddings=True,
                          yarn=Yarn(factor=16, original_max_position_embeddings=48, beta_fast=2, beta_slow=0.125,
                                    attention_factor=1),
                          query_temperature=QueryTemperature(beta=0.1, original_max_position_embeddings=48))),
    Family(name="llama", model_type="llama", seed=12, n_tokens=40, stream=1 / 32,
           config=_config(width=(24, 44, 67), heads=(3, 3, 8), layers=2, theta=1e4, window=None)),
)
# fmt: on
FAMILIES = {family.name: family for family in _FAMILIES}


# ---------------------------------------------------------------------------------------------------------- weights

# Size of a matrix's outputs for inputs of size 1. Queries and keys are large so that attention is peaked: with flat
# attention a wrong key, angle or scale hardly moves the logits.
_GAIN = {"wq": 1.7, "wk": 1.7, "wv": 1.0, "wo": 1.2, "w1": 1.5, "w2": 1.5, "w3": 1.0, "gate": 2.0, "output": 2.0}
_TO_STREAM = ("wo", "w2", "tok_embeddings")


def draw_weights(family: Family) -> Tensors:
    """Return the weights of a family by Mistral's own names: float32, holding values that the family's dtype can hold.

    RandomState's stream is frozen, and uniform numbers need no logarithm that differs between machines: the bits are
    the same everywhere.
    """
    random, config = np.random.RandomState(family.seed), family.config

    def uniform(shape: tuple[int, ...], size: float) -> np.ndarray:
        return random.uniform(-1.0, 1.0, shape) * (3.0**0.5 * size)  # a root mean square of `size`

    weights, shapes = {}, dict(tensor_shapes(config))
    for name, shape in shapes.items():
        if len(shape) == 1:
            continue
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind == "tok_embeddings":  # a tied one also makes the logits, whose size should be that of the others
            size = _GAIN["output"] / config.dim**0.5 if config.tied_embeddings else 1.0
        else:
            size = _GAIN[kind] / shape[1] ** 0.5
        weights[name] = uniform(shape, size * (family.stream if kind in _TO_STREAM else 1.0))
    for name, shape in shapes.items():  # norms were drawn last when the golden files were made
        if len(shape) == 1:
            weights[name] = 0.25 + np.abs(uniform(shape, 1.0))
    return {name: _rounded(values.astype(np.float32), family.dtype) for name, values in weights.items()}


# ----------------------------------------------------------------------------------------------------------- numbers


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return float32 values as bf16 in uint16: the upper half of their bits, rounded to nearest, ties to even.

    >>> [hex(bits) for bits in to_bfloat16(np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8], np.float32))]
    ['0x3f80', '0x3f80', '0x3f82']
    """
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


_STORED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "f32": ("F32", lambda values: values),
    "f16": ("F16", lambda values: values.astype(np.float16)),
    "bf16": ("BF16", to_bfloat16),
}


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 values rounded to `dtype`, still float32."""
    stored = _STORED[dtype][1](values)
    return (stored.astype(np.uint32) << 16).view(np.float32) if dtype == "bf16" else stored.astype(np.float32)


# The 127 finite values of e4m3 that are not negative, by their code: m/8 2^-6, then (1 + m/8) 2^(e-7).
_E4M3 = np.array([(m / 8 + (e > 0)) * 2.0 ** (max(e, 1) - 7) for e in range(16) for m in range(8)][:127], np.float32)


def to_fp8(weight: np.ndarray, block: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return a float32 matrix as e4m3 codes (uint8) and float32 scales: one for each `block` rows and columns, or ().

    The weight is the code's value times its scale. The largest weight of a block becomes 448, e4m3's largest number.
    """
    peaks = np.abs(weight)
    for axis, size in enumerate(weight.shape):
        peaks = np.maximum.reduceat(peaks, np.arange(0, size, block or size), axis)
    scale = (peaks / np.float32(448)).reshape(peaks.shape if block else ())
    scaled = weight / _per_weight(scale, weight.shape, block)
    codes = np.searchsorted((_E4M3[1:] + _E4M3[:-1]) / 2, np.abs(scaled))
    return np.where(scaled < 0, codes + 128, codes).astype(np.uint8), scale


def fp8_rounded(weights: Tensors, block: int | None = None) -> Tensors:
    """Return the weights with each matrix that an fp8 checkpoint holds in fp8 replaced by the values that it holds."""
    return {name: _fp8_values(weight, block) if _is_fp8(name) else weight for name, weight in weights.items()}


def _fp8_values(weight: np.ndarray, block: int | None) -> np.ndarray:
    codes, scale = to_fp8(weight, block)
    signed = np.where(codes < 128, np.float32(1), np.float32(-1)) * _E4M3[codes & 127]
    return signed * _per_weight(scale, weight.shape, block)


def _per_weight(scale: np.ndarray, shape: tuple[int, ...], block: int | None) -> np.ndarray:
    """Return the scale of each weight of a matrix of this shape, or the scalar scale itself."""
    return scale if block is None else scale.repeat(block, 0).repeat(block, 1)[: shape[0], : shape[1]]


_FP8_ENDINGS = (*(f".{kind}.weight" for kind in ("wq", "wk", "wv", "wo", "w1", "w2", "w3")), "_proj.weight")


def _is_fp8(name: str) -> bool:
    """Whether an fp8 checkpoint holds this tensor, by its name in either layout, in fp8: the blocks' big matrices."""
    return name.endswith(_FP8_ENDINGS)


# ------------------------------------------------------------------------------------------------- files and layouts


def write_tensor_file(path: Path, tensors: Stored, metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file: 8 bytes little-endian header length, JSON header, data.

    The library cannot take bf16 from NumPy and writes metadata in an order that changes from run to run.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, array) in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())


def write_consolidated(
    directory: Path, family: Family, weights: Tensors | None = None, *, fp8: bool = False, vision: bool = False
) -> None:
    """Write `weights`, by default the family's own, as Mistral publishes them.

    fp8       the blocks' matrices in fp8, each with one scale
    vision    add a tensor of a vision encoder, as in Ministral 3
    """
    config = family.config
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.hidden_dim,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "norm_eps": config.norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "max_seq_len": config.max_seq_len,
        "tied_embeddings": config.tied_embeddings,
    }
    windows = set(config.sliding_window)
    if windows != {None}:
        params["sliding_window"] = config.sliding_window[0] if len(windows) == 1 else list(config.sliding_window)
    if config.moe is not None:
        params["moe"] = asdict(config.moe)
    if config.yarn is not None:
        params["yarn"] = {
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
            "beta": config.yarn.beta_fast,
            "alpha": config.yarn.beta_slow,
            "apply_scale": config.yarn.attention_factor != 1,
        }
    if config.query_temperature is not None:
        params["llama_4_scaling"] = asdict(config.query_temperature)
    if fp8:
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    tensors = _stored(
        draw_weights(family) if weights is None else weights, family.dtype, fp8=fp8, scale="qscale_weight"
    )
    if vision:
        params["vision_encoder"] = {"hidden_size": 4}
        tensors["vision_encoder.patch_conv.weight"] = ("F32", np.zeros((4, 3, 2, 2), np.float32))
    _write_json(directory / "params.json", params)
    write_tensor_file(directory / "consolidated.safetensors", tensors)


def write_hf(
    directory: Path,
    family: Family,
    weights: Tensors | None = None,
    *,
    shards: int = 1,
    fused_experts: bool = False,
    wrapper: Literal["v4", "v5"] | None = None,
    fp8: Literal["tensor", "block"] | None = None,
) -> None:
    """Write `weights`, by default the family's own, as Hugging Face publishes them.

    shards           number of files; more than one come with an index
    fused_experts    all experts of a layer in two tensors, as transformers 5 keeps them, and not one by one
    wrapper          inside a mistral3 model with a vision tower, under the names of transformers 4 or 5
    fp8              the blocks' matrices in fp8, each with one scale, or with one for each 128 x 128 weights
    """
    config = hf_config(family)
    named = _hf_tensors(family.config, draw_weights(family) if weights is None else weights)
    if fused_experts:
        named = _with_fused_experts(family.config, named)
    block = 128 if fp8 == "block" else None
    tensors = _stored(named, family.dtype, fp8=fp8 is not None, scale="weight_scale_inv", block=block)
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
        config["quantization_config"]["weight_block_size"] = block and [block, block]
    if wrapper:
        tied = config["tie_word_embeddings"]
        config = {"model_type": "mistral3", "text_config": config, "vision_config": {"model_type": "pixtral"}}
        config |= {"architectures": ["Mistral3ForConditionalGeneration"], "tie_word_embeddings": tied}
        tensors = _wrapped(tensors, wrapper)
    _write_json(directory / "config.json", config)
    if shards == 1:
        write_tensor_file(directory / "model.safetensors", tensors)
        return
    names = list(tensors)
    weight_map = {
        name: f"model-{1 + i * shards // len(names):05}-of-{shards:05}.safetensors" for i, name in enumerate(names)
    }
    for file in sorted(set(weight_map.values())):
        write_tensor_file(directory / file, {name: tensors[name] for name in names if weight_map[name] == file})
    total_size = sum(array.nbytes for _, array in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def hf_config(family: Family) -> dict[str, Any]:
    """Return config.json, in the spelling of the family's class in transformers."""
    config = family.config
    rope: dict[str, Any] = {}
    if config.yarn is not None:
        rope |= {
            "type" if family.old_spelling else "rope_type": "yarn",
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
        }
        if config.yarn.attention_factor == 1:  # otherwise the factor alone is given, and the rest is YaRN's defaults
            rope |= {"beta_fast": config.yarn.beta_fast, "beta_slow": config.yarn.beta_slow}
            rope |= {"mscale": 1.0, "mscale_all_dim": 1.0}
    if config.query_temperature is not None:
        rope["llama_4_scaling_beta"] = config.query_temperature.beta
    fields: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family.model_type]],
        "model_type": family.model_type,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden_dim,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "torch_dtype": {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[family.dtype],
    }
    if family.old_spelling:
        fields |= {"rope_theta": config.rope_theta, "rope_scaling": rope or None}
    else:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta} | rope
    if family.model_type != "llama":
        fields["sliding_window"] = max((window for window in config.sliding_window if window), default=None)
    if family.model_type == "ministral":
        kinds = ("full_attention" if window is None else "sliding_attention" for window in config.sliding_window)
        fields["layer_types"] = list(kinds)
    if config.moe is not None:
        fields |= {"num_local_experts": config.moe.num_experts, "num_experts_per_tok": config.moe.num_experts_per_tok}
    return fields


_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
_AROUND_LAYERS = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


def rows_in_halves(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Return the rows of wq or wk with each head's even ones first, then its odd ones.

    Mistral's own files pair rows (0, 1), (2, 3), ... of a head for RoPE, Hugging Face's (0, K/2), (1, K/2 + 1), ...

    >>> rows_in_halves(np.arange(8).reshape(8, 1), n_heads=2).ravel().tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    by_pair = weight.reshape(n_heads, -1, 2, weight.shape[1])
    return by_pair.swapaxes(1, 2).reshape(weight.shape)


def _hf_tensors(config: ModelConfig, weights: Tensors) -> Tensors:
    """Return the weights under Hugging Face's names, wq and wk in halves."""
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}
    tensors = {}
    for name, weight in weights.items():
        stem = name.removesuffix(".weight")
        kind = stem.rpartition(".")[2]
        if stem in _AROUND_LAYERS:
            renamed = _AROUND_LAYERS[stem]
        else:
            _, layer, rest = stem.split(".", 2)
            renamed = f"model.layers.{layer}." + _IN_LAYER.get(rest, rest.replace("feed_forward", "block_sparse_moe"))
        tensors[f"{renamed}.weight"] = rows_in_halves(weight, heads[kind]) if kind in heads else weight
    return tensors


def _with_fused_experts(config: ModelConfig, tensors: Tensors) -> Tensors:
    """Return the tensors with each layer's experts in gate_up_proj (E, 2F, D), w1 above w3, and down_proj (E, D, F)."""
    assert config.moe is not None
    fused = {
        name.replace("block_sparse_moe.gate", "mlp.gate"): w for name, w in tensors.items() if "experts" not in name
    }
    for layer in range(config.n_layers):
        experts = f"model.layers.{layer}.block_sparse_moe.experts"
        w1, w2, w3 = (
            np.stack([tensors[f"{experts}.{expert}.{kind}.weight"] for expert in range(config.moe.num_experts)])
            for kind in ("w1", "w2", "w3")
        )
        fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = np.concatenate([w1, w3], axis=1)
        fused[f"model.layers.{layer}.mlp.experts.down_proj"] = w2
    return fused


def _wrapped(tensors: Stored, wrapper: Literal["v4", "v5"]) -> Stored:
    """Return the tensors of a text model as those of a mistral3 model, beside a vision tower of one tensor."""
    if wrapper == "v4":
        inside, outside, tower = "language_model.model.", "language_model.lm_head.", "vision_tower."
    else:
        inside, outside, tower = "model.language_model.", "lm_head.", "model.vision_tower."
    renamed = {name.replace("lm_head.", outside): stored for name, stored in tensors.items() if "lm_head" in name}
    renamed |= {
        inside + name.removeprefix("model."): stored for name, stored in tensors.items() if "lm_head" not in name
    }
    return renamed | {f"{tower}patch_conv.weight": ("F32", np.zeros((4, 3, 2, 2), np.float32))}


def _stored(weights: Tensors, dtype: str, *, fp8: bool, scale: str, block: int | None = None) -> Stored:
    """Return each tensor as the files hold it; those in fp8 are followed by their scale, `X.weight` by `X.<scale>`."""
    tensors: Stored = {}
    for name, weight in weights.items():
        if fp8 and _is_fp8(name):
            codes, scales = to_fp8(weight, block)
            tensors[name] = ("F8_E4M3", codes)
            tensors[f"{name.removesuffix('weight')}{scale}"] = ("F32", scales)
        else:
            dtype_in_header, encode = _STORED[dtype]
            tensors[name] = (dtype_in_header, encode(weight))
    return tensors


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
