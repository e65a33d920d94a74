"""Stepper: moving both ways, edits that stay, and the cache left as it was."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FAMILIES
from support.errors import refused
from support.tiny import BACKENDS, configs, model_of, tokens_for

from mistral_ref import InputError
from mistral_ref.config import ModelConfig
from mistral_ref.errors import short_repr
from mistral_ref.study.stepper import Stepper


def small_stepper(family: str = "dense_windowed", backend: str = "numpy", n_tokens: int = 6) -> Stepper:
    model = model_of(FAMILIES[family].config, backend=backend)
    return Stepper(model, tokens_for(model.config, n_tokens))


@settings(max_examples=25)
@given(configs(), st.data())
def test_any_way_to_a_step_shows_the_same_value(config: ModelConfig, data: st.DataObject) -> None:
    model, tokens = model_of(config), tokens_for(config, 5)
    values = {step.name: step.value for step in model.steps(tokens)}
    stepper = Stepper(model, tokens)
    for index in data.draw(st.lists(st.integers(-2, len(stepper.names) + 2), min_size=1, max_size=6)):
        step = stepper.go(index)
        assert stepper.index == min(max(index, 0), len(values) - 1)
        assert step is stepper.step
        assert step.name == stepper.names[stepper.index]
        np.testing.assert_array_equal(step.value, values[step.name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_stepping_with_nothing_edited_gives_the_logits_of_running(backend: str) -> None:
    stepper = small_stepper(backend=backend)
    plain = stepper.model.forward(stepper.tokens)
    for index in range(len(stepper.names)):
        stepper.go(index)
    np.testing.assert_array_equal(stepper.step.value, plain)
    np.testing.assert_array_equal(stepper.logits(), plain)
    assert stepper.compare().verdict().startswith("all ")


def test_edits_stay_while_one_moves_and_go_when_they_are_undone() -> None:
    stepper = small_stepper()
    plain = stepper.logits()
    stepper.go(stepper.find("layers.1.heads"))

    def without_head_0(heads_THK: np.ndarray) -> np.ndarray:
        heads_THK[:, 0] = 0
        return heads_THK

    before = stepper.step.value
    stepper.edit("zero head 0", without_head_0)
    stepper.edit("double", lambda value: value * 2)
    expected = np.concatenate([np.zeros_like(before[:, :1]), 2 * before[:, 1:]], axis=1)
    for index in (stepper.index, stepper.index + 3, 0, stepper.index):
        stepper.go(index)
    np.testing.assert_array_equal(stepper.step.value, expected)
    edited = stepper.model.forward(stepper.tokens, edits={"layers.1.heads": expected})
    np.testing.assert_array_equal(stepper.logits(), edited)
    np.testing.assert_array_equal(stepper.logits(edited=False), plain)
    assert stepper.compare().first.name == "layers.1.heads"
    np.testing.assert_array_equal(stepper.trace(["logits"])["logits"], edited)
    assert [stepper.undo().description for _ in range(2)] == ["double", "zero head 0"]
    np.testing.assert_array_equal(stepper.step.value, before)
    np.testing.assert_array_equal(stepper.logits(), plain)
    with refused(InputError, "nothing", "edited"):
        stepper.undo()


def test_an_edit_that_does_not_fit_is_not_kept() -> None:
    stepper = small_stepper()
    with refused(InputError, stepper.step.name, "float32", (1, 40), (6, 40)):
        stepper.edit("cut", lambda value: value[:1])
    assert not stepper.edits


def test_over_a_cache_nothing_counts() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)  # a window of 5
    tokens = tokens_for(model.config, 23)
    cache = model.new_cache(chunk=3)
    model.forward(tokens[:20], cache)
    stepper = Stepper(model, tokens[20:], cache)
    stepper.go(len(stepper.names))
    np.testing.assert_allclose(stepper.step.value, model.forward(tokens)[20:], atol=1e-5)
    stepper.go(stepper.find("layers.0.ffn_out"))
    stepper.edit("zero", np.zeros_like)
    assert stepper.compare().first.name == "layers.0.ffn_out"
    stepper.trace(["logits"])
    stepper.logits()
    assert cache.length == 20
    np.testing.assert_allclose(model.forward(tokens[20:], cache), model.forward(tokens)[20:], atol=1e-5)


def test_find_knows_full_names_short_ones_layers_and_globs() -> None:
    stepper = small_stepper()
    found = [stepper.names[stepper.find(text)] for text in ("logits", "q", "1", "layers.*.gate", "norm")]
    assert found == ["logits", "layers.0.q", "layers.1.attention_norm", "layers.0.gate", "norm"]
    stepper.go(stepper.names.index("layers.1.up"))
    found = [stepper.names[stepper.find(text)] for text in ("q", "layers.*.gate", "0", "heads", "embedding", "ff*")]
    assert found == [
        "layers.1.q", "layers.2.gate", "layers.0.attention_norm", "layers.1.heads", "embedding", "layers.1.ffn_hidden"
    ]  # fmt: skip
    for text in ("", "qq", "99", "layers.9.q"):
        with refused(InputError, "step", repr(text)):
            stepper.find(text)


def test_an_interrupt_leaves_one_where_one_was(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = small_stepper()
    stepper.go(2)
    swiglu, calls = stepper.model.ops.swiglu, []

    def interrupted(*args: np.ndarray) -> np.ndarray:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return swiglu(*args)

    monkeypatch.setattr(stepper.model.ops, "swiglu", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stepper.go(len(stepper.names))
    assert (stepper.index, stepper.step.name) == (2, "layers.0.q")
    monkeypatch.undo()
    np.testing.assert_array_equal(stepper.go(len(stepper.names)).value, stepper.model.forward(stepper.tokens))


def test_an_interrupted_undo_undoes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper = small_stepper()
    stepper.edit("zero", np.zeros_like)

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stepper, "_new_walk", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stepper.undo()
    monkeypatch.undo()
    assert [edit.description for edit in stepper.edits] == ["zero"]
    assert not stepper.step.value.any()
    assert stepper.undo().description == "zero"
    assert stepper.step.value.any()


def test_what_may_have_been_meant_by_a_name() -> None:
    stepper = small_stepper()
    for text, hint in {
        "layers.9.q": "0 to 2",
        "99": "0 to 2",
        "99999999999999": "0 to 2",
        "q_rotatd": "'q_rotated'",
        "layers.1.hedas": "'layers.1.heads'",
        "Logits": "'logits'",
        "": "logits",
        "x" * 10000: "logits",
    }.items():
        with refused(InputError, "step", short_repr(text), hint):
            stepper.find(text)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_goes_on_with_the_edits_made_in_every_pass(backend: str) -> None:
    stepper = small_stepper(backend=backend)
    plain = [token.id for token in stepper.model.generate(stepper.tokens, max_tokens=4)]
    assert list(stepper.continuation(4)) == list(stepper.continuation(4, edited=False)) == [f"[{i}]" for i in plain]
    stepper.go(stepper.find("layers.0.ffn_out"))

    def first_two_changed(value: np.ndarray) -> np.ndarray:
        value[:2] = 5
        return value

    stepper.edit("set 5 token 0:2", first_two_changed)
    tokens = list(stepper.tokens)
    for _ in range(4):
        logits = stepper.model.forward(tokens, edits={"layers.0.ffn_out": lambda x: first_two_changed(x.copy())})
        tokens.append(int(logits[-1].argmax()))
    assert list(stepper.continuation(4)) == [f"[{token}]" for token in tokens[-4:]]
    assert list(stepper.continuation(4, edited=False)) == [f"[{i}]" for i in plain]
    stepper.model.eos_ids = frozenset(tokens[-4:-3])
    assert list(stepper.continuation(4)) == []
    for n in (0, -1, 2.0):
        with refused(InputError, "n", repr(n), "whole number", 1):
            list(stepper.continuation(n))


def test_edits_that_do_not_fit_a_longer_pass_are_one_line() -> None:
    for wrong in (lambda x: x + np.ones((6, 1), x.dtype), lambda x: x[:6], lambda x: x if len(x) < 7 else x[7]):
        stepper = small_stepper()
        stepper.edit("wrong", wrong)
        with refused(InputError, "edits", "6 tokens") as error:
            list(stepper.continuation(4))
        assert re.search(r"\b[78]\b", str(error.value))
    stepper = small_stepper()
    stepper.edit("nan", lambda x: x * np.float32("nan"))
    with refused(InputError, "logits", "NaN"):
        list(stepper.continuation(1))
    model = stepper.model
    cache = model.new_cache()
    model.forward(stepper.tokens, cache)
    with refused(InputError, "cache"):
        list(Stepper(model, [1], cache).continuation(1))


def test_progress_counts_steps() -> None:
    stepper, seen = small_stepper(), []
    stepper.go(3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 4), (3, 4), (4, 4)]
