"""The doctor on tokenizers: files against each other, the vocabulary, the ids of the ends, and the chat template."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FAMILIES, write_consolidated
from support.gguf_files import sentencepiece_fields, tekken_fields, write_gguf
from support.patients import (
    TEMPLATE,
    as_tokenizer_json,
    assert_finds,
    assert_healthy,
    change_json,
    family,
    tekken,
    write_json,
    write_patient,
)
from support.tiny_tokenizers import more_pieces, tiny_tokenizer

from mistral_ref.text.split_patterns import GPT2, LLAMA3
from mistral_ref.text.tekken import tekken_tokenizer

SPM = tiny_tokenizer()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a healthy model in Hugging Face's layout, with the tokenizer in both files."""
    write_patient(tmp_path, consolidated=False)
    assert_healthy(tmp_path, quick=True)
    return tmp_path


def wrong_pattern(document: dict[str, Any]) -> None:
    document["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": LLAMA3}


def test_tokenizer_json_has_the_pattern_with_which_models_were_published(model: Path) -> None:
    change_json(model / "tokenizer.json", wrong_pattern)
    assert_finds(model, "wrong", model / "tokenizer.json", "wrong pattern", quick=True)
    (model / "tekken.json").unlink()  # then the file counts itself
    assert_finds(model, "wrong", model / "tokenizer.json", "wrong pattern", quick=True)


@pytest.mark.parametrize("pattern", [GPT2, r"\w+"])
def test_tokenizer_json_has_another_pattern(model: Path, pattern: str) -> None:
    def plant(document: dict[str, Any]) -> None:
        document["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": pattern}

    change_json(model / "tokenizer.json", plant)
    assert_finds(model, "wrong", model / "tokenizer.json", "pattern", quick=True)


def renamed(document: dict[str, Any], token: int = 20) -> None:
    entry = next(entry for entry in document["added_tokens"] if entry["id"] == token)
    document["model"]["vocab"]["<|im_start|>"] = document["model"]["vocab"].pop(entry["content"])
    entry["content"] = "<|im_start|>"


def test_tokenizer_json_has_other_tokens_than_tekken_json(model: Path) -> None:
    good = as_tokenizer_json(tekken())
    size = tekken()["config"]["default_vocab_size"]
    more = {"id": size, "content": "<|im_end|>", "special": True}
    write_json(model / "tokenizer.json", good | {"added_tokens": [*good["added_tokens"], more]})
    assert_finds(model, "wrong", model / "tokenizer.json", "1,457", "1,456", size, "<|im_end|>", quick=True)
    write_json(model / "tokenizer.json", good)
    change_json(model / "tokenizer.json", renamed)
    assert_finds(model, "wrong", model / "tokenizer.json", "id 20", "<|im_start|>", "[MODEL_SETTINGS]", quick=True)
    pieces = {piece: token for piece, token in good["model"]["vocab"].items() if token < size - 2}
    write_json(model / "tokenizer.json", good | {"model": good["model"] | {"vocab": pieces}})
    assert_finds(model, "wrong", model / "tokenizer.json", "1,454", "1,456", quick=True)


@pytest.mark.parametrize(("version", "is_used"), [("v3", False), ("v15", True)])
def test_files_may_name_control_tokens_differently_that_are_not_used(model: Path, version: str, is_used: bool) -> None:
    """As in Mistral Nemo."""
    document = tekken(version)
    write_json(model / "tekken.json", document)
    change_json(model / "tokenizer_config.json", lambda content: content.pop("chat_template"))
    assert document["special_tokens"][20]["token_str"] == "[MODEL_SETTINGS]"
    document["special_tokens"][20]["token_str"] = "<SPECIAL_20>"
    write_json(model / "tokenizer.json", as_tokenizer_json(document))
    if is_used:
        assert_finds(model, "wrong", model / "tokenizer.json", "id 20", "<SPECIAL_20>", "[MODEL_SETTINGS]", quick=True)
    else:
        assert_healthy(model, quick=True)


def with_sentencepiece(directory: Path, **extra: bytes) -> dict[str, Any]:
    """Write a healthy model with a SentencePiece tokenizer; return its tokenizer.json, of a kind that is not read."""
    found = FAMILIES["dense_windowed"]
    fields = sentencepiece_fields(SPM)
    pieces = fields["tokenizer.ggml.tokens"]
    write_consolidated(directory, replace(found, config=found.config.replace(vocab_size=len(pieces))))
    (directory / "tokenizer.model").write_bytes(SPM)
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    return {
        "added_tokens": [{"id": i, "content": pieces[i], "special": True} for i in range(3)],
        "pre_tokenizer": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "byte_fallback": True},
    }


def test_tokenizer_json_has_other_tokens_than_tokenizer_model(tmp_path: Path) -> None:
    document = with_sentencepiece(tmp_path)
    write_json(tmp_path / "tokenizer.json", document)
    (tmp_path / "tokenizer.model.v3").write_bytes(SPM)  # the same under both names, as in published directories
    assert_healthy(tmp_path)
    write_json(tmp_path / "tokenizer.json", document | {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}})
    assert_healthy(tmp_path)  # what it lists cannot be compared
    added = [*document["added_tokens"], {"id": 384, "content": "<|im_end|>", "special": True}]
    write_json(tmp_path / "tokenizer.json", document | {"added_tokens": added})
    assert_finds(tmp_path, "wrong", tmp_path / "tokenizer.json", "385", "384", "<|im_end|>", "tokenizer.model")
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"384": {"content": "<|im_end|>"}}})
    assert_finds(tmp_path, "suspicious", tmp_path, "<|im_end|>", 384)  # the embedding has no row for it


def test_an_id_that_is_far_too_large_takes_no_time(tmp_path: Path) -> None:
    document = with_sentencepiece(tmp_path)
    write_json(tmp_path / "tokenizer.json", document)
    added = {"content": "<far>", "special": True}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {str(2**31 - 1): added}})
    assert_finds(tmp_path, "wrong", tmp_path / "tokenizer.json", "<far>", 2**31 - 1, n=2)


def test_two_files_of_sentencepiece_differ(tmp_path: Path) -> None:
    with_sentencepiece(tmp_path)
    (tmp_path / "tokenizer.model.v3").write_bytes(SPM + more_pieces(2))
    assert_finds(tmp_path, "wrong", tmp_path / "tokenizer.model.v3", "386", "384", "tokenizer.model")


def test_a_file_of_the_tokenizer_is_broken(model: Path) -> None:
    for file in ("tekken.json", "tokenizer.json"):
        content = (model / file).read_bytes()
        (model / file).write_bytes(content[:-20])
        assert_finds(model, "wrong", model / file, "JSON", quick=True)
        (model / file).write_bytes(content)
    change_json(model / "tekken.json", lambda document: document["config"].update(pattern=r"\w+"))
    assert_finds(model, "wrong", model / "tekken.json", "config.pattern", r"'\\w+'", quick=True)


@pytest.mark.parametrize(("rows", "severity"), [(1455, "wrong"), (1456, ""), (1711, ""), (1712, "suspicious")])
def test_the_vocabulary_and_the_rows_of_the_embedding(tmp_path: Path, rows: int, severity: str) -> None:
    write_consolidated(tmp_path, replace(family(), config=family().config.replace(vocab_size=rows)))
    write_json(tmp_path / "tekken.json", tekken())
    if severity:
        assert_finds(tmp_path, severity, tmp_path / "tekken.json", "1,456", f"{rows:,}", quick=True)
    else:
        assert_healthy(tmp_path, quick=True)


@pytest.mark.parametrize(
    ("ids", "severity", "facts"),
    [
        ({"eos_token_id": 9999}, "wrong", ["eos_token_id", 9999, 1455]),
        ({"eos_token_id": 22}, "suspicious", ["eos_token_id", 22, 2, "</s>"]),
        ({"bos_token_id": 2}, "suspicious", ["bos_token_id", 2, 1, "<s>"]),
        ({"eos_token_id": [2, 1065]}, "suspicious", ["eos_token_id", 1065, "'A'"]),
        ({"eos_token_id": "two"}, "wrong", ["eos_token_id", "two"]),
    ],
)
def test_the_ids_that_begin_and_end_a_text(model: Path, ids: dict[str, Any], severity: str, facts: list[Any]) -> None:
    write_json(model / "generation_config.json", {"bos_token_id": 1, "eos_token_id": [2, 4]})
    assert_healthy(model, quick=True)
    change_json(model / "generation_config.json", lambda content: content.update(ids))
    assert_finds(model, severity, model / "generation_config.json", *facts, quick=True)


def test_the_named_end_is_no_token(model: Path) -> None:
    change_json(model / "tokenizer_config.json", lambda content: content.update(eos_token="<|im_end|>"))
    assert_finds(model, "suspicious", model / "tokenizer_config.json", "eos_token", "<|im_end|>", 2, quick=True)


# What the template of each version may write; "[SYSTEM_PROMPT]" is in that of the healthy model.
CALLS = "{% if m.tool_calls %}[TOOL_CALLS]f[ARGS]{}{% endif %}"


@pytest.mark.parametrize(
    ("version", "template", "facts"),
    [
        ("v13", TEMPLATE, []),
        ("v13", TEMPLATE + CALLS + "[THINK]", []),
        ("v11", TEMPLATE + CALLS.replace("[ARGS]", "[CALL_ID]123456789[ARGS]"), []),
        ("v7", TEMPLATE + "[TOOL_CONTENT]", []),
        ("v3", "{{ bos_token }}[AVAILABLE_TOOLS][INST]{{ messages[0].content }}[/INST]", []),
        ("v13", "<|im_start|>user", ["<|im_start|>"]),
        ("v3", TEMPLATE, ["[SYSTEM_PROMPT]", "v3"]),
        ("v13", TEMPLATE + CALLS.replace("[ARGS]", "[CALL_ID]123456789[ARGS]"), ["[CALL_ID]", "v13"]),
        ("v11", TEMPLATE + "[THINK]", ["[THINK]", "v11"]),
        ("v7", TEMPLATE + CALLS, ["[ARGS]", "v7"]),
        ("v11", TEMPLATE + CALLS, ["no [CALL_ID]", "v11"]),
        ("v11", TEMPLATE + "[TOOL_CALLS][TOOL_RESULTS]", ["no [ARGS]", "no [CALL_ID]", "no [TOOL_CONTENT]", "v11"]),
        ("v13", TEMPLATE + "[TOOL_CONTENT][MODEL_SETTINGS]", ["[MODEL_SETTINGS]", "[TOOL_CONTENT]", "v13"]),
        ("v13", TEMPLATE.replace("SYSTEM_PROMPT", "INST"), ["[SYSTEM_PROMPT]", "v13"]),
        ("v13", TEMPLATE.replace("[INST]", "[INST] "), ["space", "[INST]", "v13"]),
    ],
)
def test_the_chat_template_and_the_version_of_the_tokenizer(
    model: Path, version: str, template: str, facts: list[str]
) -> None:
    change_json(model / "tekken.json", lambda document: document["config"].update(version=version))
    change_json(model / "tokenizer_config.json", lambda content: content.update(chat_template=template))
    if facts:
        assert_finds(model, "wrong", model / "tokenizer_config.json", *facts, quick=True)
    else:
        assert_healthy(model, quick=True)


def test_the_file_of_a_chat_template_goes_before_the_field(model: Path) -> None:
    (model / "chat_template.jinja").write_text(TEMPLATE + "<|im_end|>")
    assert_finds(model, "wrong", model / "chat_template.jinja", "<|im_end|>", quick=True)


def test_the_tokenizer_and_the_template_in_a_gguf_file(tmp_path: Path) -> None:
    path, fields = tmp_path / "tiny.gguf", tekken_fields(tekken_tokenizer(tekken(), "tekken.json"))
    write_gguf(path, family(), fields | {"tokenizer.chat_template": TEMPLATE + CALLS + "[CALL_ID]"})
    assert_healthy(path)  # v11 and v13 cannot be told apart
    write_gguf(path, family(), fields | {"tokenizer.chat_template": TEMPLATE + "<|im_end|>"})
    assert_finds(path, "wrong", path, "<|im_end|>")
    write_gguf(path, family(), fields | {"tokenizer.ggml.eos_token_id": 1065})
    assert_finds(path, "suspicious", path, 1065, "'A'")
    write_gguf(path, family(), fields | {"tokenizer.ggml.pre": "unheard of"})
    assert_finds(path, "wrong", path, "tokenizer.ggml.pre", "unheard of")
