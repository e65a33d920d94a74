"""The live page in Chromium: typed at, loaded again, opened twice, asked from elsewhere, and left by its server."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from support.browser import IS_DRAWN, Complaints, needs_chromium, quiet_tab
from support.command import COMMAND, start
from support.live_page import HOSTILE, PIECES, changed, opened, served, typed

import mistral_ref
from mistral_ref.steps import Step
from mistral_ref.study.live.exercises import EXERCISES
from mistral_ref.study.live.live_pass import LivePass
from mistral_ref.study.live.session import Session

pytestmark = [pytest.mark.slow, needs_chromium]

TEXT = "Once upon a time there was a little girl"
VIEWS = ("block", "attention", "ring", "field", "rope", "heads", "lens", "cost")


@pytest.fixture(scope="module")
def url(model: mistral_ref.Model) -> Iterator[str]:
    with served(Session(model, "a <b>model</b>", exercises=True), TEXT) as url:
        yield url


def pieces_of(model: mistral_ref.Model, text: str) -> list[str]:
    return [model.piece(token) for token in model.token_ids(text)]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_view_is_drawn_and_none_is_wider_than_the_screen(
    browser: Any, url: str, model: mistral_ref.Model, theme: str, width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme)
    tab = context.new_page()
    complaints = Complaints(tab, url)
    for view in VIEWS:
        opened(tab, url, f"{view}/layers.2.attention_weights/2/3/4")
        typed(tab, "Tom had a red ball", pieces_of(model, "Tom had a red ball"))
        if view in ("block", "attention"):
            tab.wait_for_function(IS_DRAWN)
        assert tab.evaluate("document.documentElement.dataset.theme") == theme
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate("document.body.innerText.match(/\\b(false|null|undefined|NaN)\\b/g)") is None
    context.close()
    assert complaints == []


def test_what_is_typed_is_shown_in_every_view(tab: Any, url: str, model: mistral_ref.Model) -> None:
    opened(tab, url, "attention/layers.2.attention_weights/2/3/8")
    for text in ("Tom", "Tom had a red ball. One day", "Lily saw an extraordinary ☃", TEXT):
        typed(tab, text, pieces_of(model, text))
        n_tokens = len(pieces_of(model, text))
        tab.wait_for_function(
            "(size) => document.querySelector('main figure canvas')?.ariaLabel.includes(`${size} row`)", arg=n_tokens
        )
        best = model.piece(int(model.forward(text, last_only=True).argmax()))
        tab.wait_for_function("(piece) => document.querySelector('aside tbody bdi')?.textContent === piece", arg=best)


def test_the_tokens_before_what_is_typed_keep_their_buttons(tab: Any, url: str, model: mistral_ref.Model) -> None:
    opened(tab, url, "attention/layers.0.attention_weights/0/0/4")
    marked = "[...tokenStrip.children].filter((node) => node.style.boxShadow).length"
    tab.wait_for_function(f"() => {marked} > 0")  # by their weights
    tab.evaluate("[...tokenStrip.children].forEach((node, index) => (node.madeAt = index))")
    stops = "[...tokenStrip.children].flatMap((node, index) => (node.tabIndex === 0 ? [index, node.ariaPressed] : []))"
    for text, n_same in (
        (f"{TEXT} named", len(pieces_of(model, TEXT))),
        (TEXT, len(pieces_of(model, TEXT))),
        ("Once upon a day", 4),
        ("Tom", 1),
    ):
        typed(tab, text, pieces_of(model, text))
        kept = tab.evaluate("[...tokenStrip.children].map((node) => node.madeAt)")
        assert kept == [*range(n_same), *[None] * (len(pieces_of(model, text)) - n_same)]
        chosen = min(4, len(pieces_of(model, text)) - 1)
        assert tab.evaluate(stops) == [chosen, "true"]
        numbers = tab.evaluate("[...tokenStrip.children].map((node) => Number(node.lastChild.textContent))")
        assert numbers == list(range(len(numbers)))
    tab.focus("[aria-label=Tokens] button[tabindex='0']")
    tab.keyboard.press("ArrowLeft")
    tab.wait_for_function(f"() => JSON.stringify({stops}) === '[0,\"true\"]'")
    assert tab.evaluate("document.activeElement === tokenStrip.children[0]")
    tab.click('[data-key="tab lens"]')
    assert tab.evaluate(marked) == 0


def test_the_chosen_token_shows_its_merges(tab: Any, url: str, model: mistral_ref.Model) -> None:
    opened(tab, url)
    tab.click("[aria-label=Tokens] button:nth-child(5)")
    tab.wait_for_function("() => document.querySelector('.merges')?.textContent.includes('▁time 4')")
    states = tab.evaluate("[...document.querySelectorAll('.merges .state')].map((node) => node.textContent)")
    assert set(states) == {"▁time"}
    assert len(states) > 3


def shown_numbers(tab: Any, name: str) -> np.ndarray:
    return np.array(tab.evaluate("async (name) => [...await values(name)].map(String)", name), dtype=np.float32)


def test_each_view_shows_before_after_and_difference(tab: Any, url: str, model: mistral_ref.Model) -> None:
    opened(tab, url, "attention/layers.2.q/2/3/5")
    tab.wait_for_function(IS_DRAWN)
    assert not tab.is_visible('[aria-label="Which pass is shown"]')
    changed(tab, "zero")  # as it stands: the head that is chosen
    assert tab.text_content("ul.changes li bdi") == "set head 3 of layers.2.heads to 0"

    def off(heads_THK: np.ndarray) -> np.ndarray:
        heads_THK = heads_THK.copy()
        heads_THK[:, 3] = 0
        return heads_THK

    before, after = model.trace(TEXT), model.trace(TEXT, edits={"layers.2.heads": off})
    for shown, key in (("after", "a"), ("before", "b"), ("difference", "d")):
        tab.keyboard.press(key) if tab.evaluate("document.activeElement.matches('select, input')") is False else (
            tab.click(f'[data-key="shown {shown}"]')
        )
        assert tab.get_attribute(f'[data-key="shown {shown}"]', "aria-pressed") == "true"
        for name in ("layers.2.heads", "layers.4.q", "logits"):
            expected = {"before": before[name], "after": after[name], "difference": after[name] - before[name]}[shown]
            np.testing.assert_allclose(shown_numbers(tab, name), expected.ravel(), rtol=2**-10, atol=1e-4)
        for view in VIEWS:
            tab.click(f'[data-key="tab {view}"]')
            if view in ("block", "attention"):
                tab.wait_for_function(IS_DRAWN)
    best = [model.piece(int(trace["logits"][5].argmax())) for trace in (before, after)]
    pieces = tab.evaluate("[...document.querySelectorAll('table.next tbody bdi')].map((node) => node.textContent)")
    assert set(best) <= set(pieces)
    tab.click('[data-key="on 0"]')  # off again: there is no difference to show
    tab.wait_for_selector('[aria-label="Which pass is shown"]', state="hidden")
    np.testing.assert_allclose(shown_numbers(tab, "logits"), before["logits"].ravel(), rtol=2**-10, atol=1e-4)
    tab.click('[data-key="on 0"]')
    tab.wait_for_selector('[data-key="shown difference"][aria-pressed="true"]')
    tab.click('[data-key="remove 0"]')
    tab.wait_for_selector('[aria-label="Which pass is shown"]', state="hidden")


def test_a_change_that_cannot_be_made_says_so_beside_itself(tab: Any, url: str) -> None:
    opened(tab, url, "block/layers.1.q")
    changed(tab, "zero", token="99")
    changed(tab, "scale", token="", number="much")
    changed(tab, "patch", other_text=HOSTILE)
    changed(tab, "window", window="3")
    problems = (
        "[...document.querySelectorAll('ul.changes li')].map((one) => one.querySelector('.problem')?.textContent)"
    )
    first, second, third, fourth = tab.evaluate(problems)
    assert "99" in first
    assert "'much'" in second
    assert "tokens" in third
    assert fourth is None
    assert tab.evaluate("typeof window.hacked") == "undefined"
    assert tab.evaluate("document.images.length") == 0
    assert "let a query see 3 keys" in tab.text_content("ul.changes")


def test_changes_are_made_by_keyboard_alone(tab: Any, url: str) -> None:
    opened(tab, url, "block/layers.1.gate")
    tab.wait_for_function(IS_DRAWN)
    for _ in range(200):
        if tab.evaluate("document.activeElement.dataset.key") == "edit kind":
            break
        tab.keyboard.press("Tab")
    tab.keyboard.press("m")  # multiply by
    tab.keyboard.press("Tab")
    while tab.evaluate("document.activeElement.dataset.key") != "edit number":
        tab.keyboard.press("Tab")
    tab.keyboard.press("Control+A")
    tab.keyboard.type("0.5")
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => document.querySelector('ul.changes')?.textContent.includes('by 0.5')")
    assert tab.text_content("ul.changes bdi") == "multiply layers.1.gate by 0.5"
    assert tab.evaluate("document.activeElement.dataset.key") == "edit number"  # where the reader was
    unnamed = """[...document.querySelectorAll('button, input, select, textarea')]
        .filter((node) => node.checkVisibility())
        .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.closest('label')))"""
    assert tab.evaluate(f"{unnamed}.length") == 0


def test_a_link_and_a_file_bring_everything_back(
    browser: Any, tab: Any, url: str, model: mistral_ref.Model, tmp_path: Path
) -> None:
    opened(tab, url, "lens/layers.1.gate/1/2/3")
    typed(tab, "Tom had a red ball", pieces_of(model, "Tom had a red ball"))
    changed(tab, "zero", step="layers.*.heads", head="1")
    changed(tab, "bug")
    tab.click('[data-key="shown difference"]')
    with tab.expect_download() as download:
        tab.click("[data-key=Save]")
    download.value.save_as(tmp_path / "kept.json")
    address = tab.url
    context = browser.new_context()
    for way in ("link", "file"):
        other = context.new_page()
        if way == "link":
            other.goto(address)
        else:
            opened(other, url)
            other.set_input_files('input[type="file"]', tmp_path / "kept.json")
        other.wait_for_selector('[data-key="shown difference"][aria-pressed="true"]')
        assert other.input_value("textarea") == "Tom had a red ball"
        assert other.text_content("ul.changes") == tab.text_content("ul.changes")
        assert other.text_content("main h2") == "What each layer would say"
        assert other.text_content('[aria-label=Tokens] [aria-pressed="true"] bdi') == "▁a"
    (tmp_path / "other.json").write_text('{"text": 3}')
    other.set_input_files('input[type="file"]', tmp_path / "other.json")
    other.wait_for_selector("text=other.json holds no text")
    context.close()


@pytest.mark.parametrize(
    "kept",
    [
        *("%", "%E0%A4%A", "null", "[]", "{}", '{"text": 3, "changes": []}', '{"text": "x", "changes": [null]}'),
        *('{"text": "x", "changes": {}}', '{"text": "\\ud800", "changes": []}'),
        '{"text": "Tom", "changes": [{}, [], {"kind": {}, "on": "<b>"}, {"kind": "zero", "step": 3}], "shown": 7}',
    ],
)
def test_a_link_that_says_nothing_is_left_aside(tab: Any, url: str, kept: str) -> None:
    opened(tab, url, f"block/layers.1.q/1/2/3/{kept if kept.startswith('%') else quote(kept, safe='')}")
    tab.wait_for_function(IS_DRAWN)
    assert tab.text_content("section h2") == "layers.1.q"
    tab.click('[data-key="tab lens"]')  # the views go on
    tab.wait_for_selector("table.lens")
    n_problems = tab.evaluate("document.querySelectorAll('ul.changes .problem').length")
    assert n_problems == (4 if "Tom" in kept else 0)


def test_the_changes_are_copied_as_python(browser: Any, url: str, model: mistral_ref.Model) -> None:
    context = browser.new_context()
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab = opened(context.new_page(), url, "block/layers.2.q")
    changed(tab, "scale", token="2", head="1", number="3")
    tab.click('[data-key="Copy as Python"]')
    tab.wait_for_selector("text=copied")
    named: dict[str, Any] = {}
    exec(tab.evaluate("navigator.clipboard.readText()"), named)
    np.testing.assert_allclose(shown_numbers(tab, "logits"), named["logits"].ravel(), rtol=2**-9, atol=1e-3)
    tab.click('[data-key="tab go_on"]')
    tab.click("[data-key=next]")
    tab.wait_for_function(f"(n) => {PIECES}.length === n", arg=len(pieces_of(model, TEXT)) + 1)
    tab.evaluate("said.textContent = ''")
    tab.click('[data-key="Copy as Python"]')
    tab.wait_for_selector("text=copied")
    exec(tab.evaluate("navigator.clipboard.readText()"), named)
    assert len(named["logits"]) == len(pieces_of(model, TEXT)) + 1
    np.testing.assert_allclose(shown_numbers(tab, "logits"), named["logits"].ravel(), rtol=2**-9, atol=1e-3)
    context.close()


def test_an_exercise_is_done_on_the_page(tab: Any, url: str) -> None:
    opened(tab, url, "attention/layers.4.attention_weights/4/3/0")
    assert not tab.is_visible('[data-key="hint"]')
    tab.click('[data-key="exercise one-head"]')
    tab.wait_for_selector("[aria-label=Exercises] >> text=Nothing has been changed yet")
    exercise = EXERCISES["one-head"]
    assert tab.input_value("textarea") == exercise.text
    assert exercise.task in tab.text_content("[aria-label=Exercises]")
    tab.click('[data-key="hint"]')
    tab.wait_for_selector(f"text={exercise.hint}")
    changed(tab, "zero", step="layers.4.heads", head="2")
    tab.wait_for_selector("[aria-label=Exercises] >> text=/Not yet: “he” has .* %/")
    tab.click('[data-key="remove 0"]')
    tab.wait_for_selector("ul.changes", state="detached")
    changed(tab, "zero", step="layers.4.heads", head="3")
    tab.wait_for_selector(f"[aria-label=Exercises] .right >> text={exercise.done}")
    tab.click('[data-key="exercise neuron"]')
    tab.wait_for_selector("[aria-label=Exercises] >> text=Nothing has been changed yet")
    assert "✓" in tab.text_content('[data-key="exercise one-head"]')
    typed(tab, "Tom", ["<s>", "▁Tom"])
    tab.wait_for_selector("text=This exercise is about another text")
    tab.click('[data-key="exercise neuron"]')
    tab.wait_for_selector("text=Exercises of the course")


def test_the_page_begins_with_an_exercise(browser: Any, model: mistral_ref.Model) -> None:
    exercise = EXERCISES["neuron"]
    session = Session(model, "a model", exercises=True, exercise="neuron")
    with served(session, exercise.text) as url, quiet_tab(browser, url) as tab:
        tab.goto(url)
        tab.wait_for_selector("[aria-label=Exercises] >> text=Nothing has been changed yet")
        assert exercise.task in tab.text_content("[aria-label=Exercises]")
        assert tab.input_value("textarea") == exercise.text
        changed(tab, "zero", step="layers.0.ffn_hidden", neuron="23")
        tab.wait_for_selector(f"[aria-label=Exercises] .right >> text={exercise.done}")


def test_the_server_computes_one_thing_and_the_page_shows_how_far_it_is(
    tab: Any, url: str, model: mistral_ref.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk, slow = LivePass._walk, threading.Event()

    def slowly(self: LivePass, progress: Any) -> Iterator[Step]:
        for step in walk(self, progress):
            time.sleep(0 if slow.is_set() else 0.05)
            yield step

    opened(tab, url)
    tab.wait_for_function(IS_DRAWN)
    monkeypatch.setattr(LivePass, "_walk", slowly)
    tab.fill("textarea", "Tom had a red")
    tab.wait_for_function("() => /step \\d+ of 88/.test(document.querySelector('.status').textContent)")
    assert tab.is_visible("progress")
    assert "10 rows" in tab.get_attribute("main figure canvas", "aria-label")  # what was there is still shown
    assert tab.evaluate("[...document.querySelectorAll('[aria-label=Tokens] span bdi')].at(-1).textContent") == "▁red"
    slow.set()
    started_at = time.monotonic()
    typed(tab, "Lily", pieces_of(model, "Lily"))  # which ends the pass before
    assert time.monotonic() - started_at < 2
    assert not tab.is_visible("progress")


def test_the_lens_of_a_long_text_shows_the_tokens_around_the_chosen_one(
    tab: Any, url: str, model: mistral_ref.Model
) -> None:
    text = "Once upon a time there was a little girl. " * 18
    pieces = pieces_of(model, text)
    opened(tab, url, "lens")
    typed(tab, text, pieces)
    places = "[...document.querySelectorAll('table.lens thead small')].map((node) => +node.textContent)"
    last = len(pieces) - 1
    for token in (last, 0, 100):
        tab.evaluate("(token) => go({ token })", token)
        first = min(max(token - 80, 0), last - 159)
        tab.wait_for_function(f"(n) => {places}[0] === n", arg=first)
        assert tab.evaluate(places) == list(range(first, first + 160))
    tab.focus("table.lens button[tabindex='0']")
    tab.keyboard.press("ArrowRight")
    tab.wait_for_function(f"() => {places}[0] === 21 && document.activeElement.closest('table.lens')")
    assert tab.is_visible(f"text=Of {len(pieces)} tokens")


def test_costs_are_measured_when_it_is_asked_for(tab: Any, url: str) -> None:
    opened(tab, url, "cost")
    tab.click('[data-key="measure"]')
    tab.wait_for_selector('svg[aria-label^="Roofline"]')
    assert not tab.is_visible("progress")
    tab.click('[data-key="tab block"]')
    tab.wait_for_function("() => document.querySelector('section dl')?.textContent.includes('at the roof')")


def test_a_reload_brings_the_text_back(tab: Any, url: str, model: mistral_ref.Model) -> None:
    opened(tab, url)
    typed(tab, "Tom had a red ball", pieces_of(model, "Tom had a red ball"))
    tab.keyboard.press("Tab")
    for moment in range(3):  # also in the middle of a computation
        tab.reload()
        if moment:
            tab.wait_for_timeout(20 * moment)
    tab.wait_for_function(f"() => {PIECES}.includes('▁ball')")
    assert tab.input_value("textarea") == "Tom had a red ball"


def test_two_tabs_have_a_text_each(browser: Any, tab: Any, url: str, model: mistral_ref.Model) -> None:
    opened(tab, url)
    context = browser.new_context()
    other = opened(context.new_page(), url)
    for round_ in range(3):
        typed(tab, f"Tom {round_}", pieces_of(model, f"Tom {round_}"))
        typed(other, f"Lily {round_}", pieces_of(model, f"Lily {round_}"))
    assert tab.evaluate(PIECES) == pieces_of(model, "Tom 2")
    context.close()


def test_hostile_text_is_shown_and_never_run(tab: Any, url: str, model: mistral_ref.Model) -> None:
    for view in VIEWS:
        opened(tab, url, f"{view}/<img src=x onerror='window.hacked = 1'>/2/3/4")
        typed(tab, HOSTILE, pieces_of(model, HOSTILE))
        assert tab.text_content("h1") == "a <b>model</b>"
        assert tab.evaluate("typeof window.hacked") == "undefined"
        assert tab.evaluate("document.images.length + document.querySelectorAll('b.piece, main b b').length") == 0


def test_a_page_from_elsewhere_learns_nothing(browser: Any, url: str) -> None:
    context = browser.new_context()
    tab = context.new_page()
    tab.route("http://evil.example/", lambda route: route.fulfill(body="<p>evil</p>", content_type="text/html"))
    tab.goto("http://evil.example/")
    ask = """async (url) => {
        const json = { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" };
        const tries = [[url, {}], [url, { mode: "no-cors" }], [url + "tokens", json],
            [url + "tokens", { method: "POST", body: '{"text": "x", "reader": "r"}' }]];
        const found = [];
        for (const [address, options] of tries)
            found.push(await fetch(address, options).then((answer) => answer.text(), () => "refused"));
        return found;
    }"""
    assert set(tab.evaluate(ask, url)) <= {"refused", ""}
    frame = "(url) => document.body.append(Object.assign(document.createElement('iframe'), {src: url}))"
    tab.evaluate(frame, url)
    tab.wait_for_timeout(300)
    assert not any(part.query_selector("textarea") for part in tab.frames[1:])
    context.close()


def test_when_the_server_is_killed_the_page_says_so_and_stays(browser: Any) -> None:
    process = start(*COMMAND, "explore", "--backend", "numpy", "--no-browser", "--prompt", TEXT, text=True)
    own = process.stdout.readline().strip()
    context = browser.new_context()
    tab = opened(context.new_page(), own, "block/layers.1.q")
    tab.wait_for_function(IS_DRAWN)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    tab.wait_for_selector("text=The server has ended", timeout=15000)  # nobody has touched anything
    tab.fill("textarea", "Tom")
    tab.wait_for_selector("text=The server does not answer")
    assert "▁girl" in tab.evaluate(PIECES)
    assert tab.evaluate(IS_DRAWN)
    tab.keyboard.press("Tab")
    tab.click('[data-key="tab ring"]')
    assert tab.text_content("main h2") == "The ring of the cache"
    context.close()
