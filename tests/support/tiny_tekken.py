"""Tiny tekken.json files of every version: none of version 7 or later is in a package."""

from __future__ import annotations

import base64
import functools
from collections import Counter
from itertools import pairwise
from typing import Any

from support.tiny_tokenizers import PARAGRAPH

from mistral_ref.text.tekken import TEKKEN

TEKKEN_VERSIONS = ("v3", "v7", "v11", "v13", "v15")
# In an order of our own: programs must find control tokens by their names.
CONTROLS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "[MODEL_SETTINGS]", "[/MODEL_SETTINGS]", "<pad>"),
)
EFFORTS = {"type": "enum", "values": ["none", "high"], "accepts_none": True, "default": "none"}
_N_MERGES, _N_CONTROLS = 200, 64


@functools.cache
def _pieces() -> tuple[bytes, ...]:
    """Return the 256 bytes, and the pieces that merging the commonest pair of a paragraph again and again gives."""
    pieces = [bytes([n]) for n in range(256)]
    text = [bytes([n]) for n in (PARAGRAPH * 3 + ' {"name": "f", "arguments": {}} get_weather').encode()]
    for _ in range(_N_MERGES):
        (left, right), _ = max(Counter(pairwise(text)).items(), key=lambda item: (item[1], item[0]))
        pieces.append(left + right)
        merged: list[bytes] = []
        for piece in text:
            if merged and merged[-1] == left and piece == right:
                merged[-1] += piece
            else:
                merged.append(piece)
        text = merged
    return tuple(dict.fromkeys(pieces))


def tiny_tekken(version: str) -> dict[str, Any]:
    """Return the contents of a tekken.json of this version, with the control tokens of all versions."""
    pieces = _pieces()
    listed = [
        {"rank": rank, "token_bytes": base64.b64encode(piece).decode(), "token_str": None}
        for rank, piece in enumerate(pieces)
    ]
    controls = [{"rank": rank, "token_str": name, "is_control": True} for rank, name in enumerate(CONTROLS)]
    config = {
        "pattern": TEKKEN,
        "num_vocab_tokens": len(pieces),
        "default_vocab_size": len(pieces) + _N_CONTROLS,
        "default_num_special_tokens": _N_CONTROLS,
        "version": version,
    }
    settings = {"model_settings_builder": {"reasoning_effort": EFFORTS}} if version == "v15" else {}
    return {"config": config, "vocab": listed, "special_tokens": controls} | settings
