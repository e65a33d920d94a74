"""The live page in Chromium: typed at, loaded again, opened twice, asked from elsewhere, and left by its server."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest
from support.browser import IS_DRAWN, Complaints, launched, needs_chromium
from support.command import COMMAND, start

import mistral_ref
from mistral_ref.study.live.server import LiveServer
from mistral_ref.study.live.session import Session
from mistral_ref.study.live.work import Work

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.slow, needs_chromium]

TEXT = "Once upon a time there was a little girl"
VIEWS = ("block", "attention", "ring", "field", "rope", "heads", "lens", "cost")
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>bold</b>"
PIECES = "[...document.querySelectorAll('[aria-label=Tokens] button bdi')].map((node) => node.textContent)"


@pytest.fixture(scope="module")
def model() -> mistral_ref.Model:
    return mistral_ref.load(backend="numpy")


@pytest.fixture(scope="module")
def url(model: mistral_ref.Model) -> Iterator[str]:
    session, work = Session(model, "a <b>model</b>"), Work()
    session.begin(TEXT, lambda done, total: None)
    with LiveServer(session, work) as server:
        for target, arguments in ((server.serve_forever, (0.01,)), (work.run, ())):
            Thread(target=target, args=arguments, daemon=True).start()
        yield server.url
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        yield launched(driver)


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Any]:
    """A tab in which nothing may be complained of."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    complaints = Complaints(tab, url)
    yield tab
    context.close()
    assert complaints == []


def opened(tab: Any, url: str, address: str = "block/embedding") -> Any:
    tab.goto(f"{url}#{address}")
    tab.reload()
    tab.wait_for_selector("main h2")
    return tab


def typed(tab: Any, text: str, pieces: list[str]) -> None:
    """Type a text, and wait until its pass is shown."""
    tab.fill("textarea", text)
    tab.wait_for_function(f"(pieces) => JSON.stringify({PIECES}) === JSON.stringify(pieces)", arg=pieces)


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
        tab.wait_for_function("(piece) => document.querySelector('aside .strong bdi')?.textContent === piece", arg=best)


def test_the_chosen_token_shows_its_merges(tab: Any, url: str, model: mistral_ref.Model) -> None:
    opened(tab, url)
    tab.click("[aria-label=Tokens] button:nth-child(5)")
    tab.wait_for_function("() => document.querySelector('.merges')?.textContent.includes('▁time 4')")
    states = tab.evaluate("[...document.querySelectorAll('.merges .state')].map((node) => node.textContent)")
    assert set(states) == {"▁time"}
    assert len(states) > 3


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
