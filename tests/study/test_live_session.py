"""What the live page can ask: every part against the library, in any order, and with little room."""

from __future__ import annotations

import base64
import json
import threading
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.tiny import SMALL, configs, model_of, tokens_for

import mistral_ref
from mistral_ref.errors import InputError
from mistral_ref.sampling import log_softmax
from mistral_ref.steps import step_names
from mistral_ref.study import report
from mistral_ref.study.changes import apply, from_dicts
from mistral_ref.study.live import live_pass, parts
from mistral_ref.study.live.live_pass import LivePass, difference
from mistral_ref.study.live.session import Question, Session, question_of
from mistral_ref.study.live.work import StaleError, Work
from mistral_ref.study.page_data import rms, values_entry

TEXT = "Once upon a time there was a girl"


def ignored(done: int, total: int) -> None:
    """What is told of the progress is ignored."""


@pytest.fixture(scope="module")
def session() -> Session:
    return Session(mistral_ref.load(backend="numpy"), "a model")


def part(
    session: Session, text: str, name: str, of: object = None, shown: str = "before", changes: Sequence[object] = ()
) -> Any:
    question = question_of(text, list(changes))
    (found,) = session.answer(question, [{"name": name, "of": of, "shown": shown}], ignored)
    return found.get("value", found.get("error"))


def logits_of(session: Session, text: str, changes: Sequence[Any], shown: str = "after") -> np.ndarray:
    """Return the logits of a question as the page unpacks them."""
    entry = part(session, text, "values", "logits", shown, changes)["whole"]
    planes = np.frombuffer(zlib.decompress(base64.b64decode(entry["data"])), np.uint8).reshape(2, -1)
    halves = np.ascontiguousarray(planes.T).view("<f2").astype(np.float64)
    return np.ldexp(halves, entry["exponent"]).reshape(-1, session.model.config.vocab_size)


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
        for shown in ("before", "after"):
            assert [one[shown] for one in found] == pytest.approx([p_V[one["id"]] for one in found], rel=1e-4)
        assert [one["piece"] for one in found] == [session.model.piece(one["id"]) for one in found]


@settings(max_examples=25)
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


HEAD = {"kind": "zero", "step": "layers.2.heads", "head": 3}
WINDOW = {"kind": "window", "window": 2}
BUG = {"kind": "bug", "bug": "tiled-heads"}
WRONG = {"kind": "zero", "step": "layers.9.heads"}


@pytest.mark.parametrize("changes", [[HEAD], [WINDOW], [BUG], [BUG, WINDOW, HEAD]], ids=str)
def test_changes_are_the_librarys(session: Session, changes: list[dict[str, Any]]) -> None:
    made = apply(session.model, TEXT, from_dicts(changes))
    before, after = session.model.forward(TEXT), made.model.forward(TEXT, edits=made.edits)
    about = part(session, TEXT, "about", None, "after", changes)
    assert about["changes"] == {"words": list(map(str, from_dicts(changes))), "problems": {}}
    close = {"rtol": 2e-3, "atol": 2e-3}
    np.testing.assert_allclose(logits_of(session, TEXT, changes), after, **close)
    np.testing.assert_allclose(logits_of(session, TEXT, changes, "before"), before, **close)
    np.testing.assert_allclose(logits_of(session, TEXT, changes, "difference"), after - before, **close)
    found = part(session, TEXT, "next", 3, "after", changes)
    p_V, q_V = (np.exp(log_softmax(logits_TV[3])) for logits_TV in (before, after))
    assert [one["before"] for one in found] == pytest.approx([p_V[one["id"]] for one in found], rel=1e-3)
    assert [one["after"] for one in found] == pytest.approx([q_V[one["id"]] for one in found], rel=1e-3)
    assert {int(p_V.argmax()), int(q_V.argmax())} <= {one["id"] for one in found}


def test_a_change_that_cannot_be_made_says_why_and_the_others_are_made(session: Session) -> None:
    patch = {"kind": "patch", "step": "embedding", "text": "too short"}
    changes = [WRONG, HEAD, {"kind": "nothing"}, {**WRONG, "on": False}, patch, 7, {"kind": "zero"}, BUG, BUG]
    found = part(session, TEXT, "about", None, "after", changes)["changes"]
    assert sorted(found["problems"]) == [0, 2, 4, 5, 6, 8]
    assert "layers.9.heads" in found["problems"][0]
    assert not any("changes[" in problem for problem in found["problems"].values())
    assert [bool(words) for words in found["words"]] == [True, True, False, True, True, False, False, True, True]
    assert np.array_equal(logits_of(session, TEXT, changes), logits_of(session, TEXT, [HEAD, BUG]))


def test_changes_that_are_off_change_nothing(session: Session) -> None:
    changes = [{**HEAD, "on": False}, WRONG]
    assert np.array_equal(logits_of(session, TEXT, changes), logits_of(session, TEXT, [], "before"))
    assert not logits_of(session, TEXT, changes, "difference").any()
    assert part(session, TEXT, "sizes", "q", "difference", changes) == [0.0] * session.model.config.n_layers


def test_a_difference_says_where_it_is_more_than_rounding(session: Session) -> None:
    names = list(step_names(session.model.config))
    departs = part(session, TEXT, "departs", None, "difference", [HEAD])
    assert departs == names[names.index("layers.2.heads") :]
    assert part(session, TEXT, "departs", None, "difference", [{**HEAD, "on": False}]) == []


@pytest.mark.parametrize("room", [0, 700, 1500, 3000, 2**25])
def test_a_step_of_other_tokens_departs_if_both_passes_keep_it(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_pass, "_MOST_KEPT", room)
    found, text = Session(model_of(SMALL), ""), "1 5 6 7 8"
    departs = part(found, text, "departs", None, "difference", [{"kind": "bug", "bug": "bos-twice"}])
    kept = [{step.name for step in one.values.kept()} for one in found._passes.values()]
    assert len(kept) == 2
    assert departs == [name for name in step_names(SMALL) if name in kept[0] & kept[1]]


@pytest.mark.slow
def test_a_difference_to_a_pass_by_kernels_says_where_it_is_more_than_rounding() -> None:
    compiled = Session(mistral_ref.load(), "a model")  # NumPy computes a model with a bug
    found = part(compiled, TEXT, "departs", None, "difference", [BUG])
    assert found[0] == "layers.0.scores"
    for name in ("layers.0.q_rotated", "layers.0.scores"):
        values = part(compiled, TEXT, "values", name, "difference", [BUG])
        largest = max(abs(values["statistics"][end]) for end in ("low", "high"))
        assert (largest <= values["rounding"]) == (name not in found)
        assert largest > 0


def test_a_pass_of_other_tokens_has_no_difference(session: Session) -> None:
    changes = [{"kind": "bug", "bug": "bos-twice"}]
    assert len(part(session, TEXT, "about", None, "after", changes)["tokens"]) == len(session.ids(TEXT)) + 1
    assert "no difference" in part(session, TEXT, "values", "norm", "difference", changes)
    assert len(part(session, TEXT, "next", 0, "after", changes)) > 1  # before the first token of the pass before


OTHER = "Once upon a time there was a boy"
GOES_ON: list[list[dict[str, Any]]] = [
    *([], [HEAD], [BUG], [BUG, HEAD]),
    [{"kind": "patch", "step": "layers.1.residual_after_ffn", "text": OTHER, "token": -1}],
    [{"kind": "mean", "step": "layers.*.heads", "head": 1}, {"kind": "freeze", "step": "layers.2.v"}, WINDOW],
    [{"kind": "scale", "step": "layers.2.residual_after_ffn", "token": -1, "number": 3}],
    [{"kind": "scale", "step": "logits", "neuron": 5, "number": -2}],
    [{"kind": "swap", "step": "layers.0.k", "token": 1, "other": 7}],
    [{"kind": "set", "step": "layers.*.scores", "head": 2, "number": 1}],
    [{"kind": "zero", "step": "layers.3.attention_weights", "neuron": 0}],
]


@pytest.mark.parametrize("changes", GOES_ON, ids=str)
def test_the_text_goes_on_by_the_likeliest_tokens(
    session: Session, changes: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_N_GOES_ON", 3)
    model, edits = apply(session.model, TEXT, from_dicts(changes))
    ids = model.token_ids(TEXT)
    for _ in range(3):
        ids.append(int(model.forward(ids, edits=edits)[-1].argmax()))
    found = part(session, TEXT, "goes_on", None, "after", changes)
    assert found == [model.piece(token) for token in ids[-3:]]
    assert part(session, TEXT, "goes_on", None, "before", changes) == part(session, TEXT, "goes_on")


def test_the_python_of_the_changes_gives_their_logits_and_prints_the_likeliest_tokens(
    session: Session, capsys: pytest.CaptureFixture[str]
) -> None:
    named: dict[str, Any] = {}
    exec(part(session, TEXT, "python", None, "after", [BUG, WRONG, HEAD]), named)
    expected = logits_of(session, TEXT, [BUG, HEAD])
    np.testing.assert_allclose(named["logits"], expected, rtol=2e-3, atol=2e-3)
    likeliest = [session.model.piece(token) for token in np.argsort(expected[-1])[:-6:-1]]
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == likeliest


def test_numbers_that_are_none_are_answered(session: Session) -> None:
    changes = [HEAD]
    changes += [{"kind": "scale", "step": f"layers.1.{kind}_rotated", "number": 1e30} for kind in "qk"]
    for name, of in (("about", None), ("values", "logits"), ("sizes", "q"), ("lens", None), ("next", 2)):
        for shown in ("after", "difference"):
            json.dumps(part(session, TEXT, name, of, shown, changes), allow_nan=False)
    assert part(session, TEXT, "next", 2, "after", changes)[0]["after"] is None
    assert "nan" in part(session, TEXT, "goes_on", None, "after", changes).lower()


_PLACE: dict[str, st.SearchStrategy[Any]] = {
    "step": st.sampled_from(["layers.0.q", "layers.*.heads", "embedding", "logits", "*.scores", "nothing", ""]),
    "token": st.none() | st.integers(-7, 7),
    "head": st.none() | st.integers(-5, 5),
    "neuron": st.none() | st.integers(-3, 40),
    "on": st.booleans(),
}
_NUMBER: dict[str, st.SearchStrategy[Any]] = {**_PLACE, "number": st.floats(width=32, allow_nan=False) | st.just("1")}
_TEXT = st.sampled_from(["1 2 3 4 5", "1"]) | st.lists(st.integers(0, 20), min_size=5, max_size=5)
_KINDS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    **dict.fromkeys(("scale", "set", "add"), _NUMBER),
    **dict.fromkeys(("zero", "mean", "freeze"), _PLACE),
    "swap": {**_PLACE, "other": st.integers(-7, 7)},
    "patch": {**_PLACE, "text": _TEXT},
    "window": {"window": st.none() | st.integers(-1, 9)},
    "theta": {"theta": st.floats(0, 1e6)},
    "bug": {"bug": st.sampled_from(["theta", "tiled-heads", "bos-twice", "no-window", "y"])},
    "x": {},
}
CHANGES = st.one_of([st.fixed_dictionaries({"kind": st.just(kind), **more}) for kind, more in _KINDS.items()])


@settings(max_examples=40)
@given(st.lists(CHANGES, max_size=4))
def test_any_changes_are_made_or_refused_in_words(changes: list[dict[str, Any]]) -> None:
    found = Session(model_of(SMALL), "")
    wanted = [{"name": name, "of": of, "shown": "after"} for name, of in (("about", None), ("next", 0), ("python", ""))]
    about, *others = found.answer(question_of("1 2 3 4 5", changes), wanted, ignored)
    problems = about["value"]["changes"]["problems"]
    assert all("\n" not in problem and problem for problem in problems.values())
    assert all("value" in other for other in others)
    for number, change in enumerate(changes):
        if change.get("on") is not False and number not in problems:
            alone = found.answer(question_of("1 2 3 4 5", [change]), wanted[:1], ignored)[0]["value"]["changes"]
            assert alone["problems"] == {} or change["kind"] in ("freeze", "patch")  # another change has other tokens


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
        {"name": "sizes", "of": "logits", "shown": "before"},
        {"name": "sizes", "of": "q_lora_a", "shown": "difference"},
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


def test_what_can_wait_lets_others_go_first_and_goes_on() -> None:
    work, begun, order = Work(), threading.Event(), []
    threading.Thread(target=work.run, daemon=True).start()

    def patient(progress: Any) -> str:
        for done in range(10**6):
            progress(done, 10**6)
            begun.set()
            if order:
                order.append("patient")
                return "done"
        return "alone"

    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(work.ask("r", "one", patient, can_wait=True)))
    thread.start()
    assert begun.wait(10)
    assert work.ask("r", "one", lambda progress: order.append("urgent") or 3) == 3
    thread.join(10)
    assert (found, order) == (["done"], ["urgent", "patient"])


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
