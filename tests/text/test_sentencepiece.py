"""Text and ids: round trips, what never happens, text id by id, and files that are not what they say."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.streams import check_stream, ids_for
from support.tiny_tokenizers import PARAGRAPH, VARIANTS, more_pieces, tiny_tokenizer

from mistral_ref.errors import InputError, MistralRefError, TokenizerError, escaped
from mistral_ref.text import find_tokenizer, load_tokenizer
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.text.sentencepiece_file import MAX_FILE_BYTES, MAX_PIECES, MAX_TEXTS, count_fields

try:
    from mistral_common.tokens.tokenizers import sentencepiece as mistral_common_sentencepiece
except ImportError:
    mistral_common_sentencepiece = None

TOKENIZERS = {variant: SentencePieceTokenizer(tiny_tokenizer(variant)) for variant in VARIANTS}
MISTRAL, VERBATIM = TOKENIZERS["mistral"], TOKENIZERS["verbatim"]
VOCAB_SIZE = MISTRAL.vocab_size

# SentencePiece writes a space as "▁", so that the character itself comes back as a space.
texts = st.text() | st.text(st.sampled_from("ab ▁\n<s>[INST]é🙂☀\0"))
round_trip_texts = texts.map(lambda text: text.replace("▁", ""))


def published_files() -> list[Path]:
    """Return the SentencePiece files that mistral-common carries; skip where it is not installed."""
    if mistral_common_sentencepiece is None:
        pytest.skip("mistral-common is not installed")
    return sorted((Path(mistral_common_sentencepiece.__file__).parents[2] / "data").glob("*.model.*"))


# --- text to ids and back ---------------------------------------------------------------------------------------------


@given(round_trip_texts)
@example("  two spaces  ")
@example(" ")
@example(PARAGRAPH)
def test_text_survives_a_round_trip_where_the_model_does_not_normalize(text: str) -> None:
    for tokenizer in (MISTRAL, VERBATIM):
        assert tokenizer.decode(tokenizer.encode(text, eos=True)) == text


def test_a_space_is_put_before_the_text_where_the_model_was_trained_so() -> None:
    def pieces(tokenizer: SentencePieceTokenizer, text: str) -> str:
        return "".join(map(tokenizer.piece, tokenizer.encode(text)))

    assert pieces(MISTRAL, "she") == "<s>▁she"
    assert pieces(MISTRAL, " she") == "<s>▁▁she"
    assert pieces(VERBATIM, "she") == "<s>she"


@given(texts, st.booleans(), st.booleans())
def test_bos_and_eos_are_where_they_are_asked_for_and_nowhere_else(text: str, bos: bool, eos: bool) -> None:
    for tokenizer in TOKENIZERS.values():
        inner = tokenizer.encode(text, bos=False)
        assert tokenizer.encode(text, bos=bos, eos=eos) == [1] * bos + inner + [2] * eos
        assert not {1, 2} & set(inner)


@given(st.lists(st.sampled_from(["<s>", "</s>", "<unk>", "[INST]", "[/INST]", " ", "hi"])).map("".join))
def test_text_that_spells_control_pieces_is_only_text(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        assert not {1, 2, 3, 4} & set(tokenizer.encode(text, bos=False))


@pytest.mark.parametrize(
    ("text", "found"),
    [("\ud800", r"'\ud800'"), ("ok\udfff", r"'\udfff'"), (b"bytes", "b'bytes'"), (None, "None"), (3, "3")],
)
def test_text_that_is_not_unicode_is_refused(text: str, found: str) -> None:
    with refused(InputError, "text", found):
        MISTRAL.encode(text)


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE, 2**64, True, 1.0, "1", None, np.float32(1), np.True_])
def test_ids_that_are_none_of_the_tokenizers_are_refused(token_id: int) -> None:
    for call in (
        lambda: MISTRAL.decode([5, token_id]),
        lambda: MISTRAL.piece(token_id),
        lambda: MISTRAL.stream([token_id]),
        lambda: MISTRAL.stream().push(token_id),
    ):
        with refused(InputError, "token id", repr(token_id)):
            call()


def test_ids_may_be_of_any_integer_type() -> None:
    ids = MISTRAL.encode(PARAGRAPH)
    assert MISTRAL.decode(np.array(ids, dtype=np.uint16)) == MISTRAL.decode(tuple(ids)) == PARAGRAPH
    assert MISTRAL.piece(np.int64(1)) == "<s>"


def test_piece_names_can_be_printed() -> None:
    for tokenizer in TOKENIZERS.values():
        assert all(tokenizer.piece(token_id).isprintable() for token_id in range(VOCAB_SIZE))
    assert [MISTRAL.byte(token_id) for token_id in (0, 1, 6, 7, 261, 262)] == [None, None, 0, 1, 255, None]


@given(st.text(st.sampled_from("she ran ab 🙂é\n"), max_size=30))
def test_merges_show_how_the_pieces_of_a_word_came_about(text: str) -> None:
    ids = VERBATIM.encode(text)
    for at in range(len(ids)):
        word = VERBATIM.word_of(ids, at)
        assert word in ("", *re.findall("▁?[^▁]+|▁", text.replace(" ", "▁"))) or "▁▁" in word
        if at == 0:
            assert word == ""
        else:
            states = list(VERBATIM.merges(word))
            assert ["".join(state) for state in states] == [escaped(word)] * len(states)
            assert [len(state) for state in states] == list(range(len(word), len(word) - len(states), -1))
            names = [VERBATIM.piece(token_id) for token_id in VERBATIM.encode(word.replace("▁", " "), bos=False)]
            assert VERBATIM.piece(ids[at]) in names
            assert set(states[-1]) >= {name for name in names if not name.startswith("<0x")}


def test_merges_that_do_not_lead_to_the_pieces_are_refused() -> None:
    with refused(InputError, "tokenizer.model", "'ﬁ'"):
        list(TOKENIZERS["default"].merges("ﬁ"))  # this model reads it as two letters


# --- text id by id ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@given(data=st.data())
def test_a_stream_adds_up_to_the_text_of_all_ids(variant: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[variant]
    check_stream(tokenizer, data.draw(ids_for(tokenizer), "context"), data.draw(ids_for(tokenizer), "ids"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stream_holds_back_every_beginning_of_every_character(variant: str) -> None:
    tokenizer = TOKENIZERS[variant]
    of_byte = {tokenizer.byte(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    for leading, second in itertools.product(range(0x80, 0x100), (0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC2)):
        check_stream(tokenizer, [], [of_byte[leading], of_byte[second], of_byte[0xBF], of_byte[0xBF]])


def test_the_spaces_and_the_emoji_of_a_stream() -> None:
    emoji = [MISTRAL.encode("🦉", bos=False)[-4:][n] for n in range(4)]
    stream = MISTRAL.stream()
    assert [stream.push(token_id) for token_id in emoji] == ["", "", "", "🦉"]

    (she,) = MISTRAL.encode("she", bos=False)
    stream = MISTRAL.stream([1])
    assert [stream.push(she), stream.push(1), stream.push(she), stream.flush()] == ["she", "", " she", ""]
    assert MISTRAL.stream([1, she]).push(she) == " she"

    stream = MISTRAL.stream(emoji[:2])
    assert [stream.push(emoji[2]), stream.flush(), stream.flush(), stream.push(she)] == ["", "\ufffd" * 3, "", " she"]


def test_a_push_costs_the_same_however_long_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SentencePieceTokenizer(tiny_tokenizer())
    stream = tokenizer.stream(tokenizer.encode(PARAGRAPH))
    lengths = []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    ids = random.Random(0).choices(range(tokenizer.vocab_size), k=3000) + [1, 2, 3] * 1000
    for token_id in ids:
        stream.push(token_id)
    assert max(lengths) <= 9  # the anchor, four control pieces, a character's bytes and one more


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_names_that_a_tokenizer_is_found_by(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    for other in ("tekken.json.bak", "tokenizer.model.bak", "model.v3", "tokenizer.model.v3.part"):
        (tmp_path / other).touch()
    assert find_tokenizer(str(tmp_path)) is None
    with refused(TokenizerError, tmp_path, "tekken.json", "tokenizer.model"):
        load_tokenizer(tmp_path)

    (tmp_path / "mistral_instruct_tokenizer_241114.model.v7m1").write_bytes(tiny_tokenizer())
    assert load_tokenizer(tmp_path).encode("she") == MISTRAL.encode("she")
    (tmp_path / "tokenizer.model.v3").write_bytes(tiny_tokenizer())
    for call in (find_tokenizer, load_tokenizer):
        with refused(
            TokenizerError, tmp_path, "mistral_instruct_tokenizer_241114.model.v7m1", "tokenizer.model.v3", "several"
        ):
            call(tmp_path)
    (tmp_path / "tokenizer.model").symlink_to(tmp_path / "tokenizer.model.v3")
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.json").write_text("{")
    assert load_tokenizer(tmp_path).vocab_size == load_tokenizer(tmp_path / "tokenizer.model.v3").vocab_size


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "facts"),
    [
        (lambda path: None, ("no such file",)),
        (lambda path: path.symlink_to("nowhere"), ("no such file",)),
        (lambda path: path.symlink_to(path), ("no such file",)),
        (make_fifo, ("regular",)),
        (lambda path: path.symlink_to("/dev/zero"), ("regular",)),
        (Path.mkdir, ("tokenizer.model",)),
        (make_huge, ("larger", MAX_FILE_BYTES)),
        (Path.touch, ("SentencePiece model", "unk")),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), ("pointer", "git lfs pull")),
        (lambda path: path.write_text("version of a text\n"), ("SentencePiece model", "type 6")),
        (lambda path: path.write_bytes(tiny_tokenizer()[:-100]), ("SentencePiece model", "field")),
        (lambda path: path.write_bytes(tiny_tokenizer().replace(b"\n\x03<s>", b"\n\x03<t>")), ("id", -1, 2, "two")),
    ],
)
def test_what_is_not_a_model_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], object], facts: tuple[object, ...]
) -> None:
    path = tmp_path / "tokenizer.model"
    make(path)
    start = time.perf_counter()
    with refused(TokenizerError, path, *facts):
        load_tokenizer(path)
    assert time.perf_counter() - start < 1


def test_pieces_are_counted_and_not_the_bytes_of_their_scores(tmp_path: Path) -> None:
    """As many as SentencePiece finds; the first ones' scores are made of bytes that also stand before each piece."""
    n_pieces, n_texts = count_fields(tiny_tokenizer())
    assert n_pieces == MISTRAL.n_pieces
    assert 0 < n_texts < 100  # symbols that the trainer was given, and its settings
    content = b"\x0a\x01a\x15" + b"\x0a" * 4  # field 1, a text; field 2, a float
    piece = b"\x0a" + bytes([len(content)]) + content
    assert count_fields(piece * 50) == (50, 0)
    path = tmp_path / "tokenizer.model"
    for field, n, facts in (
        (piece, MAX_PIECES + 1, (MAX_PIECES, "pieces")),
        (b"\x12\x00", MAX_TEXTS + 1, (MAX_TEXTS, "texts")),
        (piece, 1, ("SentencePiece model",)),
    ):
        path.write_bytes(field * n)
        with refused(TokenizerError, path, *facts):
            load_tokenizer(path)


def test_a_vocabulary_may_be_as_large_as_the_largest_published(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tiny_tokenizer() + more_pieces(MAX_PIECES - MISTRAL.n_pieces))
    started = time.thread_time()
    tokenizer = load_tokenizer(path)
    assert time.thread_time() - started < 3
    assert tokenizer.n_pieces == MAX_PIECES
    assert tokenizer.decode([*tokenizer.encode("she"), MAX_PIECES - 1]) == f"she{MAX_PIECES - MISTRAL.n_pieces - 1:07x}"


def test_a_directory_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "absent", tmp_path / "absent"), ("nul\0byte", r"nul\x00byte")):
        for call, problem in ((find_tokenizer, "listed"), (load_tokenizer, "no such file")):
            with refused(TokenizerError, said, problem):
                call(path)


def hammer() -> None:
    """Load damaged models and use those that load; whatever is wrong with them is a MistralRefError, and soon."""
    rng = random.Random(0)
    for variant, whole in itertools.product(("mistral", "default"), range(400)):
        model = bytearray(tiny_tokenizer(variant))
        # The settings lie at the end, behind the pieces (and in one variant behind a long table of characters).
        begin = rng.choice([0, len(model) - 120])
        if whole % 3:
            for _ in range(rng.choice([1, 2, 8])):
                model[rng.randrange(begin, len(model))] = rng.choice([0, 1, 2, 127, 255, rng.randrange(256)])
        else:
            del model[rng.randrange(begin, len(model)) :]
        start = time.perf_counter()
        try:
            tokenizer = SentencePieceTokenizer(bytes(model))
            tokenizer.encode(PARAGRAPH[:200] + "<s> \0ﬁ\u0301")
            check_stream(tokenizer, [1], rng.choices(range(tokenizer.vocab_size), k=8))
        except MistralRefError as error:
            if "\n" in str(error):
                raise
        assert time.perf_counter() - start < 1
    print("survived")


def test_no_damaged_model_ends_the_process() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(
        [sys.executable, __file__], check=False, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (0, "survived\n"), ended.stderr


# --- other people's files ---------------------------------------------------------------------------------------------


def test_ids_are_those_of_mistral_common() -> None:
    for path in published_files():
        ours, theirs = load_tokenizer(path), mistral_common_sentencepiece.SentencePieceTokenizer(path)
        assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.n_words, theirs.bos_id, theirs.eos_id)
        for text in ("", "Hello", " Hello", "<s>[INST] hi [/INST]</s>", "a\n\n  b\t", "日本語 🙂 é", PARAGRAPH):
            ids = ours.encode(text, bos=True, eos=True)
            assert ids == theirs.encode(text, bos=True, eos=True)
            assert ours.decode(ids) == theirs.decode(ids) == text


def test_streams_of_published_tokenizers_add_up() -> None:
    for path in published_files():
        tokenizer = load_tokenizer(path)

        any_ids = ids_for(tokenizer)
        settings(max_examples=30)(given(st.just(tokenizer), any_ids, any_ids)(check_stream))()
        check_stream(tokenizer, [], tokenizer.encode(PARAGRAPH))


def test_the_text_of_a_trained_model(shared_data: Path) -> None:
    tokenizer = load_tokenizer(shared_data / "stories260K-consolidated")
    golden = json.loads((shared_data / "stories260K-greedy.json").read_text())
    prompt_ids = tokenizer.encode(golden["prompt"])
    assert prompt_ids == golden["prompt_ids"]
    assert tokenizer.decode(golden["ids"]) == golden["text"]
    check_stream(tokenizer, prompt_ids, golden["ids"][len(prompt_ids) :])


@pytest.mark.parametrize(
    ("config", "begins"),
    [
        ({}, [1]),
        ({"add_bos_token": True}, [1]),
        ({"add_bos_token": None, "bos_token": "<s>"}, [1]),
        ({"add_bos_token": False}, []),
        ({"add_bos_token": False, "bos_token": "<s>"}, []),
        ({"bos_token": {"content": "</s>"}}, [2]),
    ],
    ids=str,
)
def test_files_beside_a_tokenizer_say_whether_texts_begin_with_bos(
    config: dict[str, object], begins: list[int], tmp_path: Path
) -> None:
    """As in transformers, which reads both beside tokenizer.model; if they say nothing, as in mistral-common."""
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("A mill") == begins + MISTRAL.encode("A mill", bos=False)
    assert tokenizer.bos_id == (begins[0] if begins else None)
    assert tokenizer.decode([1, *tokenizer.encode("A mill")]) == "A mill"


if __name__ == "__main__":
    hammer()
