"""Sweeps in the live page: they are the library's, about the tokens that a reader has typed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from support.errors import refused
from support.live_page import ignored
from support.tiny import SMALL, model_of

import mistral_ref
from mistral_ref.errors import InputError
from mistral_ref.study.changes import apply, from_dicts
from mistral_ref.study.live.session import Session, question_of
from mistral_ref.study.live.sweeping import token_named
from mistral_ref.study.live.work import StaleError
from mistral_ref.study.patching import ablate, patch

TOM, LILY = (f"{name} went to the park. Then" for name in ("Tom", "Lily"))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(mistral_ref.load(backend="numpy"), "a model")


def swept(session: Session, progress: Any = ignored, **asked: Any) -> Any:
    of = {"by": "head", "how": "zero", "other": "", "first": "she", "second": "he", "at": 7, **asked}
    (found,) = session.answer(question_of(TOM, []), [{"name": "sweep", "of": of, "shown": "before"}], progress)
    return found.get("value", found.get("error"))


@pytest.mark.parametrize("how", ["zero", "mean", "patch"])
@pytest.mark.parametrize(("by", "at"), [("head", 7), ("token", 4), ("step", 7)])
def test_a_sweep_is_the_librarys(session: Session, by: Any, how: Any, at: int) -> None:
    model = session.model
    metric = (model.token_ids("and she")[-1], model.token_ids("and he")[-1])
    if how == "patch":
        expected = patch(model, TOM, LILY, by=by, metric=metric, at=at)
    else:
        expected = ablate(model, TOM, by=by, metric=metric, to=how, at=at)
    found = swept(session, by=by, how=how, other=LILY, at=at)
    np.testing.assert_array_equal(np.array(found["values"]), expected.change)
    assert (found["rows"], found["columns"]) == (expected.rows, expected.columns)
    assert (found["base"], found["other"]) == (expected.base, expected.other)
    assert (found["first"], found["second"]) == ("▁she", "▁he")
    row, column = found["top"][0]
    assert abs(expected.change[row, column]) == np.abs(expected.change).max()


@pytest.mark.parametrize(("how", "at"), [("zero", 7), ("mean", 7), ("mean", 5), ("patch", 7)])
def test_a_cell_is_the_change_that_the_page_makes_of_it(session: Session, how: str, at: int) -> None:
    other = {"text": LILY} if how == "patch" else {}
    change = {"kind": how, "step": "layers.4.heads", "head": 3, **other}
    _, edits = apply(session.model, TOM, from_dicts([change]))
    logits_V = session.model.forward(TOM, edits=edits)[at]
    she, he = (session.model.token_ids(f"and {word}")[-1] for word in ("she", "he"))
    found = swept(session, how=how, other=LILY, at=at)
    moved = float(logits_V[she] - logits_V[he]) - found["base"]
    assert found["values"][found["rows"].index("layers.4.heads")][3] == pytest.approx(moved, abs=1e-4)


def test_a_sweep_tells_its_progress_and_can_be_ended(session: Session) -> None:
    told = list[tuple[int, int]]()
    swept(session, lambda done, total: told.append((done, total)))
    assert told[-1] == (40, 40)

    def ends(done: int, total: int) -> None:
        if (done, total) == (7, 40):
            raise StaleError

    with pytest.raises(StaleError):
        swept(session, ends)


@pytest.mark.parametrize(
    ("asked", "fact"),
    [
        ({"first": "nosuchword"}, "first is 'nosuchword'"),
        ({"second": ""}, "second is ''"),
        ({"second": None}, "second is ''"),
        ({"first": "he", "second": "▁he"}, "▁he"),
        ({"by": "neuron"}, "by"),
        ({"how": "median"}, "how"),
        ({"at": 8}, "at"),
        ({"how": "patch", "other": "Tom"}, "8"),
    ],
    ids=str,
)
def test_what_cannot_be_swept_is_said_in_words(session: Session, asked: dict[str, Any], fact: str) -> None:
    assert fact in swept(session, **asked)


def test_a_token_is_named_by_its_piece_or_its_word(session: Session) -> None:
    model = session.model
    assert model.piece(token_named(model, "first", " he ")) == "▁he"
    assert model.piece(token_named(model, "first", "▁he")) == "▁he"
    assert model.piece(token_named(model, "first", ",")) == ","
    assert token_named(model_of(SMALL), "first", "7") == 7
    for text in ("he", "-1", "99999999999", str(SMALL.vocab_size)):
        with refused(InputError, "first", text):
            token_named(model_of(SMALL), "first", text)
