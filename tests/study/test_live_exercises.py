"""The course's exercises: each solution does what is asked for, what comes near it does not, and the words are true."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.errors import assert_says
from support.live_page import ignored
from support.paths import ROOT

from mistral_ref.model import Model
from mistral_ref.sampling import log_softmax
from mistral_ref.study.broken import possible_bugs
from mistral_ref.study.changes import Change, Patch, PlantedBug, Scale, Set, Theta, Window, Zero, apply
from mistral_ref.study.live.exercises import EXERCISES, LILY, TOM
from mistral_ref.study.live.session import Session, question_of
from mistral_ref.study.patching import ablate

NAMES = list(EXERCISES)
OTHERS = "These are other changes than those that the exercise asks for."
NOT_YET = "Not yet: "
HEADS = [Zero(f"layers.{layer}.heads", head=3) for layer in (4, 3)]
RESIDUAL = "layers.4.residual_after_ffn"
# Of each exercise: changes that it does not ask for, and changes that do too little.
NEAR: dict[str, tuple[list[list[Change]], list[list[Change]]]] = {
    "one-head": (
        [HEADS, HEADS[1:], [Zero("layers.*.heads", head=3)], [Zero("layers.4.heads")], [Set(HEADS[0].step, 0, head=3)]],
        [[Zero("layers.4.heads", head=2)]],
    ),
    "two-heads": (
        [[*HEADS, Zero("layers.0.heads", head=0)], [HEADS[0], Scale("layers.3.heads", 0, head=3)]],
        [[HEADS[0], Zero("layers.3.heads", head=2)]],
    ),
    "window": ([[Window(7), Window(7)], HEADS[:1]], [[Window(6)], [Window(1)]]),
    "bug": ([HEADS[:1]], [[PlantedBug(name)] for name in ("row-order", "bos-twice")]),
    "one-vector": (
        [[Patch("layers.2.residual_after_ffn", LILY)], [Patch("layers.*.residual_after_ffn", LILY, token=1)]],
        [[Patch(RESIDUAL, LILY, token=1)], [Patch("layers.0.residual_after_ffn", LILY, token=7)]],
    ),
    "louder": (
        [HEADS[:1], [Scale("layers.4.heads", 2)], [Scale("norm", 2)]],
        [[Scale("layers.4.heads", 2, head=2)], [Scale("layers.4.heads", 0.5, head=3)]],
    ),
    "norm": (
        [[Scale("norm", 2, token=7)], [Scale("layers.3.residual_after_ffn", 2)]],
        [[Scale(RESIDUAL, 100)], [Scale("norm", 0.5)]],
    ),
    "theta": ([[Theta(10), Window(7)]], [[Theta(theta)] for theta in (100, 1e6)]),
    "token-before": ([[Zero("layers.0.heads")]], [HEADS[:1], [Zero("layers.0.heads", head=1)]]),
    "neuron": (
        [[Zero("layers.0.ffn_hidden")], [Zero("layers.0.up", neuron=23)], [Zero("layers.*.ffn_hidden", neuron=23)]],
        [[Zero("layers.0.ffn_hidden", neuron=166)], [Zero("layers.1.ffn_hidden", neuron=23)]],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def session(model: Model) -> Session:
    return Session(model, "the demonstration model", exercises=True)


def said(session: Session, name: str, changes: Sequence[Change], text: str = "", more: Sequence[int] = ()) -> Any:
    """Return whether an exercise is done, and the words."""
    question = question_of(text or EXERCISES[name].text, [change.to_dict() for change in changes], more)
    (found,) = session.answer(question, [{"name": "exercise", "of": name, "shown": "after"}], ignored)
    return found["value"]["isDone"], found["value"]["words"]


def shares(model: Model, text: str, changes: Sequence[Change] = ()) -> dict[str, float]:
    """Return the probability of each piece after a text, with changes, by the library."""
    changed, edits = apply(model, text, changes)
    p_V = np.exp(log_softmax(changed.forward(text, edits=edits)[-1]))
    return {model.piece(token): float(p) for token, p in enumerate(p_V)}


def test_who_is_on_the_right_way_hears_how_far(session: Session) -> None:
    for head in HEADS:
        done, words = said(session, "two-heads", [head])
        assert not done
        assert_says(words, "Go on", 1, 2)
    for window in (8, 9, None):
        done, words = said(session, "window", [Window(window)])
        assert not done
        assert_says(words, "Not yet", 8, "tokens")


@pytest.mark.parametrize("name", NAMES)
def test_a_solution_is_accepted_and_what_comes_near_is_not(session: Session, name: str) -> None:
    exercise, (others, too_little) = EXERCISES[name], NEAR[name]
    assert said(session, name, exercise.solution) == (True, exercise.done)
    for changes in others:
        assert said(session, name, changes) == (False, OTHERS), changes
    for changes in too_little:
        is_done, words = said(session, name, changes)
        assert not is_done
        assert words.startswith(NOT_YET), changes


@pytest.mark.parametrize("name", ["one-head", "neuron"])
def test_what_is_not_the_exercise_is_said(session: Session, name: str) -> None:
    exercise = EXERCISES[name]
    off = [{**change.to_dict(), "on": False} for change in exercise.solution]
    for changes in (off, [], [{"kind": "zero", "step": "layers.9.heads"}, *off]):
        question = question_of(exercise.text, changes)
        (found,) = session.answer(question, [{"name": "exercise", "of": name, "shown": "after"}], ignored)
        assert found["value"] == {"isDone": False, "words": "Nothing has been changed yet."}
    assert "another text" in said(session, name, exercise.solution, text=LILY)[1]
    assert "tokens that you have added" in said(session, name, exercise.solution, more=[5])[1]


@pytest.mark.parametrize("name", [name for name in NAMES if EXERCISES[name].goal.token])
def test_the_words_say_the_probabilities(session: Session, name: str) -> None:
    exercise, changes = EXERCISES[name], NEAR[name][1][0]
    p = shares(session.model, exercise.text, changes)
    expected = ", ".join(f"“{piece[1:]}” has {100 * p[piece]:.3g} %" for piece in exercise.watched)
    assert said(session, name, changes)[1] == f"{NOT_YET}{expected}."
    assert exercise.goal.token in exercise.watched


def test_the_words_say_the_first_wrong_step(session: Session) -> None:
    for bug, first in (("tiled-heads", "layers.0.scores"), ("bos-twice", "embedding")):
        assert said(session, "bug", [PlantedBug(bug)])[1] == f"{NOT_YET}the first wrong step is {first}."
    assert said(session, "bug", [PlantedBug("no-window")])[1] == f"{NOT_YET}no step is wrong."


def test_the_page_gets_no_solution(session: Session) -> None:
    session.begin(TOM, ignored)
    found = session.live_entry()["exercises"]
    assert list(found) == NAMES
    assert all(list(one) == ["chapter", "text", "task", "hint"] for one in found.values())
    assert Session(session.model, "").live_entry()["exercises"] == {}


def test_a_chapter_says_the_command_of_its_exercises() -> None:
    for name, exercise in EXERCISES.items():
        (chapter,) = (ROOT / "docs" / "course").glob(f"{exercise.chapter:02}-*.md")
        assert f"mistral-ref explore --exercise {name}\n" in chapter.read_text(encoding="utf-8")


@pytest.mark.slow
def test_one_bug_alone_is_the_one_that_is_asked_for(session: Session) -> None:
    found = {bug for bug in possible_bugs(session.model) if said(session, "bug", [PlantedBug(bug)])[0]}
    assert found == {"keys-permuted-as-queries"}


# ------------------------------------------------------------------------------------------- what the words claim


def test_the_head_looks_at_tom_and_she_is_seventeen_times_as_likely(model: Model) -> None:
    seen_S = model.trace(TOM, keep="layers.4.attention_weights")["layers.4.attention_weights"][:, 7, 1]
    assert model.piece(model.token_ids(TOM)[1]) == "▁Tom"
    assert round(float(seen_S[3]), 2) == 0.95 == round(float(seen_S.max()), 2)
    before, after = shares(model, TOM), shares(model, TOM, HEADS[:1])
    assert round(after["▁she"] / before["▁she"]) == 17


def test_one_head_in_layer_4_carries_tom(model: Model) -> None:
    he = model.token_ids("and he")[-1]

    def share(logits_V: np.ndarray) -> float:
        return float(np.exp(log_softmax(logits_V))[he])

    found = ablate(model, TOM, by="head", metric=share, steps="layers.4.heads")
    assert [number for number, p in enumerate(found.values_RC[0]) if p < 0.6] == [3]


def test_the_other_head_that_looks_at_tom_is_in_layer_3(model: Model) -> None:
    seen_S = model.trace(TOM, keep="layers.3.attention_weights")["layers.3.attention_weights"][:, 7, 1]
    assert seen_S.argmax() == 3


def test_with_seven_keys_the_last_token_sees_tom_and_with_six_not(model: Model) -> None:
    n_tokens = len(model.token_ids(TOM))
    assert (n_tokens, n_tokens - 1 - 7 + 1) == (8, 1)  # the first of seven keys is token 1
    assert EXERCISES["window"].asked.most == 7


def test_the_bug_leaves_queries_and_values_and_spoils_what_follows_the_scores(session: Session) -> None:
    changes = [change.to_dict() for change in EXERCISES["bug"].solution]
    (found,) = session.answer(
        question_of(TOM, changes), [{"name": "departs", "of": None, "shown": "difference"}], ignored
    )
    names = [step.name for step in session.model.steps(TOM)]
    scores = names.index("layers.0.scores")
    assert [name for name in found["value"] if name in names[:scores]] == ["layers.0.k", "layers.0.k_rotated"]
    assert set(names[scores:]) <= set(found["value"])


def test_in_front_of_the_norm_a_multiplier_does_nothing_and_behind_it_it_is_a_temperature(model: Model) -> None:
    plain, scaled = shares(model, TOM), shares(model, TOM, [Scale(RESIDUAL, 100)])
    assert scaled["▁he"] == pytest.approx(plain["▁he"], rel=1e-4)
    p_V = np.exp(log_softmax(2 * model.forward(TOM)[-1]))
    doubled = shares(model, TOM, [Scale("norm", 2)])
    np.testing.assert_allclose(list(doubled.values()), p_V, rtol=1e-3)


def test_the_model_was_trained_with_theta_10000_and_at_10_it_is_lost(model: Model) -> None:
    assert model.config.rope_theta == 10000
    falling = [shares(model, TOM, [Theta(theta)])["▁he"] for theta in (10000, 1000, 100, 10)]
    assert falling == sorted(falling, reverse=True)


def test_the_head_of_the_token_before_is_the_only_one(model: Model) -> None:
    exercise = EXERCISES["token-before"]
    seen_HS = model.trace(exercise.text, keep="layers.0.attention_weights")["layers.0.attention_weights"][:, -1]
    assert (int(seen_HS[:, -2].argmax()), round(float(seen_HS[7, -2]), 2)) == (7, 0.91)
    time = model.token_ids("and time")[-1]
    found = ablate(model, exercise.text, by="head", metric=lambda logits_V: float(logits_V.argmax() == time))
    assert found.values_RC.size == 40
    assert [(row, column) for row, column, change in found.top(40) if change] == [("layers.0.heads", "head 7")]


def test_the_neuron_is_large_at_this_token(model: Model) -> None:
    exercise = EXERCISES["neuron"]
    sizes_F = np.abs(model.trace(exercise.text, keep="layers.0.ffn_hidden")["layers.0.ffn_hidden"][-1])
    next_one, largest = np.sort(sizes_F)[-2:]
    assert (len(sizes_F), int(sizes_F.argmax()), round(float(largest / next_one), 1)) == (512, 23, 5.8)
    p = shares(model, exercise.text, exercise.solution)
    assert (max(p, key=p.__getitem__), round(100 * p["▁a"])) == ("▁a", 92)
