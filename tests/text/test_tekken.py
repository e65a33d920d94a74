"""tekken.json: ids and texts are those of mistral-common, for its own files and for tiny ones of every version."""

from __future__ import annotations

import copy
import functools
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import assert_says, refused, warned
from support.streams import check_byte_stream
from support.tiny_tekken import CONTROLS, TEKKEN_VERSIONS, tiny_tekken
from support.tiny_tokenizers import PARAGRAPH, tiny_tokenizer

from mistral_ref.errors import InputError, TokenizerError, UnknownTokenizerError
from mistral_ref.text import load_tokenizer
from mistral_ref.text.byte_tokenizer import ByteTokenizer
from mistral_ref.text.split_patterns import KNOWN, TEKKEN, split
from mistral_ref.text.tekken import tekken_tokenizer

try:
    from mistral_common.tokens.tokenizers import tekken as mistral_common_tekken
except ImportError:
    mistral_common_tekken = None

TINY = tekken_tokenizer(tiny_tekken("v13"), "tekken.json")
FIXED = ("", "Hello", " Hello", "<s>[INST] hi [/INST]</s>", "a\n\n  b\t", "日本語 🙂 é", "HelloWorld 12345", PARAGRAPH)
CHARACTERS = "aAbB  \n\r\t/'’sSéǅªⅷ٣1😀\u0301\x1c\x85\u2028\u3000漢あ,.!\u00ad\ud7ff\U0010ffff"
PUBLISHED = ("tekken_240718.json", "tekken_240911.json")
texts = st.text() | st.text(st.sampled_from(CHARACTERS))


def published_path(name: str) -> Path:
    """Return the path of a file that mistral-common carries; skip where it is not installed."""
    if mistral_common_tekken is None:
        pytest.skip("mistral-common is not installed")
    return Path(mistral_common_tekken.__file__).parents[2] / "data" / name


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return "".join(rng.choices(CHARACTERS, k=rng.randint(0, 40)))
    ranges = ((0, 0x300), (0x300, 0xD800), (0x10000, 0x13000))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(20))


def check_against_mistral_common(path: Path, n_texts: int) -> None:
    ours, theirs = load_tokenizer(path), mistral_common_tekken.Tekkenizer.from_file(path)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.n_words, theirs.bos_id, theirs.eos_id)
    assert ours.chat_format == theirs.version.value
    n_controls = theirs.num_special_tokens
    for token_id in range(n_controls):
        assert ours.control_id(theirs.id_to_piece(token_id)) == token_id
    rng = random.Random(n_texts)
    for text in (*FIXED, *(random_text(rng) for _ in range(n_texts))):
        ids = ours.encode(text, bos=True, eos=True)
        assert ids == theirs.encode(text, bos=True, eos=True), ascii(text)
        assert ours.decode(ids) == theirs.decode(ids) == text
        first = [0, n_controls, n_controls + 128]
        any_ids = [rng.randrange(rng.choice(first), rng.choice([n_controls + 256, ours.vocab_size])) for _ in range(9)]
        assert ours.decode(any_ids) == theirs.decode(any_ids), any_ids


def tiny_file(directory: Path, document: dict[str, Any]) -> Path:
    path = directory / "tekken.json"
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize("version", TEKKEN_VERSIONS)
def test_tiny_files_of_every_version(version: str, tmp_path: Path) -> None:
    published_path("")
    document = tiny_tekken(version)
    check_against_mistral_common(tiny_file(tmp_path, document), 60)
    document["config"]["default_vocab_size"] -= 100  # the last pieces are left out
    check_against_mistral_common(tiny_file(tmp_path, document), 20)
    del document["special_tokens"]
    path = tiny_file(tmp_path, document)
    if version in ("v3", "v7"):
        check_against_mistral_common(path, 20)
        assert load_tokenizer(path).control_id("<SPECIAL_20>") == 20
    else:
        with refused(TokenizerError, path, "special_tokens", "v11"):
            load_tokenizer(path)


def test_which_control_token_ends_a_text(tmp_path: Path) -> None:
    path = tiny_file(tmp_path, tiny_tekken("v13"))
    config = path.with_name("tokenizer_config.json")
    listed = {"5": {"content": "<|im_end|>"}, "70": 1}  # tekken.json has its own names
    for eos_token, eos_id in ((None, 2), ("</s>", 2), ({"content": "[/INST]"}, 4)):
        config.write_text(json.dumps({"eos_token": eos_token, "added_tokens_decoder": listed}))
        tokenizer = load_tokenizer(path)
        assert (tokenizer.eos_id, tokenizer.encode("a", eos=True)[-1], tokenizer.added.by_id) == (eos_id, eos_id, {})
    config.write_text(json.dumps({"eos_token": "<|im_end|>"}))
    with warned(config, "eos_token", "'<|im_end|>'", 2):
        assert load_tokenizer(path).eos_id == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files(name: str) -> None:
    check_against_mistral_common(published_path(name), 200)


@pytest.mark.soak
@pytest.mark.parametrize("name", [*PUBLISHED, *TEKKEN_VERSIONS])
def test_many_texts(name: str, tmp_path: Path) -> None:
    path = published_path(name)
    check_against_mistral_common(path if name in PUBLISHED else tiny_file(tmp_path, tiny_tekken(name)), 2_000)


@pytest.mark.slow
def test_a_published_file_is_read_soon_and_in_little_memory() -> None:
    code = """
import resource, sys, time
from mistral_ref.text import load_tokenizer
unit = 1 if sys.platform == "darwin" else 1024
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
load_tokenizer(sys.argv[1])
seconds = time.thread_time() - started
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit)
"""
    command = [sys.executable, "-c", code, str(published_path(PUBLISHED[1]))]
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in found) < 0.6
    assert max(int(memory) for _, memory in found) < 100e6


@pytest.mark.slow
@pytest.mark.parametrize("character", ["a", "A", " ", "\n", "é", "1"])
def test_the_time_is_in_proportion_to_the_text(character: str) -> None:
    tokenizer = load_tokenizer(published_path(PUBLISHED[1]))
    text = character * 100_000
    seconds = []
    for _ in range(3):
        started = time.thread_time()
        ids = tokenizer.encode(text)
        seconds.append(time.thread_time() - started)
    assert min(seconds) < 1
    assert tokenizer.decode(ids) == text


# --- what holds of every byte-level tokenizer -------------------------------------------------------------------------


@given(texts)
def test_text_survives_a_round_trip(text: str) -> None:
    ids = TINY.encode(text, eos=True)
    assert (ids[0], ids[-1]) == (TINY.bos_id, TINY.eos_id) == (1, 2)
    assert TINY.decode(ids) == text
    assert not set(ids[1:-1]) & set(TINY.controls.values())


@given(st.lists(st.sampled_from([*CONTROLS, " ", "a"])).map("".join))
def test_text_that_spells_control_tokens_is_only_text(text: str) -> None:
    for added in (False, True):
        assert not set(TINY.encode(text, bos=False, added=added)) & set(TINY.controls.values())


any_ids = st.lists(
    st.integers(0, TINY.vocab_size - 1) | st.integers(64 + 128, 64 + 255) | st.integers(0, 4), max_size=12
)


@given(any_ids, any_ids)
def test_a_stream_adds_up_to_the_text_of_all_ids(context: list[int], ids: list[int]) -> None:
    check_byte_stream(TINY, context, ids)


@pytest.mark.parametrize("leading", range(0xC0, 0x100))
def test_a_stream_holds_back_every_beginning_of_every_character(leading: int) -> None:
    for second in (0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC2):
        check_byte_stream(TINY, [], [64 + byte for byte in (leading, second, 0xBF, 0xBF)])
        check_byte_stream(TINY, [64 + leading], [64 + second, 1, 64 + 0xBF])


@given(texts)
def test_every_character_is_in_one_word_of_every_pattern(text: str) -> None:
    for pattern in KNOWN:
        assert "".join(split(text, [pattern])) == text


@pytest.mark.slow
def test_every_character_of_unicode_is_in_a_word() -> None:
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    for pattern in KNOWN:
        assert "".join(split(text, [pattern])) == text


@given(st.text(st.sampled_from("the mil,wAé\n"), max_size=40))
def test_merges_show_how_the_ids_came_about(text: str) -> None:
    """Merge by merge: each state has one part less than the one before, and the last one is what the ids are."""
    for word in split(text, [TEKKEN]):
        states = list(TINY.bpe.merges(word.encode()))
        assert states[0] == [bytes([byte]) for byte in word.encode()]
        assert [len(state) for state in states] == list(range(len(states[0]), len(states[-1]) - 1, -1))
        assert all(b"".join(state) == word.encode() for state in states)
        assert [TINY.bpe.ids[part] for part in states[-1]] == TINY.encode(word, bos=False)


@given(st.text(st.sampled_from("the mil,wAé 1\n"), max_size=40))
def test_the_word_that_an_id_is_a_part_of(text: str) -> None:
    ids = [1, *TINY.encode(text, bos=False), 1, 64 + 0xFF, 64 + 0xC3, 64 + 0x41]
    words, word, left = [], "", 0
    for at, token_id in enumerate(ids[:-4]):
        word = TINY.word_of(ids, at)
        if left == 0 and at:
            words.append(word)
            left = len(word.encode())
        left -= len(TINY.bytes_of(token_id) or b"")
        assert (word == "") == (at == 0)
    assert words == split(text, [TEKKEN])
    first_parts = [next(TINY.merges(TINY.word_of(ids, at))) for at in (-3, -2, -1)]
    assert first_parts == [["\\xff", "\\xc3"], ["\\xff", "\\xc3"], ["A"]]


def test_names_of_ids_can_be_printed() -> None:
    assert all(TINY.piece(token_id).isprintable() for token_id in range(TINY.vocab_size))
    names = [TINY.piece(token_id) for token_id in (1, 63, 64 + 10, 64 + 32, 64 + 65, 64 + 0xE2)]
    assert names == ["<s>", "<SPECIAL_63>", "\\n", "▁", "A", "\\xe2"]


@pytest.mark.parametrize("token_id", [-1, TINY.vocab_size, True, 1.0, "1", None])
def test_ids_that_are_none_of_the_tokenizers_are_refused(token_id: int) -> None:
    for call in (
        lambda: TINY.decode([5, token_id]),
        lambda: TINY.piece(token_id),
        lambda: TINY.stream().push(token_id),
    ):
        with refused(InputError, "token id", repr(token_id)):
            call()


def test_names_that_no_control_token_has_are_refused() -> None:
    with refused(InputError, "tekken.json", "'[NOTHING]'"):
        TINY.control_id("[NOTHING]")


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_may_have_any_name_and_wins_over_others(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer())
    tiny_file(tmp_path, tiny_tekken("v7")).rename(tmp_path / "other name")
    assert load_tokenizer(tmp_path / "other name").encode("the") == TINY.encode("the")
    assert load_tokenizer(tmp_path).kind == "SentencePiece"
    tiny_file(tmp_path, tiny_tekken("v7"))
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)


def change(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    """Return a function that puts a value at a place in a document."""

    def put(document: dict[str, Any]) -> None:
        functools.reduce(lambda part, key: part[key], path[:-1], document)[path[-1]] = to

    return put


TOO_MANY = [{"rank": rank, "token_str": str(rank), "is_control": True} for rank in range(65)]


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (change("config", "pattern", to="(a+)+b"), ("config.pattern", "'(a+)+b'")),
        (change("config", "version", to="v99"), ("config.version", "'v99'", "v15")),
        (change("config", "default_vocab_size", to=10**9), ("config.default_vocab_size", 10**9)),
        (change("config", "default_vocab_size", to=64), ("config.default_vocab_size", 64, 64 + 256)),
        (change("config", "default_num_special_tokens", to=True), ("config.default_num_special_tokens", True)),
        (change("special_tokens", to=TOO_MANY), ("special_tokens", 65, 64)),
        (change("special_tokens", to={}), ("special_tokens", "{}", "list")),
        (change("special_tokens", 3, "rank", to=4), ("special token", 3, "rank")),
        (change("special_tokens", 3, "token_str", to="<s>"), ("special_tokens", "different")),
        (change("special_tokens", 1, "token_str", to="<bos>"), ("special_tokens", "'<s>'")),
        (change("vocab", 7, "rank", to=8), ("piece", 7, "rank")),
        (change("vocab", 7, "token_bytes", to="AA=="), ("piece", 7, "'AA=='")),
        (change("vocab", 300, "token_bytes", to="A"), ("piece", 300, "'A'", "base64")),
        (change("vocab", 300, "token_bytes", to=""), ("piece", 300, "base64")),
        (change("vocab", 300, "token_bytes", to="AA=="), ("vocab", "same")),
        (change("vocab", 300, to=[]), ("piece", 300, "[]")),
        (change("vocab", to=7), ("vocab", "list")),
        (change("config", to=7), ("config", "object")),
    ],
)
def test_what_is_wrong_in_a_file_is_named(
    edit: Callable[[dict[str, Any]], None], facts: tuple[object, ...], tmp_path: Path
) -> None:
    document = copy.deepcopy(tiny_tekken("v13"))
    edit(document)
    path = tiny_file(tmp_path, document)
    with pytest.raises(TokenizerError) as caught:
        load_tokenizer(path)
    assert_says(str(caught.value), path, *facts)
    is_unknown = isinstance(caught.value, UnknownTokenizerError)
    assert is_unknown == (facts[0] in ("config.pattern", "config.version"))
