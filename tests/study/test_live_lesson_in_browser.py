"""The live page in a lesson: changes are tried one after the other, taken back, found again, and taken elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.browser import IS_DRAWN, needs_chromium
from support.live_page import changed, opened, served, shows, typed

import mistral_ref
from mistral_ref.study.live.session import Session

pytestmark = [pytest.mark.slow, needs_chromium]

TEXT = "Tom went to the park. Then"
WORDS = "[...document.querySelectorAll('ul.changes li bdi')].map((node) => node.textContent)"


@pytest.fixture(scope="module")
def url(model: mistral_ref.Model) -> Iterator[str]:
    with served(Session(model, "a model", exercises=True), TEXT) as url:
        yield url


def lists(tab: Any, *words: str) -> None:
    """Wait until the changes are these."""
    tab.wait_for_function(f"(words) => JSON.stringify({WORDS}) === JSON.stringify(words)", arg=list(words))


def tried(tab: Any, name: str, value: str, words: str) -> None:
    """Put a value into a field, press Enter, and wait until the only change is this one."""
    tab.fill(f'[data-key="edit {name}"]', value)
    tab.keyboard.press("Enter")
    lists(tab, words)


def test_another_window_takes_the_place_of_the_one_before(tab: Any, url: str) -> None:
    opened(tab, url)
    tab.select_option('[data-key="edit kind"]', "window")
    for window in ("8", "5", "7"):
        tried(tab, "window", window, f"let a query see {window} keys, itself included")


def test_a_change_is_edited_in_its_place(tab: Any, url: str) -> None:
    opened(tab, url, "attention/layers.2.q/2/3/5")
    changed(tab, "zero", step="layers.4.heads", head="1")
    tab.select_option('[data-key="edit kind"]', "scale")
    tab.click('[data-key="edit 0"]')
    assert tab.input_value('[data-key="edit kind"]') == "zero"
    tab.select_option('[data-key="edit kind"]', "scale")
    for number in ("3", "0.5"):
        tried(tab, "number", number, f"multiply head 1 of layers.4.heads by {number}")
    tab.click('[data-key="edited"]')
    assert tab.input_value('[data-key="edit step"]') == "layers.2.heads"  # what is chosen in the view, again
    changed(tab, "zero")
    lists(tab, "multiply head 1 of layers.4.heads by 0.5", "set head 3 of layers.2.heads to 0")


def test_back_takes_a_change_back_and_an_exercise_too(tab: Any, url: str) -> None:
    opened(tab, url, "attention/layers.2.q/2/3/5")
    typed(tab, "Tom had a ball", ["<s>", "▁Tom", "▁had", "▁a", "▁ball"])
    changed(tab, "zero", step="layers.4.heads", head="1")
    tab.click('[data-key="remove 0"]')
    lists(tab)
    tab.go_back()
    lists(tab, "set head 1 of layers.4.heads to 0")
    assert tab.text_content("main h2") == "Who looks at whom"  # the view stays
    tab.click('[data-key="exercise neuron"]')
    shows(tab, ["<s>", "▁Once", "▁upon", "▁a"])
    tab.go_back()
    lists(tab, "set head 1 of layers.4.heads to 0")
    assert tab.input_value("textarea") == "Tom had a ball"


def test_what_has_been_changed_is_marked_where_it_is(tab: Any, url: str) -> None:
    opened(tab, url, "attention/layers.4.attention_weights/4/3/7")
    changed(tab, "zero")
    tab.wait_for_selector('[data-key="head 3"] .changed')
    assert tab.locator("main .thumbs .changed").count() == 1
    tab.wait_for_selector("text=Your change: set head 3 of layers.4.heads to 0")
    tab.click('[data-key="shown difference"]')
    tab.wait_for_selector("text=they are the same before and after")
    tab.click('[data-key="tab block"]')
    tab.wait_for_selector('[data-key="box layers.4.heads"].edited')
    assert tab.locator(".box.edited").count() == 1


def test_the_largest_number_leads_to_its_neuron(tab: Any, url: str, model: mistral_ref.Model) -> None:
    opened(tab, url, "block/layers.0.ffn_hidden/0/0/3")
    typed(tab, "Once upon a", ["<s>", "▁Once", "▁upon", "▁a"])
    assert not tab.is_visible('[data-key="this neuron"]')
    assert not tab.is_visible('[data-key="edit head"]')  # the step has no heads
    tab.click('[aria-label="The largest of them"] button')  # the first of them
    tab.wait_for_selector("main figure output >> text=ffn 23")
    tab.click('[data-key="this neuron"]')
    assert tab.input_value('[data-key="edit neuron"]') == "23"
    changed(tab, "zero")
    lists(tab, "set neuron 23 of layers.0.ffn_hidden to 0")


def test_another_text_is_counted_while_it_is_typed(tab: Any, url: str) -> None:
    opened(tab, url)
    tab.select_option('[data-key="edit kind"]', "patch")
    assert tab.input_value('[data-key="edit other text"]') == TEXT  # to be changed
    tab.fill('[data-key="edit other text"]', "Lily and Sue went to the park. Then")
    tab.wait_for_selector("text=10 tokens; expected 8")
    tab.fill('[data-key="edit other text"]', "Lily went to the park. Then")
    tab.wait_for_selector("text=8 tokens, as many as the text")


def test_the_first_change_moves_nothing(tab: Any, url: str) -> None:
    opened(tab, url, "attention/layers.4.attention_weights/4/3/7")
    tab.wait_for_function(IS_DRAWN)
    places = """[...document.querySelectorAll('nav, main h2, main figure')]
        .map((one) => one.getBoundingClientRect().top + scrollY)"""
    before = tab.evaluate(places)
    changed(tab, "zero")
    tab.wait_for_selector('[data-key="shown after"]')
    tab.wait_for_function(IS_DRAWN)
    assert tab.evaluate(places) == before


def test_a_link_of_a_server_that_has_ended_is_pasted(
    browser: Any, tab: Any, url: str, model: mistral_ref.Model
) -> None:
    with served(Session(model, "a model"), "Lily") as gone:
        other = opened(browser.new_context().new_page(), gone, "go_on/layers.1.gate/1/2/3")
        typed(other, "Tom had a ball", ["<s>", "▁Tom", "▁had", "▁a", "▁ball"])
        other.wait_for_selector("ol.draws")
        other.fill('[data-key="temperature"]', "140")
        other.fill('[data-key="top-k"]', "5")
        other.fill('[data-key="seed"]', "9")
        changed(other, "scale", step="layers.*.heads", head="1", number="2")
        other.wait_for_function("() => location.hash.includes('drawing')")
        link = other.url
        other.reload()
        other.wait_for_function("() => document.querySelector('[data-key=seed]')?.value === '9'")
        other.context.close()
    opened(tab, url)
    tab.click("[data-key=Open]")
    tab.fill("[data-key=link]", "http://127.0.0.1/nothing")
    tab.wait_for_selector("text=This link holds no text")
    tab.fill("[data-key=link]", link)
    lists(tab, "multiply head 1 of layers.*.heads by 2")
    assert tab.input_value("textarea") == "Tom had a ball"
    assert tab.text_content("main h2") == "What comes next, and what then"
    assert [tab.input_value(f'[data-key="{name}"]') for name in ("temperature", "top-k", "seed")] == ["140", "5", "9"]


def test_a_text_keeps_its_branches(tab: Any, url: str) -> None:
    opened(tab, url, "go_on/embedding/0/0/7")
    pieces = ["<s>", "▁Tom", "▁went", "▁to", "▁the", "▁park", ".", "▁Then"]
    tab.click('[aria-label^="go on with ▁he:"]')
    shows(tab, [*pieces, "▁he"])
    typed(tab, f"{TEXT} t", [*pieces, "▁t"])
    assert tab.locator(".chosen-tree").count() == 0
    typed(tab, TEXT, pieces)
    tab.click(".chosen-tree button:last-child")
    shows(tab, [*pieces, "▁he"])


def test_a_file_that_is_opened_shows_what_was_saved(tab: Any, url: str, tmp_path: Path) -> None:
    opened(tab, url)
    (tmp_path / "kept.json").write_text(
        '{"text": "Tom", "changes": [], "shown": "difference", "drawing": {"temperature": 9, "top_k": "x", "seed": -3}}'
    )
    tab.set_input_files('input[type="file"]', tmp_path / "kept.json")
    shows(tab, ["<s>", "▁Tom"])
    tab.click('[data-key="tab go_on"]')
    assert [tab.input_value(f'[data-key="{name}"]') for name in ("temperature", "top-k", "seed")] == ["200", "60", "0"]
    assert not tab.is_visible('[aria-label="Which pass is shown"]')


def test_a_token_that_is_a_byte_is_made_of_no_merges(tab: Any, url: str) -> None:
    opened(tab, url)
    typed(tab, "Tom <", ["<s>", "▁Tom", "▁", "<0x3C>"])
    tab.wait_for_selector(".merges >> text=is a byte of a character that is no token")
    assert tab.locator(".merges .state").count() == 1


def test_a_reload_keeps_the_colours(tab: Any, url: str) -> None:
    opened(tab, url)
    tab.keyboard.press("t")
    tab.reload()
    tab.wait_for_selector("main h2")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"


def test_another_view_is_seen_from_its_heading(tab: Any, url: str) -> None:
    opened(tab, url, "block/embedding")
    tab.wait_for_function(IS_DRAWN)
    tab.evaluate("scrollTo(0, 600)")
    tab.keyboard.press("2")
    tab.wait_for_function("() => document.querySelector('main h2').textContent === 'Who looks at whom'")
    assert tab.evaluate("document.querySelector('main h2').getBoundingClientRect().top >= 0")
