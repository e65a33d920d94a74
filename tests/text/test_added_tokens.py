"""Added tokens: which are read from which text, their ids and their text, and files that contradict each other."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import FAMILIES, write_hf
from support.errors import refused, warned
from support.paths import GOLDEN
from support.streams import check_stream, ids_for
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref.errors import InputError, TokenizerError
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.measure.perplexity import perplexity
from mistral_ref.text import load_tokenizer
from mistral_ref.text.added_tokens import MAX_CONTENT, AddedToken, AddedTokens
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.text.tokenizer_config import TokenizerConfig

START, END, TOOL = 384, 385, 387  # tiny_tokenizer has ids 0 to 383; 386 has no name
ADDED = (AddedToken(START, "<|im_start|>"), AddedToken(END, "<|im_end|>"), AddedToken(TOOL, "<tool>", special=False))
TOKENIZER = SentencePieceTokenizer(tiny_tokenizer(), config=TokenizerConfig(added=ADDED))
NEW_WAY = SentencePieceTokenizer(tiny_tokenizer(), config=TokenizerConfig(added=ADDED, legacy=False))
PLAIN = SentencePieceTokenizer(tiny_tokenizer())
CONFIG = FAMILIES["dense_windowed"].config.replace(vocab_size=400)


def directory_with(directory: Path, **files: Any) -> Path:
    """Fill a directory with the tiny tokenizer and with these files; an underscore stands for ".json"."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def decoder(tokens: dict[int, Any]) -> dict[str, Any]:
    """Return a tokenizer_config with these added tokens: special ones by their contents, others by their fields."""
    special = {token_id: {"content": one, "special": True} for token_id, one in tokens.items() if isinstance(one, str)}
    return {"added_tokens_decoder": {str(token_id): one for token_id, one in (tokens | special).items()}}


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False])
def test_ids_and_texts_are_those_of_transformers(legacy: bool, tmp_path: Path) -> None:
    (golden,) = (
        golden
        for golden in json.loads((GOLDEN / "added_tokens.json").read_text())
        if golden["tokenizer_config"]["legacy"] is legacy
    )
    shutil.copy(DEMO_MODEL / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(golden["tokenizer_config"]))
    tokenizer = load_tokenizer(tmp_path)
    assert len(golden["cases"]) > 100
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"], bos=False, added=True) == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"]) == case["decoded"], case["text"]


def test_special_tokens_are_read_only_where_the_writer_may_set_marks() -> None:
    text = "<|im_start|>a<tool>b<|im_end|>"
    ids = TOKENIZER.encode(text, added=True)
    assert [token_id for token_id in ids if token_id >= 384] == [START, TOOL, END]
    assert [token_id for token_id in TOKENIZER.encode(text) if token_id >= 384] == [TOOL]
    assert TOKENIZER.encode("<|im_start|>a", bos=False) == PLAIN.encode("<|im_start|>a", bos=False)


@given(st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "[INST]", "<0x41>", "<|im_end|>", " a"])).map("".join))
def test_control_pieces_are_never_read_even_if_files_list_them(text: str) -> None:
    listed = [AddedToken(token_id, PLAIN.piece(token_id)) for token_id in range(5)]
    tokenizer = SentencePieceTokenizer(tiny_tokenizer(), config=TokenizerConfig(added=(*listed, *ADDED)))
    assert not set(range(5)) & set(tokenizer.encode(text, bos=False, added=True))
    assert tokenizer.encode(text, added=True) == TOKENIZER.encode(text, added=True)
    assert tokenizer.control_id("[INST]") == 3


@given(st.lists(st.sampled_from(["<a>", "<a>b", "<b", "ab", " ", "  ", "<", "x"])).map("".join), st.booleans())
def test_a_text_is_cut_at_its_tokens_and_nothing_is_lost(text: str, special: bool) -> None:
    kinds = {"<a>": True, "<a>b": False, "<b": True, "ab": False}
    tokens = AddedTokens([AddedToken(i, content, kinds[content]) for i, content in enumerate(kinds)])
    parts = list(tokens.split(text, special=special))
    assert "".join(part if isinstance(part, str) else part.content for part in parts) == text
    assert "" not in parts
    assert special or not any(isinstance(part, AddedToken) and part.special for part in parts)
    if special:  # then no token is left in what counts as text
        assert not any(content in part for part in parts if isinstance(part, str) for content in kinds)


def test_cutting_a_text_takes_time_in_proportion_to_it() -> None:
    tokens = AddedTokens([AddedToken(n, "a" * n + "b") for n in range(1, MAX_CONTENT)])
    started = time.thread_time()
    assert list(tokens.split("a" * 10_000, special=True)) == ["a" * 10_000]
    assert len(list(tokens.split("ab" + " " * 50_000 + "ab", special=True))) == 3
    assert time.thread_time() - started < 1


# --- back to text -----------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["she", " said", "<tool>", "🙂", "  ", "<|im_start|>"])).map("".join))
def test_text_survives_a_round_trip_where_no_space_is_put_in(text: str) -> None:
    assert NEW_WAY.decode(NEW_WAY.encode(text)) == text


@pytest.mark.parametrize("tokenizer", [TOKENIZER, NEW_WAY])
@given(data=st.data())
def test_a_stream_adds_up_to_the_text_of_all_ids(tokenizer: SentencePieceTokenizer, data: st.DataObject) -> None:
    some_ids = st.lists(st.integers(START, TOOL), max_size=2) | ids_for(tokenizer)
    ids = st.lists(some_ids, max_size=4).map(lambda lists: [*chain.from_iterable(lists)])
    check_stream(tokenizer, data.draw(ids, "context"), data.draw(ids, "ids"))


def test_special_tokens_have_a_name_and_no_text() -> None:
    (she,) = TOKENIZER.encode("she", bos=False)
    assert TOKENIZER.decode([1, START, she, END, she, TOOL, she, 386]) == "she she<tool> she"
    assert [TOKENIZER.piece(token_id) for token_id in (START, 386, TOOL)] == ["<|im_start|>", "[386]", "<tool>"]
    assert (TOKENIZER.n_pieces, TOKENIZER.vocab_size) == (384, 388)
    assert [TOKENIZER.control_id(name) for name in ("<|im_end|>", "<tool>", "[INST]")] == [END, TOOL, 3]
    for name in ("she", "▁she", "[/NO]", ""):
        with refused(InputError, "control", repr(name)):
            TOKENIZER.control_id(name)


# --- files ------------------------------------------------------------------------------------------------------------


def test_added_tokens_json_counts_where_tokenizer_config_lists_none(tmp_path: Path) -> None:
    own = {"<s>": 1, "</s>": 2, "<unk>": 0}
    alone = load_tokenizer(directory_with(tmp_path / "alone", added_tokens=own | {"<|im_end|>": 384}))
    assert alone.encode("<|im_end|><s>", bos=False, added=True)[0] == 384
    assert alone.encode("<|im_end|>") == PLAIN.encode("<|im_end|>")
    config = decoder({384: "<|im_end|>", 385: {"content": "<tool>"}})
    both = directory_with(tmp_path / "both", added_tokens={"<|im_end|>": 384}, tokenizer_config=config)
    assert set(load_tokenizer(both / "tokenizer.model").added.by_id) == {384, 385}
    for name, other, facts in (("moved", {"<|im_end|>": 385}, (385, 384)), ("more", {"<pad>": 386}, (386,))):
        directory = directory_with(tmp_path / name, added_tokens=other, tokenizer_config=config)
        with warned(directory / "added_tokens.json", "tokenizer_config.json", "ignored", repr(*other), *facts):
            assert set(load_tokenizer(directory).added.by_id) == {384, 385}


def test_an_id_of_a_piece_may_get_another_name_and_that_is_said(tmp_path: Path) -> None:
    directory = directory_with(tmp_path, tokenizer_config=decoder({3: {"content": "<|im_start|>"}, 4: "[/INST]"}))
    with warned(directory, "'<|im_start|>'", "'[INST]'", 3):
        tokenizer = load_tokenizer(directory)
    assert tokenizer.encode("<|im_start|>[/INST]", bos=False, added=True)[0] == 3
    assert 3 not in tokenizer.encode("<|im_start|>")  # it stays a mark
    assert (tokenizer.decode([3]), tokenizer.piece(3)) == ("", "<|im_start|>")
    with refused(InputError, "'[INST]'"):
        tokenizer.control_id("[INST]")


LONG = "<" + "x" * MAX_CONTENT


@pytest.mark.parametrize(
    ("files", "file", "facts"),
    [
        ({"added_tokens": {"<a>": 384, "<b>": 384}}, "", (384, "'<a>'", "'<b>'")),
        ({"tokenizer_config": decoder({384: "<a>", 385: "<a>"})}, "", (384, 385, "'<a>'")),
        ({"tokenizer_config": decoder({384: "[INST]"})}, "", ("'[INST]'", 384, 3)),
        ({"added_tokens": {"<a>": -1}}, "added_tokens.json", ("id", -1)),
        ({"added_tokens": {"<a>": 2**31}}, "added_tokens.json", ("id", 2**31, 2**31 - 1)),
        ({"added_tokens": {"<a>": True}}, "added_tokens.json", ("id", True)),
        ({"added_tokens": {"<a>": "384"}}, "added_tokens.json", ("id", "'384'")),
        ({"added_tokens": {"": 384}}, "added_tokens.json", ("content", "''")),
        ({"added_tokens": {"\ud800": 384}}, "added_tokens.json", ("content", r"'\ud800'")),
        ({"added_tokens": {LONG: 384}}, "added_tokens.json", ("content", MAX_CONTENT)),
        ({"added_tokens": ["<a>"]}, "added_tokens.json", ("object",)),
        ({"tokenizer_config": {"added_tokens_decoder": []}}, "tokenizer_config.json", ("added_tokens_decoder", "[]")),
        ({"tokenizer_config": decoder({-1: "<a>"})}, "tokenizer_config.json", ("'-1'",)),
        ({"tokenizer_config": {"added_tokens_decoder": {"0384": {}}}}, "tokenizer_config.json", ("'0384'",)),
        ({"tokenizer_config": {"added_tokens_decoder": {"384": "<a>"}}}, "tokenizer_config.json", ("384", "'<a>'")),
        ({"tokenizer_config": decoder({384: {"special": True}})}, "tokenizer_config.json", (384, "content", None)),
        *(
            ({"tokenizer_config": decoder({384: {"content": "<a>", flag: 1}})}, "tokenizer_config.json", (384, flag, 1))
            for flag in ("special", "lstrip", "rstrip", "single_word")
        ),
        (
            {"tokenizer_config": decoder({384: {"content": "<a>", "single_word": True}})},
            "tokenizer_config.json",
            (384, "single_word"),
        ),
        ({"tokenizer_config": {"eos_token": 2}}, "tokenizer_config.json", ("eos_token", 2)),
        ({"tokenizer_config": {"eos_token": {"text": "</s>"}, "legacy": 1}}, "tokenizer_config.json", ("legacy", 1)),
    ],
)
def test_wrong_values_and_contradictions_are_refused(
    files: dict[str, Any], file: str, facts: tuple[object, ...], tmp_path: Path
) -> None:
    with refused(TokenizerError, directory_with(tmp_path, **files) / file, *facts):
        load_tokenizer(tmp_path)


def test_the_end_of_a_text_by_name(tmp_path: Path) -> None:
    for number, (eos_token, eos_id) in enumerate(
        [("<|im_end|>", 384), ({"content": "<|im_end|>"}, 384), ("[/INST]", 4), (None, 2)]
    ):
        config = decoder({384: "<|im_end|>"}) | {"eos_token": eos_token}
        tokenizer = load_tokenizer(directory_with(tmp_path / str(number), tokenizer_config=config))
        assert (tokenizer.eos_id, tokenizer.encode("A", eos=True)[-1]) == (eos_id, eos_id)
    directory = directory_with(tmp_path / "unknown", tokenizer_config={"eos_token": "<|im_end|>"})
    with warned(directory / "tokenizer_config.json", "eos_token", "'<|im_end|>'", 2):
        assert load_tokenizer(directory).eos_id == 2


@given(st.text())
def test_no_space_is_put_before_a_text_where_the_files_say_so(text: str) -> None:
    for legacy in (True, False):
        config = TokenizerConfig(added=ADDED, legacy=legacy, add_prefix_space=False)
        tokenizer = SentencePieceTokenizer(tiny_tokenizer(), config=config)
        ids = tokenizer.encode(text, bos=False)
        assert ids == TOKENIZER._without_space.encode(text)
        check_stream(tokenizer, [], ids)
        assert tokenizer.encode(f"<|im_start|>{text}", bos=False, added=True) == [START, *ids]


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """Return a directory with a tiny fine-tuned model: two marks and a word are added to the tokenizer's pieces."""
    config = decoder({START: "<|im_start|>", END: "<|im_end|>", TOOL: {"content": "<tool>"}})
    directory_with(tmp_path, tokenizer_config=config | {"eos_token": "<|im_end|>"})
    write_hf(tmp_path, replace(FAMILIES["dense_windowed"], config=CONFIG))
    return tmp_path


def test_a_prompt_of_a_model_holds_added_tokens(chat_model: Path) -> None:
    model = mistral_ref.load(chat_model, backend="numpy")
    prompt = "<|im_start|>she<|im_end|>"
    ids = TOKENIZER.encode(prompt, added=True)
    assert model.token_ids(prompt) == ids
    assert [token_id for token_id in ids if token_id >= 384] == [START, END]
    trace = model.trace(prompt, keep="logits")
    assert (trace.tokens, trace.pieces) == (ids, ["<s>", "<|im_start|>", "▁she", "<|im_end|>"])
    np.testing.assert_array_equal(model.forward(prompt), model.forward(ids))
    np.testing.assert_array_equal(perplexity(model, prompt, context=4).nlls, perplexity(model, ids, context=4).nlls)
    assert list(model.generate(prompt, max_tokens=3)) == list(model.generate(ids, max_tokens=3))


def test_which_file_says_how_a_text_ends(chat_model: Path) -> None:
    config_json = json.loads((chat_model / "config.json").read_text())
    config_json.pop("eos_token_id", None)
    for generation, config, expected in ((None, None, {END}), (None, 2, {2}), (START, 2, {START})):
        for name, content in (("generation_config.json", {}), ("config.json", config_json)):
            eos_id = generation if name.startswith("generation") else config
            (chat_model / name).write_text(json.dumps(content | ({} if eos_id is None else {"eos_token_id": eos_id})))
        assert mistral_ref.load(chat_model, backend="numpy").eos_ids == expected


def test_an_added_token_beyond_the_models_vocabulary_is_said(chat_model: Path) -> None:
    config = decoder({400: "[PAD]"})
    (chat_model / "tokenizer_config.json").write_text(json.dumps(config))
    with warned(chat_model, "'[PAD]'", 400, 399):
        model = mistral_ref.load(chat_model, backend="numpy")
    assert model.token_ids("she") == PLAIN.encode("she")
    with refused(InputError, 400, 399):
        model.token_ids("[PAD]")
