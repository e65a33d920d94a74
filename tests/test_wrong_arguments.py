"""Arguments of a wrong type: one line says what was found and what was expected, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.errors import refused
from support.tiny import SMALL, model_of
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref import CacheError, InputError, Model, Trace
from mistral_ref.conversation import Conversation
from mistral_ref.text import encode_chat, parse_reply
from mistral_ref.text.sentencepiece import SentencePieceTokenizer

Case = tuple[Callable[[Any], object], tuple[object, ...]]
PATHS: list[Callable[[Any, Any], object]] = [
    lambda model, path: mistral_ref.load(path),
    lambda model, path: mistral_ref.quantize(path, "x"),
    lambda model, path: model.load_cache(path),
    lambda model, path: model.new_cache().save(path),
    lambda model, path: Trace.load(path),
    lambda model, path: model.trace([1]).save(path),
]
CASES: list[Case] = [
    (lambda model: mistral_ref.load(progress=5), ("progress", 5)),
    (lambda model: mistral_ref.load(on_compile=5), ("on_compile", 5)),
    (lambda model: mistral_ref.load(adapters=5, backend="numpy"), ("adapters", 5)),
    (lambda model: model.generate([1], follows=5), ("follows", 5)),
    (lambda model: model.generate([1], follows="a"), ("follows", "'a'")),
    (lambda model: model.generate([1], follows=[-1]), ("follows", -1)),
    (lambda model: model.generate([1], stop="\ud800"), (r"\ud800",)),
    (lambda model: model.piece("a"), ("'a'",)),
    (lambda model: model.tokenizer.decode(5), (5,)),
    (lambda model: model.trace([1]).compare(5), (5, "Trace")),
    (lambda model: model.trace([1]).compare(model.trace([1]), bound="a"), ("bound", "'a'")),
    (lambda model: model.generate([1], prompt_cache=5), ("prompt_cache", 5)),
    (lambda model: mistral_ref.load(""), ("''",)),
    (lambda model: mistral_ref.load("demo"), ("demo", "without a path")),
    (lambda model: Conversation(model, top_pp=1), ("'top_pp'", "top_p")),
    (lambda model: parse_reply("12", model.tokenizer), ("'1'",)),
    (lambda model: parse_reply(5, model.tokenizer), (5,)),
    (lambda model: parse_reply([1], None), ("tokenizer",)),
    (lambda model: encode_chat([{"role": "user", "content": "Hi"}], None), ("tokenizer",)),
]


@pytest.fixture(scope="module")
def model() -> Model:
    model = model_of(SMALL.replace(vocab_size=384))
    model.tokenizer = SentencePieceTokenizer(tiny_tokenizer(), "tiny")
    return model


@pytest.mark.parametrize("path", [5, None, b"x", ["x"]], ids=repr)
@pytest.mark.parametrize("call", PATHS)
def test_what_is_no_path(call: Callable[[Any, Any], object], path: object, model: Model) -> None:
    if path is not None or call is not PATHS[0]:  # None is the demonstration model
        with refused(InputError, path, "path"):
            call(model, path)


@pytest.mark.parametrize(("call", "facts"), CASES)
def test_other_arguments(call: Callable[[Any], object], facts: tuple[object, ...], model: Model) -> None:
    with refused(InputError, *facts):
        call(model)


def test_a_cache_that_is_not_there(model: Model, tmp_path: Path) -> None:
    with refused(CacheError, tmp_path / "no", "No such file") as caught:
        model.load_cache(tmp_path / "no")
    assert "damaged" not in str(caught.value)
