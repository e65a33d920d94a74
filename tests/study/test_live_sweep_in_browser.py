"""Sweeps in Chromium: chosen, run, ended, read by keyboard, and made a change."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.browser import IS_DRAWN, Complaints, needs_chromium, quiet_tab
from support.live_page import HOSTILE, opened, served

import mistral_ref
from mistral_ref.study.live import sweeping
from mistral_ref.study.live.session import Session
from mistral_ref.study.patching import ablate, patch

pytestmark = [pytest.mark.slow, needs_chromium]

TOM, LILY = (f"{name} went to the park. Then" for name in ("Tom", "Lily"))
SWEEP = "sweep/embedding/0/0/7"


@pytest.fixture(scope="module")
def url(model: mistral_ref.Model) -> Iterator[str]:
    with served(Session(model, "a <b>model</b>"), TOM) as url:
        yield url


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Any]:
    with quiet_tab(browser, url) as tab:
        yield opened(tab, url, SWEEP)


def chosen(tab: Any, **fields: str) -> None:
    for name, value in {"first": "she", "second": "he", **fields}.items():
        (tab.select_option if name in ("by", "how") else tab.fill)(f'[data-key="sweep {name}"]', value)


def test_the_map_is_the_librarys_and_a_cell_becomes_a_change(tab: Any, model: mistral_ref.Model) -> None:
    chosen(tab, how="patch", other=LILY)
    tab.click('[data-key="sweep run"]')
    tab.wait_for_selector(".sweep-found")
    tab.wait_for_function(IS_DRAWN)
    metric = (model.token_ids("and she")[-1], model.token_ids("and he")[-1])
    expected = patch(model, TOM, LILY, by="head", metric=metric)
    tab.click("summary")
    cells = tab.evaluate("[...document.querySelectorAll('.sweep-all td')].map((cell) => cell.textContent)")[1:]
    numbers = [float(cell.replace("−", "-")) for cell in cells]
    assert numbers == pytest.approx(expected.change.ravel().tolist(), rel=1e-3, abs=1e-6)
    tab.focus("main figure canvas")
    for key in ("Home", *["ArrowDown"] * 4, *["ArrowRight"] * 3, "Enter"):
        tab.keyboard.press(key)
    tab.click('[data-key="add from sweep"]')
    tab.wait_for_selector("ul.changes li")
    assert "head 3 of layers.4.heads" in tab.text_content("ul.changes li")
    tab.wait_for_selector("text=It is among your changes")
    tab.click('[data-key="to the step"]')
    tab.wait_for_selector("main h2")
    assert tab.evaluate("[state.view, state.name, state.head]") == ["block", "layers.4.heads", 3]


@pytest.mark.parametrize("by", ["token", "step"])
def test_a_sweep_is_run_by_keyboard_alone(tab: Any, model: mistral_ref.Model, by: Any) -> None:
    chosen(tab, by=by, how="mean")
    tab.focus('[data-key="sweep second"]')
    tab.keyboard.press("Enter")
    tab.wait_for_selector(".sweep-found")
    metric = (model.token_ids("and she")[-1], model.token_ids("and he")[-1])
    row, column, _ = ablate(model, TOM, by=by, metric=metric, to="mean").top(1)[0]
    tab.focus('[data-key="top 0"]')
    tab.keyboard.press("Enter")
    tab.focus('[data-key="add from sweep"]')
    tab.keyboard.press("Enter")
    tab.wait_for_selector("ul.changes li")
    assert (f"{row}.{column}" if by == "step" else row) in tab.text_content("ul.changes li")
    assert "to the mean" in tab.text_content("ul.changes li")
    assert tab.evaluate("question.changes[0].kind") == "mean"


def test_a_sweep_shows_how_far_it_is_and_can_be_ended(tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()

    def endless(*arguments: Any, progress: Any, **settings: Any) -> None:
        try:
            while True:
                progress(3, 40)
        finally:
            ended.set()

    monkeypatch.setattr(sweeping, "ablate", endless)
    chosen(tab)
    tab.click('[data-key="sweep run"]')
    tab.wait_for_selector("text=3 of 40")
    tab.click('[data-key="tab lens"]')
    tab.wait_for_selector("table.lens")  # which comes first
    tab.click('[data-key="tab sweep"]')
    tab.click("text=Cancel")
    assert ended.wait(10)
    tab.wait_for_selector("text=Run the sweep")
    assert tab.locator(".sweep-found").count() == 0


def test_what_cannot_be_swept_is_said(tab: Any) -> None:
    chosen(tab, how="patch", other=HOSTILE, first="nosuchword")
    tab.click('[data-key="sweep run"]')
    tab.wait_for_selector(".sweep-form .problem")
    assert "nosuchword" in tab.text_content(".sweep-form .problem")
    tab.fill('[data-key="sweep first"]', "she")
    tab.click('[data-key="sweep run"]')
    tab.wait_for_function("() => document.querySelector('.sweep-form .problem')?.textContent.includes('tokens')")
    assert tab.evaluate("typeof window.hacked") == "undefined"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_narrow_screen(browser: Any, url: str, theme: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=theme)
    tab = context.new_page()
    complaints = Complaints(tab, url)
    tab.goto(f"{url}#{SWEEP}")
    chosen(tab, by="token")
    tab.click('[data-key="sweep run"]')
    tab.wait_for_selector(".sweep-found")
    tab.click("summary")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    context.close()
    assert complaints == []
