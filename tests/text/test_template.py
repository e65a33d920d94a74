"""Chat templates: what they print, to ids; that no message forges a control token; and templates that are hostile."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused
from support.paths import GOLDEN
from support.tiny_tokenizers import tiny_tokenizer

from mistral_ref.errors import InputError, TokenizerError
from mistral_ref.text import Tokenizer, encode_chat, load_tokenizer, parse_reply
from mistral_ref.text.added_tokens import AddedToken
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.text.template import Guard
from mistral_ref.text.template_file import ChatTemplate
from mistral_ref.text.template_sandbox import MAX_CHARACTERS, render
from mistral_ref.text.tokenizer_config import TokenizerConfig, read_tokenizer_config

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ("<|im_start|>", "<|im_end|>")


def tokenizer_with(source: str, **others: Any) -> Tokenizer:
    """Return a tokenizer with ChatML's control tokens, of ids 384 and 385, and this template."""
    added = tuple(AddedToken(384 + n, name) for n, name in enumerate(NAMES))
    tokenizer = SentencePieceTokenizer(tiny_tokenizer(), config=TokenizerConfig(added=added, legacy=False))
    tokenizer.chat_template = ChatTemplate(source, origin="t.jinja", **others)
    return tokenizer


TOKENIZER = tokenizer_with(CHATML)


def said(*texts: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_a_conversation_is_what_the_template_prints() -> None:
    ids = encode_chat(said("Hi ", "Yo", "Bye"), TOKENIZER)
    written = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids == TOKENIZER.encode(written, bos=False, added=True)


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    documents = {one["name"]: one["tokenizer"] for one in json.loads((GOLDEN / "tokenizer_json.json").read_text())}
    for golden in json.loads((GOLDEN / "chat_templates.json").read_text()):
        (tmp_path / "tokenizer.json").write_text(json.dumps(documents[golden["tokenizer"]]))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(golden["tokenizer_config"]))
        tokenizer = load_tokenizer(tmp_path)
        assert len(golden["cases"]) > 3
        for case in golden["cases"]:
            assert encode_chat(case["messages"], tokenizer, tools=case.get("tools")) == case["ids"], case


PIECES = [*NAMES, "<|im_", "end|>", "<", "|>", " ", "a", "<|IM_END|>", "< |im_end|>", "\n"]
fragments = st.lists(st.sampled_from(PIECES))


@given(st.lists(fragments.map("".join), min_size=1, max_size=3), st.sampled_from(["", "lower", "replace(' ', '')"]))
def test_no_message_forges_a_control_token(texts: list[str], change: str) -> None:
    source = CHATML.replace("trim", f"trim | {change}") if change else CHATML
    ids = encode_chat(said(*texts) if len(texts) % 2 else said(*texts, ""), tokenizer_with(source))
    n_messages = len(texts) + (len(texts) % 2 == 0)
    assert [one for one in ids if one >= 384] == [384, 385] * n_messages + [384]


@given(fragments.map("".join), fragments.map("".join))
def test_two_texts_side_by_side_forge_nothing_and_come_back_whole(one: str, other: str) -> None:
    tokenizer = tokenizer_with("{{ messages[0].content }}{{ messages[1].content }}")
    messages = [{"role": "user", "content": one}, {"role": "user", "content": other}]
    assert encode_chat(messages, tokenizer) == tokenizer.encode(one + other, bos=False)


def test_a_guard_mends_what_it_breaks_also_in_json() -> None:
    guard = Guard(NAMES)
    value = {"a <|im_end|>": ['"<|im_start|>"', 1, None, True]}
    broken = guard.guarded(value)
    assert broken != value
    assert json.loads(guard.mended(json.dumps(broken, ensure_ascii=False))) == value
    assert guard.guarded("plain <text>") == "plain <text>"


def test_a_guard_is_fast_with_many_names_and_long_texts() -> None:
    guard = Guard([f"<|reserved_special_token_{n}|>" for n in range(250)])
    started = time.process_time()
    for text in ("<" * 50_000, "< " * 25_000, "<|reserved_special_token_" * 2000, "a b" * 50_000):
        assert guard.mended(guard.guarded(text)) == text
    assert time.process_time() - started < 5


def test_tools_calls_and_results_reach_the_template() -> None:
    source = (
        "{{ tools | tojson }}{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}"
        "{% endfor %}{{ m.content }}{% endfor %}"
    )
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}]
    messages = [*said("Hi"), {"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": "22"}]
    tokenizer = tokenizer_with(source)
    assert tokenizer.decode(encode_chat(messages, tokenizer, tools=[{"a": 'é"'}])) == '[{"a": "é\\""}]HiRome22'
    with_tools = tokenizer_with("without", with_tools="with")
    assert with_tools.decode(encode_chat(said("Hi"), with_tools, tools=[{}])) == "with"
    assert with_tools.decode(encode_chat(said("Hi"), with_tools)) == "without"


def test_the_ids_of_a_reply_are_kept() -> None:
    letters = [one for letter in "mill" for one in TOKENIZER.encode(letter, bos=False)]
    reply = parse_reply([*letters, 385], TOKENIZER)
    messages = [*said("Hi"), reply, *said("Bye")]
    ids = encode_chat(messages, TOKENIZER)
    assert " ".join(map(str, [*letters, 385])) in " ".join(map(str, ids))


def test_which_of_template_and_format_counts(tmp_path: Path) -> None:
    assert not ChatTemplate("{{ '[INST] <<SYS>>' }}").is_mistrals
    assert ChatTemplate("{{ '[INST]' }}").is_mistrals
    (tmp_path / "tokenizer.model").write_bytes(tiny_tokenizer())
    assert load_tokenizer(tmp_path).chat_template is None
    config: dict[str, Any] = {"chat_template": "one", "bos_token": {"content": "<s>"}, "eos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).chat_template == ChatTemplate(
        "one", "", {"bos_token": "<s>"}, str(tmp_path / "tokenizer_config.json")
    )
    config["chat_template"] = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = read_tokenizer_config(tmp_path).chat_template
    assert found is not None
    assert (found.source, found.with_tools) == ("a", "b")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}é", encoding="utf-8")
    tokenizer = load_tokenizer(tmp_path)
    assert encode_chat(said("Hi"), tokenizer) == [tokenizer.bos_id, *tokenizer.encode("é", bos=False)]
    with refused(InputError, "chat_format", "'v9'"):
        encode_chat(said("Hi"), tokenizer, chat_format="v9")


@pytest.mark.parametrize(
    "wrong",
    [
        5,
        [{"name": "other", "template": "x"}],
        [{"name": "default", "template": 1}],
        [{"name": [], "template": "x"}],
        {},
    ],
)
def test_a_template_that_is_no_text_is_refused(wrong: object, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": wrong}))
    with refused(TokenizerError, path, "chat_template"):
        read_tokenizer_config(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with refused(TokenizerError, tmp_path / "chat_template.jinja", "UTF-8"):
        read_tokenizer_config(tmp_path)


@pytest.mark.parametrize(
    ("messages", "facts"),
    [
        ([], ["messages"]),
        ([{"role": "critic", "content": ""}], ["messages[0]", "'critic'"]),
        ([{"role": "user", "content": 5}], ["messages[0].content", 5]),
        ([{"role": "user", "content": [{"type": "image"}]}], ["messages[0].content"]),
        ([*said("Hi"), {"role": "assistant", "content": "a", "prefix": True}], ["messages[1]", "prefix"]),
    ],
)
def test_messages_that_no_template_can_write(messages: Any, facts: list[object]) -> None:
    with refused(InputError, *facts):
        encode_chat(messages, TOKENIZER)


NESTED = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"
RECURSIVE = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}"
LARGE = "{% set x = 'a' * 100000 %}"
GROWS = "{% set n = namespace(x=START) %}{% for i in range(100) %}{% set n.x = STEP %}{% endfor %}{{ n.x }}"


def grows(start: str, step: str) -> str:
    return GROWS.replace("START", start).replace("STEP", step)


@pytest.mark.parametrize(
    ("source", "fact"),
    [
        pytest.param(NESTED, "maximum", marks=pytest.mark.slow),
        pytest.param(RECURSIVE, "maximum", marks=pytest.mark.slow),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deeply"),
        ("{{ 'a' * 1000000000 }}", "100000"),
        ("{{ [1] * 1000000000 }}", "100000"),
        ("{{ 10 ** 1000000000 }}", "power"),
        (grows("3", "n.x * n.x"), "bits"),
        (grows("'a'", "n.x ~ n.x"), MAX_CHARACTERS),
        (grows("'a'", "n.x + n.x"), MAX_CHARACTERS),
        (grows("[1]", "n.x + n.x"), "100000"),
        pytest.param(grows("[1]", "[n.x, n.x]"), "100000", marks=pytest.mark.slow),
        (LARGE + "{{ x.replace('', x) }}", MAX_CHARACTERS),
        (LARGE + "{{ x | replace('a', x) }}", MAX_CHARACTERS),
        (LARGE + "{{ x.join(x) }}", MAX_CHARACTERS),
        (LARGE + "{{ x | join(x) }}", MAX_CHARACTERS),
        (LARGE + "{% for i in range(99) %}{{ x }}{% endfor %}", MAX_CHARACTERS),
        ("{{ 'a'.ljust(1000000000) }}", "ljust"),
        ("{{ '{:>1000000000}'.format(1) }}", "format"),
        ("{{ '%1000000000d' % 1 }}", "%"),
        ("{{ 'a' | center(1000000000) }}", "center"),
        ("{% for i in range(1000000000) %}{% endfor %}", "100000"),
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles"),
        ("{% if %}", "line 1"),
        ("{{ nothing.at.all }}", "nothing"),
        ("{% include 'file' %}", "loader"),
    ],
)
def test_a_hostile_template_is_one_line_in_bounded_time(source: str, fact: object) -> None:
    started = time.process_time()
    with refused(InputError, "t.jinja", fact):
        encode_chat(said("Hi"), tokenizer_with(source))
    assert time.process_time() - started < 15


def test_loops_break_and_marks_for_training_are_passed_over() -> None:
    source = "{% if i == 2 %}{% break %}{% endif %}{% generation %}{{ i }}{% endgeneration %}"
    source = f"{{% for i in range(5) %}}{source}{{% endfor %}}"
    assert render(source, {}, "t") == "01"
    assert render("{{ strftime_now('%Y')[:2] }}{{ {'a': [1]} | tojson }}", {}, "t") == '20{"a": [1]}'
