"""Going on in Chromium: the next token drawn or chosen, branches, undo, and both sides of a change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.browser import Complaints, needs_chromium, quiet_tab
from support.live_page import HOSTILE, PIECES, opened, served, shows, typed

import mistral_ref
from mistral_ref.study.live.session import Session

pytestmark = [pytest.mark.slow, needs_chromium]

TEXT = "Tom went to the park. Then"
GO_ON = "go_on/embedding/0/0/7"
SIDES = "document.querySelectorAll('.sides section').length"
CUT = "[...document.querySelectorAll('ol.draws .cut small')].map((node) => node.textContent)"


@pytest.fixture(scope="module")
def url(model: mistral_ref.Model) -> Iterator[str]:
    with served(Session(model, "a <b>model</b>"), TEXT) as url:
        yield url


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Any]:
    with quiet_tab(browser, url) as tab:
        yield opened(tab, url, GO_ON)


def pieces(model: mistral_ref.Model, *more: int) -> list[str]:
    return [model.piece(token) for token in [*model.token_ids(TEXT), *more]]


def goes_on(tab: Any, press: Callable[[], None]) -> None:
    """Press something, and wait until there is one token more."""
    n_tokens = tab.evaluate(f"{PIECES}.length")
    press()
    tab.wait_for_function(f"(n) => {PIECES}.length === n", arg=n_tokens + 1)


def slid(tab: Any, name: str, value: int) -> None:
    tab.wait_for_selector("ol.draws")
    tab.fill(f'[data-key="{name}"]', str(value))


def test_the_text_that_is_written_is_that_of_generate(tab: Any, model: mistral_ref.Model) -> None:
    slid(tab, "temperature", 80)
    slid(tab, "top-p", 90)
    tab.fill('[data-key="seed"]', "3")
    tab.keyboard.press("Tab")
    drawn = [token.id for token in model.generate(TEXT, max_tokens=4, temperature=0.8, top_p=0.9, seed=3)]
    for number in range(4):
        tab.keyboard.press("n")
        shows(tab, pieces(model, *drawn[: number + 1]))
    tab.keyboard.press("u")
    shows(tab, pieces(model, *drawn[:3]))
    tab.click('[data-key="tab attention"]')
    tab.wait_for_function("() => document.querySelector('main figure canvas')?.ariaLabel.includes('11 rows')")


def test_the_reader_chooses_another_token_and_comes_back(tab: Any, model: mistral_ref.Model) -> None:
    comma, he = (model.token_ids(text)[-1] for text in ("and,", "and he"))
    tab.click('[aria-label^="go on with ,"]')
    shows(tab, pieces(model, comma))
    tab.click("[data-key=undo]")
    shows(tab, pieces(model))
    tab.click('[aria-label^="go on with ▁he:"]')
    shows(tab, pieces(model, he))
    tree = "[...document.querySelectorAll('.chosen-tree button')].map((node) => node.textContent)"
    assert tab.evaluate(tree) == ["…", ",", "▁he"]
    tab.focus(".chosen-tree [aria-current]")
    for key, more in (("ArrowUp", [comma]), ("ArrowDown", [he]), ("ArrowLeft", []), ("ArrowRight", [comma])):
        tab.keyboard.press(key)
        shows(tab, pieces(model, *more))
        tab.wait_for_function("() => document.activeElement.ariaCurrent === 'true'")
    tab.click("[data-key='make text']")
    tab.wait_for_function(f"() => document.querySelector('textarea').value === '{TEXT},'")
    shows(tab, [model.piece(token) for token in model.token_ids(f"{TEXT},")])
    tab.wait_for_selector(".chosen-tree", state="detached")


def test_a_setting_shows_what_it_cuts_off(tab: Any) -> None:
    slid(tab, "top-p", 90)
    tab.wait_for_function(f"() => {CUT}.length > 3 && {CUT}.every((name) => name === 'top-p')")
    slid(tab, "min-p", 50)
    tab.wait_for_function(f"() => {CUT}[0] === 'min-p' && {CUT}.at(-1) === 'top-p'")
    slid(tab, "temperature", 0)
    tab.wait_for_function(f"() => {CUT}.every((name) => name === 'temperature 0')")
    assert "needs no random number" in tab.text_content("main")


def test_before_and_after_stand_side_by_side(tab: Any, model: mistral_ref.Model) -> None:
    tab.wait_for_selector("ol.draws")
    assert tab.evaluate(SIDES) == 1
    tab.click('[data-key="few slots"]')
    tab.wait_for_function(f"() => {SIDES} === 2")
    for _ in range(3):
        goes_on(tab, lambda: tab.keyboard.press("n"))
    tab.wait_for_selector("text=It has overwritten the key of 2")
    assert tab.get_attribute('[data-key="shown after"]', "aria-pressed") == "true"


def test_a_draft_is_shown_and_taken(tab: Any, model: mistral_ref.Model) -> None:
    text = "Tom had a red ball. Tom had a red"
    typed(tab, text, [model.piece(token) for token in model.token_ids(text)])
    tab.wait_for_selector("table.draft, [data-key=draft]")
    if tab.is_visible("[data-key=draft]"):  # on a slow machine the draft is computed when it is asked for
        tab.click("[data-key=draft]")
    tab.wait_for_selector("table.draft")
    drawn = tab.locator("table.draft tr:nth-child(2) td").count()
    assert tab.locator("table.draft tr:nth-child(1) .accepted").count() == drawn - 1 > 0
    tab.click('[data-key="take draft"]')
    tokens = [token.id for token in model.generate(text, max_tokens=drawn, temperature=1, seed=1)]
    shows(tab, [model.piece(token) for token in [*model.token_ids(text), *tokens]])


def test_a_link_brings_back_what_has_been_chosen(tab: Any, model: mistral_ref.Model) -> None:
    (he,) = model.token_ids("and he")[2:]
    tab.click('[aria-label^="go on with ▁he:"]')
    shows(tab, pieces(model, he))
    tab.reload()
    shows(tab, pieces(model, he))
    tab.wait_for_selector(".chosen-tree [aria-current]")
    assert tab.input_value("textarea") == TEXT


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_narrow_screen_and_runs_no_text(browser: Any, url: str, model: mistral_ref.Model, theme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=theme)
    tab = context.new_page()
    complaints = Complaints(tab, url)
    tab.goto(f"{url}#{GO_ON}")
    typed(tab, HOSTILE, [model.piece(token) for token in model.token_ids(HOSTILE)])
    for _ in range(2):
        goes_on(tab, lambda: tab.click("[data-key=next]"))
    tab.wait_for_selector(".chosen-tree [aria-current]")
    assert tab.evaluate(f"{PIECES}.length") > len(model.token_ids(HOSTILE))
    assert tab.evaluate("typeof window.hacked") == "undefined"
    assert tab.evaluate("document.images.length") == 0
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    unnamed = """[...document.querySelectorAll('button, input, select, textarea')]
        .filter((node) => node.checkVisibility())
        .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.closest('label')))"""
    assert tab.evaluate(f"{unnamed}.length") == 0
    context.close()
    assert complaints == []
