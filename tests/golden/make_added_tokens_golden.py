"""Make added_tokens.json: how transformers encodes and decodes texts with added tokens.

    pip install "transformers==4.57.6" sentencepiece protobuf
    python tests/golden/make_added_tokens_golden.py

The base is the tokenizer of the demonstration model. transformers 4 has a LlamaTokenizer in Python over SentencePiece
("slow"), whose ids we follow. The texts are those of its LlamaTokenizerFast, without special tokens. transformers 5 has
only the fast kind. It differs in one way: it puts no space before a text that begins with a space.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaTokenizer, LlamaTokenizerFast

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "mistral_ref" / "demo_model" / "tokenizer.model"
N_PIECES = 2048
FLAGS: dict[str, dict[str, bool]] = {
    "<unk>": {},
    "<s>": {},
    "</s>": {},
    "<|im_end|>": {},
    "<|im_start|>": {},
    "<tool>": {"special": False},
    "<tool>s": {"special": False},  # longer than another that begins in the same way
    "<l>": {"lstrip": True},
    "<r>": {"rstrip": True},
    "<both>": {"lstrip": True, "rstrip": True, "special": False},
}
PARTS = [*list(FLAGS)[3:], " ", "  ", "\n", "\u00a0", "\t", "Once", " upon", "a time", ".", "é", "🙂", "<", "|im_end|>"]


def tokenizer_config(legacy: bool) -> dict[str, Any]:
    off = {"special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    ids = [0, 1, 2, *range(N_PIECES, N_PIECES + len(FLAGS) - 3)]
    decoder = {
        str(i): off | {"content": content} | flags for i, (content, flags) in zip(ids, FLAGS.items(), strict=True)
    }
    names = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    return {"added_tokens_decoder": decoder, "legacy": legacy, "tokenizer_class": "LlamaTokenizer"} | names


def texts() -> list[str]:
    rng = random.Random(0)
    chat = "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n"
    drawn = ["".join(rng.choices(PARTS, k=rng.randint(1, 8))) for _ in range(120)]
    return [chat, "", " ", "<|im_start|>", "a <l> <r> b", "x<tool>y", "<tool>s", *drawn]


def cases(legacy: bool) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        shutil.copy(MODEL, directory)
        Path(directory, "tokenizer_config.json").write_text(json.dumps(tokenizer_config(legacy)))
        slow = LlamaTokenizer.from_pretrained(directory)
        fast = LlamaTokenizerFast.from_pretrained(directory, from_slow=True)
    found = []
    for text in texts():
        ids = {name: one.encode(text, add_special_tokens=False) for name, one in (("slow", slow), ("fast", fast))}
        if legacy:
            assert ids["slow"] == ids["fast"], text
        # Otherwise the two differ where a text begins with a space, and where it begins with an added token that is not
        # special: the slow one leaves a space of its own before this token.
        begins = not legacy and slow.convert_ids_to_tokens(ids["fast"])[:1]
        chosen = ids["fast" if begins and begins[0] in FLAGS else "slow"]
        found.append({"text": text, "ids": chosen, "decoded": fast.decode(chosen, skip_special_tokens=True)})
    return found


if __name__ == "__main__":
    golden = [{"tokenizer_config": tokenizer_config(legacy), "cases": cases(legacy)} for legacy in (True, False)]
    (HERE / "added_tokens.json").write_text(json.dumps(golden, indent=0, ensure_ascii=True) + "\n")
