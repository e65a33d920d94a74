"""Sweeps in the live page: they are the library's, about the tokens that a reader has typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.errors import refused
from support.live_page import ignored
from support.tiny import SMALL, model_of

import mistral_ref
from mistral_ref.errors import InputError
from mistral_ref.study.changes import apply, from_dicts
from mistral_ref.study.edited import edited
from mistral_ref.study.live.session import Session, question_of
from mistral_ref.study.live.typed import token_named
from mistral_ref.study.live.work import StaleError
from mistral_ref.study.patching import ablate, patch

TOM, LILY = (f"{name} went to the park. Then" for name in ("Tom", "Lily"))


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(mistral_ref.load(backend="numpy"), "a model")


def swept(session: Session, progress: Any = ignored, more: Sequence[int] = (), **asked: Any) -> Any:
    of = {"by": "head", "how": "zero", "other": "", "first": "she", "second": "he", "at": 7, **asked}
    question = question_of(TOM, [], more)
    (found,) = session.answer(question, [{"name": "sweep", "of": of, "shown": "before"}], progress)
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


@pytest.mark.parametrize(
    ("how", "at", "word"), [("zero", 7, ""), ("mean", 7, ""), ("mean", 5, ""), ("patch", 7, ""), ("mean", 8, "she")]
)
def test_a_cell_is_the_change_that_the_page_makes_of_it(session: Session, how: str, at: int, word: str) -> None:
    other = {"text": LILY} if how == "patch" else {}
    change = {"kind": how, "step": "layers.4.heads", "head": 3, **other}
    _, edits = apply(session.model, TOM, from_dicts([change]))
    more = session.model.token_ids(f"and {word}")[-1:] if word else []
    logits_V = session.model.forward([*session.model.token_ids(TOM), *more], edits=edits)[at]
    she, he = (session.model.token_ids(f"and {word}")[-1] for word in ("she", "he"))
    found = swept(session, more=more, how=how, other=LILY, at=at)
    moved = float(logits_V[she] - logits_V[he]) - found["base"]
    assert found["values"][found["rows"].index("layers.4.heads")][3] == pytest.approx(moved, abs=1e-4)


@pytest.mark.parametrize("other", ["1 2 4", "1, 2, 4"])
def test_the_other_text_of_a_model_without_a_tokenizer_is_ids(other: str) -> None:
    found = Session(model_of(SMALL), "")
    of = {"by": "step", "how": "patch", "other": other, "first": "5", "second": "6", "at": 2}
    (answer,) = found.answer(question_of("1 2 3", []), [{"name": "sweep", "of": of, "shown": "before"}], ignored)
    expected = patch(found.model, [1, 2, 3], [1, 2, 4], by="step", metric=(5, 6))
    np.testing.assert_array_equal(np.array(answer["value"]["values"]), expected.change)
    wanted: list[Any] = [{"name": "next", "of": 2, "shown": "after"}]
    changes = [{"kind": "patch", "step": "layers.0.heads", "text": text} for text in (other, [1, 2, 4])]
    logits = [found.answer(question_of("1 2 3", [change]), wanted, ignored) for change in changes]
    assert logits[0] == logits[1]
    assert logits[0][0]["value"][0]["before"] != logits[0][0]["value"][0]["after"]


def test_the_tokens_that_follow_the_text_follow_the_other_one_too(session: Session) -> None:
    model, more = session.model, session.model.token_ids("and he was")[-2:]
    metric = (model.token_ids("and she")[-1], model.token_ids("and he")[-1])
    ids, other_ids = ([*model.token_ids(text), *more] for text in (TOM, LILY))
    expected = patch(model, ids, other_ids, by="head", metric=metric, at=9)
    found = swept(session, more=more, how="patch", other=LILY, at=9)
    np.testing.assert_array_equal(np.array(found["values"]), expected.change)
    assert "2 tokens; expected 8" in swept(session, more=more, how="patch", other="Lily", at=9)


def test_a_sweep_whose_logits_are_no_numbers_is_answered() -> None:
    found = Session(edited(model_of(SMALL), {"logits": lambda logits_TV: logits_TV * np.float32("nan")}), "")
    of = {"by": "head", "how": "patch", "other": "1 2 4", "first": "5", "second": "6", "at": 2}
    (answer,) = found.answer(question_of("1 2 3", []), [{"name": "sweep", "of": of, "shown": "before"}], ignored)
    assert (answer["value"]["base"], answer["value"]["other"]) == (None, None)
    json.dumps(answer, allow_nan=False)


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
        ({"how": "patch", "other": None}, "other text is None"),
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
