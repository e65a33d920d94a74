"""Going on in the live page: what is drawn is what `generate` draws, and drafts are verified as it verifies them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.live_page import ignored
from support.tiny import SMALL, model_of

import mistral_ref
from mistral_ref.errors import InputError
from mistral_ref.sampling import SamplingSettings, distribution, log_softmax
from mistral_ref.study.changes import apply, from_dicts
from mistral_ref.study.live.session import Session, question_of

TEXT = "Tom went to the park. Then"
AGAIN = "Tom and Lily went to the park. Tom and Lily"
PLAIN = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "seed": 5}
HEAD = {"kind": "zero", "step": "layers.4.heads", "head": 3}
LAST = {"kind": "scale", "step": "layers.2.residual_after_ffn", "token": -1, "number": 3}
TWICE = {"kind": "bug", "bug": "bos-twice"}
PATCH = {"kind": "patch", "step": "norm", "text": "Lily went to the park. Then"}


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(mistral_ref.load(backend="numpy"), "a model")


def asked(session: Session, text: str, name: str, of: object, more: object = (), changes: Sequence[object] = ()) -> Any:
    question = question_of(text, list(changes), more)
    (found,) = session.answer(question, [{"name": name, "of": of, "shown": "after"}], ignored)
    return found.get("value", found.get("error"))


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 1.6, "top_k": 7, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.3, "seed": 11},
    ],
    ids=str,
)
def test_the_tokens_that_are_drawn_are_those_of_generate(session: Session, chosen: dict[str, Any]) -> None:
    drawn, how = list[int](), {**PLAIN, **chosen}
    settings = {name: value for name, value in how.items() if how["temperature"] > 0 or name != "seed"}
    for expected in session.model.generate(TEXT, max_tokens=5, **settings):
        found = asked(session, TEXT, "distribution", how, drawn)
        assert found["drawn"]["id"] == expected.id
        assert (found["drawn"]["number"] is None) == (how["temperature"] == 0)
        drawn.append(expected.id)
    shown = asked(session, TEXT, "about", None, drawn)["tokens"]
    assert [token["id"] for token in shown] == [*session.model.token_ids(TEXT), *drawn]
    assert asked(session, TEXT, "text", None, drawn).startswith(f"{TEXT} ")


@settings(max_examples=40)
@given(
    st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0, 0.3, 1, 1.7]),
            "top_k": st.none() | st.integers(1, 30),
            "top_p": st.sampled_from([0, 0.2, 0.8, 1]),
            "min_p": st.sampled_from([0, 0.1, 0.9, 1]),
            "repetition_penalty": st.sampled_from([1, 1.5, 0.8]),
            "seed": st.integers(0, 2**53),
        }
    ),
    st.lists(st.integers(0, SMALL.vocab_size - 1), max_size=3),
)
def test_the_rows_say_what_each_setting_leaves(how: dict[str, Any], more: list[int]) -> None:
    found, ids = Session(model_of(SMALL), ""), [1, 2, 3, *more]
    answer = asked(found, "1 2 3", "distribution", how, more)
    logits_V = found.model.forward(ids)[-1]
    chosen = SamplingSettings(**{name: value for name, value in how.items() if name != "seed"})
    expected, rows = distribution(logits_V, chosen, ids), answer["rows"]
    last = list(answer["left"].values())[-1]
    assert last == len(expected.ids_N)
    assert [row["id"] for row in rows][:last] == expected.ids_N[: len(rows)].tolist()
    for rank, row in enumerate(rows):
        assert row["own"] == pytest.approx(np.exp(log_softmax(logits_V))[row["id"]], rel=1e-5)
        assert row["share"] == pytest.approx(expected.shares(np.array([row["id"]]))[0])
        assert (row["share"] > 0) == (rank < last) or row["uncut"] < 1e-300
    assert answer["drawn"]["id"] in expected.ids_N


@pytest.mark.filterwarnings("ignore:the prompt begins with BOS twice")
@pytest.mark.parametrize("changes", [[], [HEAD], [HEAD, LAST], [TWICE]], ids=str)
@pytest.mark.parametrize("text", [AGAIN, TEXT])
def test_a_draft_is_accepted_as_far_as_the_same_tokens_would_be_drawn(
    session: Session, text: str, changes: list[dict[str, Any]]
) -> None:
    how = {**PLAIN, "temperature": 0.0}
    found = asked(session, text, "draft", how, [], changes)
    drafted, drawn = ([token["id"] for token in found[name]] for name in ("drafted", "drawn"))
    assert bool(drafted) == (text == AGAIN) == bool(drawn)
    model, edits = apply(session.model, text, from_dicts(changes))
    ids = model.token_ids(text)
    for number, token in enumerate(drawn):
        assert token == int(model.forward(ids, edits=edits)[-1].argmax())
        assert (drafted[number : number + 1] == [token]) == (number + 1 < len(drawn))
        ids.append(token)


def test_some_drafts_are_accepted_and_one_seed_draws_what_is_not(session: Session) -> None:
    text = "Tom had a red ball. Tom had a red"
    found = asked(session, text, "draft", PLAIN)
    drawn = [token["id"] for token in found["drawn"]]
    assert len(drawn) > 1
    generated = session.model.generate(text, max_tokens=len(drawn), **PLAIN)
    assert drawn == [token.id for token in generated]


def test_changes_are_those_of_the_text_in_a_pass_of_more_tokens(session: Session) -> None:
    ids, more = session.model.token_ids(TEXT), [session.model.token_ids("and he")[-1]]
    found = asked(session, TEXT, "next", len(ids), more, [LAST])

    def edit(x_TD: np.ndarray) -> np.ndarray:
        x_TD = x_TD.copy()
        x_TD[len(ids) - 1] *= 3
        return x_TD

    logits_TV = session.model.forward([*ids, *more], edits={"layers.2.residual_after_ffn": edit})
    p_V = np.exp(log_softmax(logits_TV[-1]))
    assert [one["after"] for one in found] == pytest.approx([p_V[one["id"]] for one in found], rel=1e-3)


@pytest.mark.filterwarnings("ignore:the prompt begins with BOS twice")
@pytest.mark.parametrize("changes", [[], [LAST, HEAD], [TWICE, HEAD], [PATCH]], ids=str)
def test_the_python_gives_the_logits_of_the_text_with_its_new_tokens(session: Session, changes: list[Any]) -> None:
    he, was = session.model.token_ids("and he was")[-2:]
    named: dict[str, Any] = {}
    exec(asked(session, TEXT, "python", None, [he, was], changes), named)
    shown = asked(session, TEXT, "about", None, [he, was], changes)["tokens"]
    assert len(named["logits"]) == len(shown)
    p_V = np.exp(log_softmax(named["logits"][-1]))
    found = asked(session, TEXT, "next", len(shown) - 1, [he, was], changes)
    assert [one["after"] for one in found] == pytest.approx([p_V[one["id"]] for one in found], rel=1e-2, abs=1e-6)


@pytest.mark.parametrize(
    "change", [{"kind": "zero"}, {"kind": "patch", "text": "1 2 4"}, {"kind": "patch", "text": [1, 2, 4]}], ids=str
)
def test_the_python_of_a_model_without_a_tokenizer_has_the_new_tokens_once(change: dict[str, Any]) -> None:
    found, change = Session(model_of(SMALL), "", load="model"), {"step": "layers.0.q", "token": -1, **change}
    named: dict[str, Any] = {"model": found.model}
    exec(asked(found, "1 2 3", "python", None, [4, 5], [change]), named)
    ids = {"text": [1, 2, 4]} if "text" in change else {}
    edits = apply(found.model, [1, 2, 3], from_dicts([{**change, **ids}])).edits
    np.testing.assert_array_equal(named["logits"], found.model.forward([1, 2, 3, 4, 5], edits=edits))


ZERO = {"kind": "zero", "step": "layers.0.heads"}
SWAP = {"kind": "swap", "step": "layers.1.q", "token": 1, "other": -1}


@pytest.mark.parametrize("change", [{**ZERO, "on": False}, ZERO, SWAP], ids=str)
def test_no_text_goes_on_beyond_the_models_positions(change: dict[str, Any]) -> None:
    found = Session(model_of(SMALL.replace(max_seq_len=8)), "")
    for text, n in (("1 2 1 2 1", 3), ("1 2 1 2 1 2 1", 1)):
        assert len(asked(found, text, "goes_on", None, [], [change])) == n
        draft = asked(found, text, "draft", {**PLAIN, "temperature": 0}, [], [change])
        assert len(draft["drafted"]) == n - 1
        assert len(draft["drawn"]) <= n
    assert "max_seq_len" in asked(found, "1 2 1 2 1 2 1 2", "goes_on", None, [], [change])
    assert asked(found, "1 2 1 2 1 2 1 2", "draft", PLAIN, [], [change]) == {"drafted": [], "drawn": []}


def test_a_text_that_has_ended_says_so(session: Session) -> None:
    (end,) = session.model.eos_ids
    assert asked(session, TEXT, "distribution", PLAIN, [end])["hasEnded"]
    assert not asked(session, TEXT, "distribution", PLAIN)["hasEnded"]


@pytest.mark.parametrize(
    ("of", "fact"),
    [
        (None, "None"),
        ({**PLAIN, "temperature": -1}, "temperature"),
        ({**PLAIN, "top_k": 0}, "top_k"),
        ({**PLAIN, "top_p": "all"}, "top_p"),
        ({**PLAIN, "seed": -1}, "seed"),
        ({**PLAIN, "other": 1}, "other"),
        ({"temperature": 1}, "seed"),
    ],
    ids=str,
)
def test_settings_that_are_wrong_are_refused_in_words(session: Session, of: object, fact: str) -> None:
    assert fact in asked(session, TEXT, "distribution", of)


def test_tokens_that_are_no_tokens_are_refused(session: Session) -> None:
    for more in (None, "12", 3, ["x"], [1.5], [-1]):
        with refused(InputError, "more"):
            question_of(TEXT, [], more)
    assert "9999" in asked(session, TEXT, "about", None, [9999])
