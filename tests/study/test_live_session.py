"""What the live page can ask: every part against the library, in any order, and with little room."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused
from support.tiny import SMALL, configs, model_of, tokens_for

import mistral_ref
from mistral_ref.errors import InputError
from mistral_ref.sampling import log_softmax
from mistral_ref.steps import step_names
from mistral_ref.study import report
from mistral_ref.study.live import live_pass
from mistral_ref.study.live.live_pass import LivePass, difference
from mistral_ref.study.live.session import Question, Session
from mistral_ref.study.live.work import StaleError, Work
from mistral_ref.study.page_data import rms, values_entry

TEXT = "Once upon a time there was a girl"


def ignored(done: int, total: int) -> None:
    """What is told of the progress is ignored."""


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(mistral_ref.load(backend="numpy"), "a model")


def part(session: Session, text: str, name: str, of: object = None, shown: str = "before") -> Any:
    (found,) = session.answer(Question(text), [{"name": name, "of": of, "shown": shown}], ignored)
    return found.get("value", found.get("error"))


def test_the_parts_are_what_the_page_of_a_file_holds(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    monkeypatch.setattr(report, "html", lambda about: kept.update(about) or "")
    report.page(session.model, TEXT, with_cost=False, title="a model")
    about = part(session, TEXT, "about")
    for name in ("title", "madeBy", "start", "tokens", "config", "kinds", "rope", "cost"):
        assert about[name] == kept[name]
    assert part(session, TEXT, "lens") == kept["lens"]
    for entry, whole in zip(about["steps"], kept["steps"], strict=True):
        assert entry | part(session, TEXT, "values", entry["name"]) == whole
    sizes = [step["statistics"]["rms"] for step in kept["steps"] if step["kind"] == "up"]
    assert part(session, TEXT, "sizes", "up") == sizes


def test_what_comes_next_is_the_softmax_of_the_logits(session: Session) -> None:
    logits_TV = session.model.forward(TEXT)
    for token in (0, 3, len(logits_TV) - 1):
        p_V = np.exp(log_softmax(logits_TV[token]))
        found = part(session, TEXT, "next", token)
        assert [one["id"] for one in found] == np.argsort(-p_V, kind="stable")[: len(found)].tolist()
        assert [one["p"] for one in found] == pytest.approx([p_V[one["id"]] for one in found], rel=1e-4)
        assert [one["piece"] for one in found] == [session.model.piece(one["id"]) for one in found]


@given(configs(), st.data())
def test_a_pass_with_little_room_finds_the_same_values(config: mistral_ref.ModelConfig, data: st.DataObject) -> None:
    model, tokens = model_of(config), tokens_for(config, 5)
    trace, names = model.trace(tokens), list(step_names(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_pass, "_MOST_KEPT", data.draw(st.sampled_from([0, 200, 2000, 2**25])))
        found = LivePass(model, tokens, {}, ignored)
        for name in data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=6)):
            np.testing.assert_array_equal(found.step(name, ignored).value, trace[name])
            kind = name.rpartition(".")[2]
            of_kind = [trace.steps.get(f"layers.{layer}.{kind}") for layer in range(config.n_layers)]
            assert found.sizes(kind, ignored) == [step and rms(step, config) for step in of_kind]
        assert found.about("")["steps"][-1]["name"] == "logits"
        assert found.lens()["names"][0] == "embedding"


def test_a_step_that_is_too_large_is_sent_as_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    found = LivePass(model_of(SMALL), tokens_for(SMALL, 5), {}, ignored)
    step = found.step("layers.0.gate", ignored)
    assert live_pass.sent(step, SMALL) == values_entry(step, SMALL, is_whole=True)
    monkeypatch.setattr(live_pass, "_MOST_SENT", step.value.size - 1)
    assert live_pass.sent(step, SMALL) == values_entry(step, SMALL, is_whole=False)


def test_a_difference_keeps_what_neither_pass_sees() -> None:
    one = LivePass(model_of(SMALL), tokens_for(SMALL, 5), {}, ignored)
    other = LivePass(model_of(SMALL, seed=7), tokens_for(SMALL, 5), {}, ignored)
    before, after = (found.step("layers.0.scores", ignored) for found in (one, other))
    found = difference(before, after).value
    seen = np.isfinite(before.value)
    assert np.all(found[~seen] == -np.inf)
    np.testing.assert_array_equal(found[seen], after.value[seen] - before.value[seen])


def test_the_merges_of_a_word_end_in_its_tokens(session: Session) -> None:
    text = "Lily  saw an extraordinary ☃"
    pieces = [token["piece"] for token in session.tokens(text)]
    for index, piece in enumerate(pieces):
        found = session.merges(text, index)
        if piece.startswith("<"):
            assert found["states"] == [] or len(found["states"][0]) >= 1
        else:
            assert piece in found["states"][-1]
            lengths = [len(state) for state in found["states"]]
            assert lengths == list(range(lengths[0], lengths[-1] - 1, -1))  # one merge at a time
    assert session.merges(text, 0) == {"states": [], "why": "stands for itself: no text is merged to it"}
    with refused(InputError, "index", len(pieces)):
        session.merges(text, len(pieces))


def test_a_model_without_a_tokenizer_takes_ids() -> None:
    found = Session(model_of(SMALL), "")
    assert [token["id"] for token in found.tokens("1, 5 7")] == [1, 5, 7]
    assert found.merges("1 5", 1)["states"] == []
    for text in ("1 x", "-1", "9" * 20, "1 ² 3"):
        with refused(InputError, "text", repr(text), "token ids"):
            found.tokens(text)
    with refused(InputError, "tokens", "[]"):
        found.tokens("")


def test_the_newest_passes_are_held_and_no_more(session: Session) -> None:
    for text in ("a", "b", "c", "d", "e", "f", "d"):
        part(session, text, "next", 0)
    assert [question.text for question in session._passes] == ["c", "e", "f", "d"]


def test_a_part_that_is_wrong_does_not_spoil_the_others(session: Session) -> None:
    wanted = [
        {"name": "nothing", "shown": "before"},
        {"name": "values", "of": "*", "shown": "before"},
        {"name": "next", "of": 99, "shown": "before"},
        {"name": "next", "of": [1], "shown": "before"},
        {"name": "sizes", "of": None, "shown": "before"},
        {"name": "values", "of": "norm", "shown": "never"},
        {},
        {"name": "next", "of": 0, "shown": "before"},
    ]
    *wrong, right = session.answer(Question(TEXT), wanted, ignored)
    assert all(list(found) == ["error"] for found in wrong)
    assert list(right) == ["value"]


def test_a_newer_question_ends_the_pass_of_an_older_one() -> None:
    work, begun, steps = Work(), threading.Event(), []

    def endless(progress: Any) -> None:
        for done in range(10**9):
            progress(done, 10**9)
            steps.append(done)
            begun.set()

    threading.Thread(target=work.run, daemon=True).start()
    ended: list[type[Exception]] = []

    def first() -> None:
        try:
            work.ask("a reader", "one", endless)
        except StaleError as error:
            ended.append(type(error))

    thread = threading.Thread(target=first)
    thread.start()
    assert begun.wait(10)
    assert work.place("a reader") is not None
    assert work.place("another") is None
    assert work.ask("a reader", "two", lambda progress: 7) == 7
    thread.join(10)
    assert ended == [StaleError]
    assert work.place("a reader") is None


def test_an_error_belongs_to_who_asked_and_the_work_goes_on() -> None:
    work = Work()
    threading.Thread(target=work.run, daemon=True).start()

    def fails(progress: Any) -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        work.ask("r", "one", fails)
    assert [work.ask(reader, "one", lambda progress: 1) for reader in map(str, range(100))] == [1] * 100


def test_ctrl_c_ends_the_work() -> None:
    work = Work()

    def pressed(progress: Any) -> None:
        raise KeyboardInterrupt

    def ask() -> None:
        work.ask("r", "one", pressed)

    threading.Thread(target=ask, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        work.run()
