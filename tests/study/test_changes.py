"""Changes as plain data: each against the same change by hand, as dicts and back, as Python, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.tiny import BACKENDS, MIXTURE, SMALL, chunkings, configs, model_of, tokens_for

import mistral_ref
from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError
from mistral_ref.model import Model
from mistral_ref.steps import axis_sizes, step_names
from mistral_ref.study.broken import broken, possible_bugs
from mistral_ref.study.changes import (
    KINDS,
    Add,
    Change,
    ChangeError,
    Freeze,
    Mean,
    Patch,
    PlantedBug,
    Scale,
    Set,
    Swap,
    Theta,
    Window,
    Zero,
    apply,
    from_dict,
    from_dicts,
    python_source,
    with_config,
)
from mistral_ref.study.edited import edited

TOKENS, OTHER = tokens_for(SMALL, 6), tokens_for(SMALL, 6, seed=1)
PART = np.index_exp[:, 1]  # head 1 of a step (token, head, head_dim)
NAME = "layers.1.heads"


def by_hand(change: Change, value: np.ndarray, other: np.ndarray, plain: np.ndarray) -> None:
    """Make a change of NAME (token, head, head_dim), as one would write it; `other` and `plain` are of other passes."""
    match change:
        case Zero():
            value[:, 1] = 0
        case Scale():
            value[2] = value[2] * np.float32(0.3)
        case Set():
            value[..., -1] = -7
        case Add():
            value[5, 0, 2] += np.float32(0.1)
        case Mean():
            value[4, 1] = sum(plain[token, 1].astype(float) for token in range(6)) / 6
        case Swap(head=None):
            value[[1, 4]] = value[[4, 1]]
        case Swap():
            value[[1, 4], 3] = value[[4, 1], 3]
        case Patch(head=None):
            value[:] = other
        case Patch():
            value[:, 1] = other[:, 1]
        case Freeze():
            value[3] = plain[3]


OF_STEPS = [
    Zero(NAME, head=1), Scale(NAME, 0.3, token=2), Set(NAME, -7, neuron=-1), Add(NAME, 0.1, token=-1, head=0, neuron=2),
    Swap(NAME, 4, token=1), Swap(NAME, 4, token=1, head=3), Freeze(NAME, token=3),
    Mean(NAME, token=4, head=1), Patch(NAME, tuple(OTHER)), Patch(NAME, tuple(OTHER), head=1),
]  # fmt: skip


def logits_of(model: Model, changes: list[Change], tokens: list[int] = TOKENS) -> np.ndarray:
    """Return the logits of a pass with these changes."""
    changed, edits = apply(model, TOKENS, changes)
    return changed.forward(tokens, edits=edits)


@st.composite
def step_changes(draw: st.DrawFn, config: ModelConfig, n_tokens: int, end: str = "") -> Change:
    """Draw a change of a step that fits a model; the step's name has this end."""
    name = draw(st.sampled_from([name for name in step_names(config) if name.endswith(end)]))
    sizes = axis_sizes(config, name, n_tokens)
    axes = {"token": ("token", "query"), "head": ("head", "kv_head"), "neuron": tuple(sizes)[-1:]}
    most = {word: sizes[axis] for word, both in axes.items() for axis in both if axis in sizes}
    places = {word: draw(st.integers(-size, size - 1)) for word, size in most.items() if draw(st.booleans())}
    number, token = draw(st.floats(-2, 2)), draw(st.integers(-n_tokens, n_tokens - 1))
    other = draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=n_tokens, max_size=n_tokens))
    made = [Zero(name, **places), Scale(name, number, **places), Set(name, number, **places), Add(name, 1, **places)]
    if "token" in sizes:
        made.append(Mean(name, **places))
    if "pair" not in sizes:
        made += [Patch(name, tuple(other), **places), Freeze(name, **places)]
    if "token" in places:
        made.append(Swap(name, token, **places))
    return draw(st.sampled_from(made))


def model_changes(model: Model) -> st.SearchStrategy[Change]:
    """Draw a change of a model."""
    bugs = sorted({*possible_bugs(model)} - {"bos-twice"})  # with one token more, numbers of tokens mean others
    windows, thetas = st.builds(Window, st.none() | st.integers(1, 9)), st.builds(Theta, st.floats(2, 1e6))
    return windows | thetas | st.sampled_from(bugs).map(PlantedBug)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", OF_STEPS, ids=str)
def test_a_change_of_a_step_is_what_one_would_write_by_hand(change: Change, backend: str) -> None:
    model = model_of(SMALL, backend=backend)
    other, plain = (model.trace(ids, keep=NAME)[NAME] for ids in (OTHER, TOKENS))

    def edit(value: np.ndarray) -> np.ndarray:
        value = value.copy()
        by_hand(change, value, other, plain)
        return value

    doubled = Scale("layers.0.ffn_out", 2)  # so that a frozen value is not the present one
    edits = {"layers.0.ffn_out": lambda value: value * np.float32(2), NAME: edit}
    found = logits_of(model, [doubled, change])
    np.testing.assert_array_equal(found, model.forward(TOKENS, edits=edits))
    assert not np.array_equal(found, logits_of(model, [doubled]))


def test_changes_of_one_step_are_made_in_their_order() -> None:
    model, name = model_of(SMALL), "layers.1.ffn_out"
    first, second, third = Set(name, 2), Add("layers.*.ffn_out", 1), Scale(name, 3)
    for changes, result in (([first, second, third], 9), ([third, first, second], 3), ([second, third, first], 2)):
        trace = model.trace(TOKENS, keep=name, edits=apply(model, TOKENS, changes).edits)
        assert (trace[name] == result).all()


@pytest.mark.parametrize("name", ["scores", "attention_weights"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inside_attention_a_token_is_a_query_and_a_neuron_a_key(name: str, backend: str) -> None:
    model = model_of(SMALL, backend=backend)
    _, edits = apply(model, TOKENS, [Set(f"layers.0.{name}", 9, head=2, token=-1, neuron=3)])
    name = f"layers.0.{name}"
    found, plain = (model.trace(TOKENS, keep=name, edits=chosen)[name] for chosen in (edits, ()))
    assert found[2, 5, 3] == 9
    assert (found != plain).sum() == 1


def test_frozen_attention_weights_undo_what_comes_before() -> None:
    model = model_of(SMALL)
    halved = Scale("layers.1.q", 0.5)
    frozen = apply(model, TOKENS, [halved, Freeze("layers.1.attention_weights"), Freeze("layers.1.v")]).edits
    heads = [model.trace(TOKENS, keep="layers.1.heads", edits=edits)["layers.1.heads"] for edits in (frozen, ())]
    np.testing.assert_array_equal(*heads)


def test_changes_of_the_model() -> None:
    model = model_of(SMALL)
    for changes, expected in (
        ([Window(2)], model_of(SMALL.replace(sliding_window=(2,) * SMALL.n_layers))),
        ([Window(2), Window(None)], model_of(SMALL.replace(sliding_window=(None,) * SMALL.n_layers))),
        ([Theta(123)], model_of(SMALL.replace(rope_theta=123.0))),
        ([PlantedBug("tiled-heads")], broken(model, "tiled-heads")),
        ([PlantedBug("extra-key"), Window(2)], broken(with_config(model, sliding_window=(2,) * 3), "extra-key")),
        ([PlantedBug("eps-outside"), PlantedBug("not-causal")], broken(model, "eps-outside", "not-causal")),
    ):
        zero = Zero("layers.0.heads", head=1)
        found = logits_of(model, [zero, *changes])
        np.testing.assert_array_equal(found, expected.forward(TOKENS, edits=apply(model, TOKENS, [zero]).edits))
        assert not np.array_equal(found, logits_of(model, [zero]))
    assert apply(model, TOKENS, []) == (model, [])


def test_what_comes_from_another_pass_comes_from_the_model_without_changes() -> None:
    model, name = model_of(SMALL), "layers.2.ffn_out"
    changes = [Window(1), PlantedBug("eps-outside"), Zero(name), Patch(name, OTHER, token=1), Freeze(name, token=2)]
    changed, edits = apply(model, TOKENS, changes)
    found = changed.trace(TOKENS, keep=name, edits=edits)[name]
    np.testing.assert_array_equal(found[1], model.trace(OTHER, keep=name)[name][1])
    np.testing.assert_array_equal(found[2], model.trace(TOKENS, keep=name)[name][2])
    assert not found[[0, 3, 4, 5]].any()


def test_a_longer_pass_keeps_the_changes_of_the_prompts_tokens() -> None:
    model, longer = model_of(SMALL), [*TOKENS, 3, 4]
    for name in ("layers.1.heads", "layers.1.attention_weights"):
        _, edits = apply(model, TOKENS, [Patch(name, OTHER), Zero(name, head=1, token=-1)])
        found, plain = (model.trace(longer, keep=name, edits=e)[name] for e in (edits, ()))
        other = model.trace(OTHER, keep=name)[name].copy()
        if name.endswith("heads"):
            other[5, 1] = 0
            np.testing.assert_array_equal(found, np.concatenate([other, plain[6:]]))
        else:
            other[1, 5] = 0
            np.testing.assert_array_equal(found[:, :6, :6], other)
            np.testing.assert_array_equal(found[:, 6:], plain[:, 6:])


def test_a_mean_is_that_of_the_prompt_without_changes_also_for_later_tokens() -> None:
    model, longer, name = model_of(SMALL), [*TOKENS, 3, 4], "layers.1.heads"
    mean = model.trace(TOKENS, keep=name)[name].mean(axis=0)
    changed, edits = apply(model, TOKENS, [Zero("layers.0.heads"), Mean(name)])
    found = changed.trace(longer, keep=name, edits=edits)[name]
    np.testing.assert_allclose(found, np.tile(mean, (8, 1, 1)), atol=1e-6)


@given(st.data(), configs())
@settings(max_examples=20)
def test_chunks_over_a_cache_get_the_changes_of_a_whole_pass(data: st.DataObject, config: ModelConfig) -> None:
    """Tokens keep their numbers wherever a pass begins, also in a model that generates."""
    model = model_of(config, dtype="float64")
    tokens = data.draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=1, max_size=7))
    longer = [*tokens, *tokens_for(config, 6)]
    drawn = data.draw(st.lists(step_changes(config, len(tokens)), min_size=1, max_size=3))
    changes = [change for change in drawn if not isinstance(change, Swap)]  # needs both tokens in one pass
    changed, edits = apply(model, tokens, changes)
    expected = changed.forward(longer, edits=edits)
    lengths = data.draw(chunkings(len(longer), 5))
    for steps in (lambda ids, cache: changed.forward(ids, cache, edits=edits), edited(changed, edits).forward):
        cache, start = changed.new_cache(chunk=5), 0
        for length in lengths:
            found = steps(longer[start : start + length], cache)
            np.testing.assert_allclose(found, expected[start : start + length], atol=1e-9)
            start += length
    cache = edited(changed, edits).new_cache(chunk=4)
    found = edited(changed, edits).forward(longer, cache, last_only=True)
    np.testing.assert_allclose(found, expected[-1:], atol=1e-9)


@given(st.data(), configs())
@settings(max_examples=20)
def test_what_a_query_does_not_see_stays_unseen(data: st.DataObject, config: ModelConfig) -> None:
    model, tokens = model_of(config, dtype="float64"), tokens_for(config, 7)
    kinds = st.sampled_from(["scores", "attention_weights"])
    changes = [data.draw(step_changes(config, 6, data.draw(kinds))) for _ in range(2)]
    changes += data.draw(st.lists(st.builds(Window, st.none() | st.integers(1, 4)), max_size=1))
    changed, edits = apply(model, tokens[:6], changes)
    found = changed.trace(tokens, edits=edits)
    for layer, window in enumerate(changed.config.sliding_window):
        unseen = ~np.tri(7, dtype=bool) if window is None else ~np.tri(7, dtype=bool) | np.tri(7, k=-window, dtype=bool)
        assert (found[f"layers.{layer}.scores"][:, unseen] == -np.inf).all()
        assert (found[f"layers.{layer}.attention_weights"][:, unseen] == 0).all()
    assert not np.isnan(found["logits"]).any()
    np.testing.assert_allclose(changed.forward(tokens[:6], edits=edits), found["logits"][:6], atol=1e-9)


def test_two_queries_exchange_the_scores_of_keys_that_both_see() -> None:
    model, name = model_of(SMALL), "layers.1.scores"
    plain, found = (
        model.trace(TOKENS, keep=name, edits=edits)[name]
        for edits in ((), apply(model, TOKENS, [Swap(name, 4, token=1)]).edits)
    )
    expected = plain.copy()
    expected[:, [1, 4], :2] = plain[:, [4, 1], :2]
    np.testing.assert_array_equal(found, expected)


def test_two_tokens_change_places_only_in_a_pass_with_both() -> None:
    model = model_of(SMALL)
    _, edits = apply(model, TOKENS, [Swap("layers.1.heads", 4, token=1)])
    cache = model.new_cache()
    with refused(InputError, "exchange", "token 1", "token 4"):
        model.forward(TOKENS[:3], cache, edits=edits)
    whole = model.forward([*TOKENS, 3], edits=edits)
    model.forward(TOKENS, cache, edits=edits)
    np.testing.assert_allclose(model.forward([3], cache, edits=edits), whole[-1:], atol=1e-5)
    assert list(edited(model, edits).generate(TOKENS, max_tokens=3))


def test_a_change_that_is_off_is_not_made_and_not_checked() -> None:
    model = model_of(SMALL)
    off = [Zero("layers.9.q", on=False), Window(1, on=False), PlantedBug("fp8-unscaled", on=False)]
    np.testing.assert_array_equal(logits_of(model, off), model.forward(TOKENS))
    assert "9" not in python_source(model, TOKENS, off).replace(str(TOKENS), "")


# ---------------------------------------------------------------------------------------------------- as plain data


@given(st.data(), configs())
@settings(max_examples=20)
def test_any_changes_go_through_json_and_run_as_python_bit_for_bit(data: st.DataObject, config: ModelConfig) -> None:
    model = model_of(config)
    tokens = data.draw(st.lists(st.integers(0, config.vocab_size - 1), min_size=1, max_size=7))
    changes = [*data.draw(st.lists(step_changes(config, len(tokens)), max_size=4)), data.draw(model_changes(model))]
    more = data.draw(st.lists(st.integers(0, config.vocab_size - 1), max_size=3))
    assert from_dicts(json.loads(json.dumps([change.to_dict() for change in changes]))) == changes
    changed, edits = apply(model, tokens, changes)
    names: dict[str, Any] = {"model": model}
    with np.errstate(all="ignore"):  # 0 times a score of -inf
        exec(python_source(model, tokens, changes, load="model", more=more), names)
    np.testing.assert_array_equal(names["logits"], changed.forward([*tokens, *more], edits=edits))


def test_the_python_is_a_program_of_its_own() -> None:
    model = mistral_ref.load(threads=1)
    lily, tom = ("Once upon a time, " + name + " went home.\n'''\"\"\"" for name in ("Lily", "Tom"))
    changes = [
        Patch("layers.*.heads", tom, token=-1, head=3), Freeze("layers.4.attention_weights"), Window(8), Theta(5e3),
        PlantedBug("not-causal"), Set("layers.0.*", 0.5, token=2), Swap("layers.3.*", 3, token=4), Zero("norm"),
    ]  # fmt: skip
    names: dict[str, Any] = {}
    exec(python_source(model, lily, changes, load="mistral_ref.load(threads=1)"), names)
    changed, edits = apply(model, lily, changes)
    np.testing.assert_array_equal(names["logits"], changed.forward(lily, edits=edits))


def test_hostile_text_stays_text_in_the_python() -> None:
    model = mistral_ref.load(backend="numpy", threads=1)
    text = "a\nraise SystemExit\n\"\"\"'''\\"
    names: dict[str, Any] = {"model": model}
    exec(python_source(model, text, [Patch("layers.0.[q\nx]", text), Window(9)], load="model"), names)
    assert names["logits"].shape[1] == model.config.vocab_size


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        (5, ["5", "dict"]),
        ({}, ["kind", "zero"]),
        ({"kind": "nul"}, ["kind", "'nul'", "zero"]),
        ({"kind": ["zero"]}, ["kind", "zero"]),
        ({"kind": "zero"}, ["zero", "step"]),
        ({"kind": "zero", "step": "q", "haed": 1}, ["zero", "'haed'", "'head'"]),
        ({"kind": "zero", "step": "q", 1: 2}, ["zero", 1, "step"]),
        ({"kind": "zero", "step": 5}, ["step", 5]),
        ({"kind": "zero", "step": "q", "on": 1}, ["on", 1, "True"]),
        ({"kind": "zero", "step": "q", "head": True}, ["head", "True", "whole number"]),
        ({"kind": "zero", "step": "q", "token": 1.5}, ["token", 1.5, "whole number"]),
        ({"kind": "zero", "step": "q", "neuron": 10**20}, ["neuron", "whole number"]),
        ({"kind": "zero", "step": "q", "number": 1}, ["zero", "'number'"]),
        ({"kind": "scale", "step": "q"}, ["scale", "number"]),
        ({"kind": "scale", "step": "q", "number": "2"}, ["number", "'2'"]),
        ({"kind": "add", "step": "q", "number": float("nan")}, ["number", "nan"]),
        ({"kind": "set", "step": "q", "number": 10**400}, ["number", "1e+30"]),
        ({"kind": "swap", "step": "q", "other": 1}, ["token", "None"]),
        ({"kind": "swap", "step": "q", "token": 1, "other": None}, ["other", "None"]),
        ({"kind": "patch", "step": "q", "text": 7}, ["text", 7]),
        ({"kind": "patch", "step": "q", "text": [1, -2]}, ["text[1]", -2]),
        ({"kind": "window", "window": 0}, ["window", 0]),
        ({"kind": "theta", "theta": 1}, ["theta", 1]),
        ({"kind": "bug", "bug": "x"}, ["bug", "'x'", "tiled-heads"]),
    ],
)  # fmt: skip
def test_a_dict_that_is_no_change_is_one_line(data: object, facts: list[object]) -> None:
    with refused(InputError, *facts):
        from_dict(data)
    with refused(ChangeError, "changes[1]", *facts) as caught:
        from_dicts([{"kind": "window", "window": None}, data])
    assert caught.value.number == 1
    assert str(caught.value) == f"changes[1]: {caught.value.problem}"


def test_a_list_of_changes_is_a_list() -> None:
    for data in (5, "zero", {"kind": "zero", "step": "q"}):
        with refused(InputError, "changes", "list"):
            from_dicts(data)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        (Zero("layers.9.q"), ["'layers.9.q'"]),
        (Zero("layers.0.heads", head=6), ["head", "layers.0.heads", 6, -6, 5]),
        (Zero("layers.*.k", head=2), ["head", "layers.0.k", 2]),
        (Zero("layers.0.gate", head=0), ["layers.0.gate", "ffn"]),
        (Zero("layers.0.scores", token=6), ["token", "layers.0.scores", 6]),
        (Zero("layers.0.scores", neuron=6), ["neuron", "layers.0.scores", 6]),
        (Swap("layers.0.q", 6, token=0), ["layers.0.q", 6]),
        (Swap("layers.0.q", 0, token=6), ["layers.0.q", 6]),
        (Mean("layers.0.scores"), ["layers.0.scores", "tokens"]),
        (Mean("layers.0.q", head=6), ["head", "layers.0.q", 6]),
        (Patch("layers.0.q", (1, 2)), [2, 6, "tokens"]),
        (Patch("layers.0.q", (10**6,) * 6), [10**6]),
        (Patch("layers.0.q", "no tokenizer"), ["tokenizer"]),
        (PlantedBug("fp8-unscaled"), ["fp8-unscaled"]),
    ],
    ids=str,
)
def test_a_change_that_the_model_cannot_have_is_named_before_a_pass_begins(
    change: Change, facts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(SMALL)
    monkeypatch.setattr(model, "_walk", None)  # no pass can begin
    first = Freeze("layers.0.q")
    for function in (apply, python_source):
        with refused(ChangeError, "changes[1]", *facts) as caught:
            function(model, TOKENS, [first, change])
        assert caught.value.number == 1


def test_more_changes_that_cannot_be() -> None:
    model = model_of(SMALL)
    with refused(ChangeError, "changes[0]", "Change"):
        apply(model, TOKENS, [{"kind": "zero", "step": "q"}])
    with refused(ChangeError, "changes[1]", "eps-outside"):
        apply(model, TOKENS, [PlantedBug("eps-outside"), PlantedBug("eps-outside")])
    with refused(ChangeError, "changes[0]", "bug"):
        apply(broken(model, "eps-outside"), TOKENS, [Window(3)])
    bos_twice, prompt = PlantedBug("bos-twice"), [1, 5, 6, 7, 8, 9]  # makes a token more
    with refused(ChangeError, "changes[1]", 7, 6):
        apply(model, prompt, [bos_twice, Freeze("layers.0.q")])
    assert apply(model, prompt, [bos_twice, Mean("layers.0.q")]).edits
    mixture = model_of(MIXTURE)
    for change in (Patch("layers.0.gate", (4, 5)), Freeze("layers.0.gate")):
        with refused(ChangeError, "layers.0.gate", "expert"):
            apply(mixture, [1, 2], [change])
    with refused(ChangeError, "layers.0.gate", "tokens", "pair"):
        apply(mixture, [1, 2], [Mean("layers.0.gate")])
    with refused(ChangeError, "layers.0.gate", "pair"):
        apply(mixture, [1, 2], [Zero("layers.0.gate", token=0)])
    with refused(InputError, "dim", "shapes"):
        with_config(model, dim=8)
    with refused(InputError, "rope_theta", 0.5):
        with_config(model, rope_theta=0.5)
    with refused(InputError, "thata"):
        with_config(model, thata=5)


def test_every_kind_has_words_of_its_own() -> None:
    made = [*OF_STEPS, Window(3), Window(None), Theta(9), PlantedBug("theta")]
    assert {change.kind for change in made} == set(KINDS)
    assert len({str(change) for change in made}) == len(made)
    assert "key 2 of head 1 of token 0 of layers.0.scores" in str(Zero("layers.0.scores", neuron=2, head=1, token=0))
