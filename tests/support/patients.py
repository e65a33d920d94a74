"""A healthy tiny model with all files that one can have, for the doctor; tests plant faults in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from support.checkpoints import FAMILIES, Family, Tensors, draw_weights, write_consolidated, write_hf
from support.errors import assert_says
from support.tiny_tekken import tiny_tekken

from mistral_ref.measure.doctor import Report, examine
from mistral_ref.text.byte_bpe import LETTERS
from mistral_ref.text.split_patterns import TEKKEN
from mistral_ref.text.tekken import tekken_tokenizer

N_CONTROLS = 1000  # as in Mistral's files


def tekken(version: str = "v13") -> dict[str, Any]:
    """Return a tekken.json with as many control tokens as Mistral's have."""
    document = tiny_tekken(version)
    sizes = document["config"]
    sizes |= {"default_num_special_tokens": N_CONTROLS, "default_vocab_size": N_CONTROLS + len(document["vocab"])}
    return document


def as_tokenizer_json(document: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json that a converter makes of a tekken.json."""
    tokenizer = tekken_tokenizer(document, "tekken.json")
    letters = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": TEKKEN}, "behavior": "Isolated", "invert": False}
    pieces = {"".join(LETTERS[byte] for byte in piece): token for piece, token in tokenizer.bpe.ids.items()}
    return {
        "added_tokens": [{"id": i, "content": name, "special": True} for name, i in tokenizer.controls.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, letters]},
        "decoder": letters,
        "model": {"type": "BPE", "vocab": dict(tokenizer.controls) | pieces, "merges": [], "ignore_merges": True},
    }


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def family(name: str = "dense_windowed") -> Family:
    """Return a tiny family with the vocabulary of `tekken`."""
    found, size = FAMILIES[name], tekken()["config"]["default_vocab_size"]
    return replace(found, config=found.config.replace(vocab_size=size))


def write_patient(directory: Path, name: str = "dense_windowed", *, hf: bool = True, consolidated: bool = True) -> None:
    """Write a healthy model: both layouts, both files of the tokenizer, a chat template, and the ids of the ends."""
    directory.mkdir(exist_ok=True)
    if consolidated:
        write_consolidated(directory, family(name))
    if hf:
        write_hf(directory, family(name))
    write_json(directory / "tekken.json", tekken())
    write_json(directory / "tokenizer.json", as_tokenizer_json(tekken()))
    write_json(directory / "tokenizer_config.json", {"chat_template": TEMPLATE, "eos_token": "</s>"})
    write_json(directory / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the object in a JSON file."""
    content = json.loads(path.read_text())
    change(content)
    write_json(path, content)


def changed_weights(name: str, change: Callable[[Tensors], object]) -> Tensors:
    """Return the weights of a family after a change."""
    weights = {key: np.array(values) for key, values in draw_weights(family(name)).items()}
    change(weights)
    return weights


def assert_healthy(path: Path, **options: Any) -> Report:
    """Assert that the doctor finds nothing, and has examined something."""
    report = examine(path, **options)
    assert [(one.file.name, one.what) for one in report.findings] == []
    assert report.examined
    return report


def assert_finds(path: Path, severity: str, file: Path, *facts: object, n: int = 1, **options: Any) -> None:
    """Assert that the doctor finds n things, each of one line, and the first of them is about this file, with facts."""
    findings = examine(path, **options).findings
    found = [(one.severity, str(one.file), one.what) for one in findings]
    assert len(found) == n, found
    assert found[0][:2] == (severity, str(file)), found
    assert_says(findings[0].what, *facts)
    for one in findings:
        assert all(text and text.isprintable() for text in (one.what, one.why, one.cure)), one
        assert one.why.endswith(".")
        assert one.cure.endswith(".")
