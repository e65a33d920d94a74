"""Write the tiny families, and tokenizers, as GGUF files. Nothing here needs the package gguf."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from support.checkpoints import Family, Tensors, draw_weights, to_bfloat16

from mistral_ref.files.gguf_writer import Stored, Typed, config_fields, gguf_bytes
from mistral_ref.text.byte_bpe import LETTERS
from mistral_ref.text.byte_tokenizer import ByteTokenizer
from mistral_ref.text.sentencepiece_file import fields_of

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
