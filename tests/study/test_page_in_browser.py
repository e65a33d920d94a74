"""The page of a pass in Chromium: drawn fast and without a complaint, reached by keyboard, true to the library.

Skipped where there is no Chromium, Debian's package chromium, or no playwright to drive it: pip install -e ".[dev]".
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapters import adaptable, draw_deltas, write_peft
from support.browser import IS_DRAWN, Complaints, needs_chromium, quiet_tab
from support.tiny import MIXTURE, SMALL, model_of, tokens_for

import mistral_ref
from mistral_ref.config import MixtureOfExperts, ModelConfig, QueryTemperature, Yarn
from mistral_ref.files.adapters import with_adapters
from mistral_ref.reference_ops import ReferenceOps, attends
from mistral_ref.ring import Ring
from mistral_ref.rope import rotation
from mistral_ref.steps import step_names
from mistral_ref.study import report

pytestmark = [pytest.mark.slow, needs_chromium]

VIEWS = ("block", "attention", "ring", "field", "rope", "heads", "lens", "cost")
STORY = """Once upon a time there was a little girl named Lily. She had a red ball. One day, she went to the park with \
her mom. They saw a big dog. The dog was very happy and wanted to play with the ball. Lily was scared at first. She \
ran to her mom and said she wanted to go home. Her mom gave her a hug and smiled. The dog sat down. Lily and the dog \
played together until it was time to go home."""
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>bold</b>"

# Everything that a reader could want to act on, in the order of the page; hidden ones are left out.
CONTROLS = """() => [...document.querySelectorAll('button, input, a, select, canvas[tabindex], [role="button"]')]
    .filter((node) => node.checkVisibility())"""
# The names of the rows, each one tab stop, in which controls stand that are no tab stops themselves.
ROWS = """([controls, left]) =>
    left.map((index) => controls[index].closest('[role="toolbar"], [role="tablist"], table')?.ariaLabel)"""


@pytest.fixture(scope="module")
def path(model: mistral_ref.Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 64 tokens, all of their values in it."""
    path = tmp_path_factory.mktemp("page") / "trace.html"
    report.write(model, model.token_ids(STORY)[:64], path, title="the demonstration model")
    return path


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    with quiet_tab(browser, "file:") as tab:
        yield tab


def opened(tab: Any, path: Path, address: str = "block/embedding") -> Any:
    tab.goto(f"file://{path}#{address}")
    tab.reload()  # another address of the same file is no new page
    tab.wait_for_selector("main h2")
    return tab


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_every_view_is_drawn_and_none_is_wider_than_the_screen(
    browser: Any, path: Path, theme: str, width: int
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme)
    tab = context.new_page()
    complaints = Complaints(tab, "file:")
    for view in VIEWS:
        opened(tab, path, f"{view}/layers.2.attention_weights/2/3/40")
        if view in ("block", "attention"):
            tab.wait_for_function(IS_DRAWN)
        assert tab.evaluate("document.documentElement.dataset.theme") == theme
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert tab.evaluate("document.querySelector('main').innerText.length > 200")
    context.close()
    assert complaints == []


# Keeps what is written on canvases, and how far from the top or, for columns, from the left.
WRITTEN = """(() => {
    window.written = [];
    const write = CanvasRenderingContext2D.prototype.fillText;
    CanvasRenderingContext2D.prototype.fillText = function (text, x, y, most) {
        const { b, e, f, a } = this.getTransform(), ratio = devicePixelRatio;
        const isColumn = Math.abs(b) > 0.5;
        written.push({ text, isColumn, at: (isColumn ? e : f + y * a) / ratio });
        write.call(this, text, x, y, most);
    };
})()"""


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("view", ["block", "attention"])
def test_heat_maps_name_their_tokens_on_every_screen(
    browser: Any, path: Path, model: mistral_ref.Model, view: str, width: int
) -> None:
    pieces = [model.piece(token) for token in model.token_ids(STORY)[:64]]
    context = browser.new_context(viewport={"width": width, "height": 800})
    tab = context.new_page()
    tab.add_init_script(WRITTEN)
    opened(tab, path, f"{view}/layers.2.attention_weights/2/3/40")
    tab.wait_for_function(IS_DRAWN)
    tab.evaluate("written.length = 0; document.querySelector('main figure canvas').dispatchEvent(new Event('draw'))")
    written = tab.evaluate("written")
    rows, columns = ([one for one in written if one["isColumn"] == is_column] for is_column in (False, True))
    assert f"\u2068{pieces[40]}\u2069 40" in [row["text"] for row in rows]  # the chosen one
    for labels in (rows, columns) if view == "attention" else (rows,):
        assert len(labels) > 15
        for label in labels:
            piece, _, position = label["text"].rpartition(" ")
            assert piece == f"\u2068{pieces[int(position)]}\u2069"
        places = sorted(label["at"] for label in labels)
        assert min(np.diff(places)) > 8  # none is written over another
    context.close()


def test_a_screen_reader_is_told_what_every_canvas_shows(tab: Any, path: Path) -> None:
    named = """() => [...document.querySelectorAll('canvas')].map((canvas) => canvas.closest('[aria-hidden="true"]')
        ? canvas.closest('button')?.textContent : canvas.role && canvas.ariaLabel)"""
    for view in VIEWS:
        opened(tab, path, f"{view}/layers.2.attention_weights/2/3/40")
        if view in ("block", "attention"):
            tab.wait_for_function(IS_DRAWN)
        assert all(tab.evaluate(named))
    label = "document.querySelector('main figure canvas')?.ariaLabel"  # none until its values are unpacked
    opened(tab, path, "attention/layers.2.attention_weights/2/3/40")
    for key, fact in {"h": "head 4", ".": "41 is chosen", "ArrowUp": "layer 1"}.items():
        tab.keyboard.press(key)
        tab.wait_for_function(f"() => {label}?.includes('{fact}')")
    assert "64 rows, 64 columns, values from 0 to 1" in tab.evaluate(label)
    tab.focus("main figure canvas")
    tab.keyboard.press("ArrowDown")
    described = "document.getElementById(document.querySelector('main figure canvas').getAttribute('aria-describedby'))"
    assert "looks at" in tab.evaluate(f"{described}.textContent")


RIGHT_MIDDLE = """() => {
    const canvas = document.querySelector('main figure canvas');
    return [...canvas.getContext('2d').getImageData(canvas.width - 3, canvas.height / 2, 1, 1).data];
}"""


@pytest.mark.parametrize("view", VIEWS)
def test_paper_is_white_and_has_no_controls(browser: Any, path: Path, view: str) -> None:
    context = browser.new_context(viewport={"width": 690, "height": 1000}, color_scheme="dark")  # A4 within its margins
    tab = context.new_page()
    complaints = Complaints(tab, "file:")
    opened(tab, path, f"{view}/layers.2.attention_weights/2/3/40")
    if view in ("block", "attention"):
        tab.wait_for_function(IS_DRAWN)
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    tab.emulate_media(media="print", color_scheme="dark")
    assert tab.evaluate("document.documentElement.dataset.theme") == "light"
    assert tab.evaluate("getComputedStyle(document.documentElement).getPropertyValue('--paper')") == "#ffffff"
    for selector in ("nav", ".icons", ".controls", ".player"):
        assert not tab.is_visible(selector)
    assert tab.is_visible(".tokens")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    if view in ("block", "attention"):  # what lies out of sight is light
        assert min(tab.evaluate(RIGHT_MIDDLE)) > 200
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    context.close()
    assert complaints == []


def test_the_first_layer_is_drawn_within_a_second(browser: Any, path: Path) -> None:
    def seconds() -> float:
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(f"file://{path}#block/layers.0.attention_norm", wait_until="commit")
        tab.wait_for_function(IS_DRAWN, polling=10)
        elapsed = tab.evaluate("performance.now() / 1000")
        context.close()
        return float(elapsed)

    assert min(seconds() for _ in range(5)) < 1.0


def test_the_arrow_keys_walk_through_every_step_of_every_layer(tab: Any, path: Path, model: mistral_ref.Model) -> None:
    opened(tab, path)
    for name in step_names(model.config):
        assert tab.text_content("section h2") == name
        tab.keyboard.press("ArrowRight")
    assert tab.text_content("section h2") == "logits"
    tab.keyboard.press("ArrowLeft")
    assert tab.text_content("section h2") == "norm"


@pytest.mark.parametrize("config", [SMALL, MIXTURE], ids=["dense", "experts"])
def test_the_page_walks_through_the_steps_of_an_adapter(tab: Any, config: ModelConfig, tmp_path: Path) -> None:
    names = [name for name in adaptable(config) if "layers.1." in name]  # layer 0 has none
    plain = model_of(config)
    adapter = write_peft(tmp_path / "adapter", config, draw_deltas(config, names))
    model = mistral_ref.Model(*with_adapters(config, plain.weights, [adapter]), plain.ops)
    report.write(model, tokens_for(config, 5), tmp_path / "trace.html", with_cost=False)
    opened(tab, tmp_path / "trace.html")
    for name in step_names(model.config):
        assert tab.text_content("section h2") == name
        tab.keyboard.press("ArrowRight")
    opened(tab, tmp_path / "trace.html", "block/layers.1.gate_lora_b/1/0/2")
    assert tab.locator("svg text", has_text="lora").count() == 2 * len(model.weights.layers[1].lora)
    tab.keyboard.press("ArrowUp")  # to a layer without the adapter
    assert tab.text_content("section h2") == "layers.0.gate"


@pytest.mark.parametrize("view", VIEWS)
def test_every_control_is_reached_by_keyboard(tab: Any, path: Path, view: str) -> None:
    opened(tab, path, f"{view}/layers.1.q/1/2/5")
    if view in ("block", "attention"):
        tab.wait_for_function(IS_DRAWN)
    controls = tab.evaluate_handle(CONTROLS)
    n_controls = tab.evaluate("(controls) => controls.length", controls)
    assert n_controls > 70  # the tokens alone are 64
    reached = set()
    for _ in range(n_controls + 1):
        tab.keyboard.press("Tab")
        reached.add(tab.evaluate("(controls) => controls.indexOf(document.activeElement)", controls))
    left = [index for index in range(n_controls) if index not in reached]
    # The arrow keys go on within a row of many: the tokens, the views, the cells of the lens.
    rows = tab.evaluate(ROWS, [controls, left])
    assert set(rows) <= {"Tokens", "Views", "The likeliest next piece after each layer, for each token"}


def test_the_arrow_keys_go_on_within_a_row(tab: Any, path: Path) -> None:
    opened(tab, path, "lens/layers.1.q/1/2/5")
    tab.focus('[role="tablist"] [aria-selected="true"]')
    tab.keyboard.press("ArrowRight")
    assert tab.text_content("main h2") == "What it costs, and what the machine allows"
    for _ in VIEWS:
        tab.keyboard.press("ArrowLeft")
    assert tab.text_content("main h2") == "One block, step by step"
    tab.focus('[aria-label="Tokens"] [aria-pressed="true"]')
    for _ in range(70):
        tab.keyboard.press("ArrowRight")
    assert tab.evaluate("location.hash").endswith("/63")
    opened(tab, path, "lens/layers.1.q/1/2/5")
    tab.focus("table.lens button[tabindex='0']")
    tab.keyboard.press("ArrowDown")
    tab.keyboard.press("ArrowLeft")
    assert tab.evaluate("document.activeElement.ariaLabel").startswith("layer 3, after ")
    assert tab.evaluate("location.hash").endswith("/4")


def test_a_button_keeps_the_focus_when_it_was_used(tab: Any, path: Path) -> None:
    opened(tab, path, "block/layers.1.q/1/2/5")
    tab.focus('[data-key="box layers.1.gate"]')
    tab.keyboard.press("Enter")
    assert tab.text_content("section h2") == "layers.1.gate"
    assert tab.evaluate("document.activeElement.dataset.key") == "box layers.1.gate"
    tab.keyboard.press("?")
    assert tab.is_visible("dialog")
    tab.keyboard.press("Escape")
    assert not tab.is_visible("dialog")


def test_values_under_the_pointer_and_the_arrow_keys(tab: Any, path: Path, model: mistral_ref.Model) -> None:
    trace = model.trace(model.token_ids(STORY)[:64], keep=["layers.2.attention_weights", "layers.2.k"])
    opened(tab, path, "attention/layers.2.attention_weights/2/3/0")
    tab.wait_for_function(IS_DRAWN)
    tab.focus("main figure canvas")
    for key in ["Home", *["ArrowDown"] * 7, *["ArrowRight"] * 5]:
        tab.keyboard.press(key)
    weight = trace["layers.2.attention_weights"][3, 7, 5]
    text = tab.text_content("main output")
    assert text == f"{trace.pieces[7]} 7 looks at {trace.pieces[5]} 5: weight {text.rpartition(' ')[2]}"
    assert float(text.rpartition(" ")[2]) == pytest.approx(weight, rel=2e-3)
    for _ in range(5):
        tab.keyboard.press("ArrowRight")
    assert tab.text_content("main output").endswith("later, so not seen")

    opened(tab, path, "block/layers.2.k/2/5/0")  # query head 5 reads key/value head 1
    tab.wait_for_function(IS_DRAWN)
    canvas = tab.locator("main figure canvas")
    box = canvas.bounding_box()
    labels = 104  # pixels
    canvas.hover(position={"x": labels + (box["width"] - labels) * 10.5 / 32, "y": box["height"] * 20.5 / 64})
    text = tab.text_content("main output").replace("−", "-")
    assert text.startswith(f"head 1, token {trace.pieces[20]} 20, head dim 10: ")
    assert float(text.rpartition(" ")[2]) == pytest.approx(trace["layers.2.k"][20, 1, 10], rel=2e-3)


def test_a_value_stays_when_its_row_is_chosen(tab: Any, path: Path) -> None:
    opened(tab, path, "attention/layers.2.attention_weights/2/3/0")
    tab.wait_for_function(IS_DRAWN)
    canvas = tab.locator("main figure canvas")
    box = canvas.bounding_box()
    tab.evaluate("document.addEventListener('click', () => window.scrolledTo = scrollY, true)")
    canvas.click(position={"x": box["width"] - 10, "y": box["height"] - 5})
    assert tab.evaluate("location.hash").endswith("/63")
    tab.wait_for_function("() => document.querySelector('main output').textContent.includes('63 looks at')")
    tab.wait_for_function("() => document.activeElement.dataset.key.startsWith('heat Attention weights')")
    assert tab.evaluate("scrolledTo") > 100
    assert abs(tab.evaluate("scrollY - scrolledTo")) < 30  # nothing jumps
    tab.focus('[data-key="head 5"]')
    tab.keyboard.press("Enter")
    tab.wait_for_function("() => document.activeElement.dataset.key === 'head 5'")


def test_keys_while_a_slider_has_the_focus_and_the_browsers_way_back(tab: Any, path: Path) -> None:
    opened(tab, path, "block/layers.2.q/2/3/0")
    tab.keyboard.press("5")
    tab.focus('[data-key="distance i − j"]')
    tab.keyboard.press("ArrowRight")
    assert "distance i − j = 6" in tab.text_content("main")
    tab.keyboard.press("3")
    assert tab.text_content("main h2") == "The ring of the cache"
    tab.fill('[data-key="position"]', "99999")
    tab.keyboard.press("Tab")
    assert tab.input_value('[data-key="position"]') == "9999"
    tab.go_back()
    assert tab.text_content("main h2") == "Pairs that turn with the position"
    tab.go_back()
    assert tab.text_content("section h2") == "layers.2.q"


@pytest.mark.parametrize("address", ["%", "block/%E0%A4%A/9/9/9", "ring/layers.7.q", "//////", "constructor/toString"])
def test_an_address_that_leads_nowhere_is_left_aside(tab: Any, path: Path, address: str) -> None:
    opened(tab, path, address)
    assert tab.text_content("main h2") in ("One block, step by step", "embedding", "The ring of the cache")


def test_numbers_that_are_none_are_named(tab: Any, model: mistral_ref.Model, tmp_path: Path) -> None:
    path = tmp_path / "nan.html"
    edits = {"layers.2.ffn_out": lambda x_TD: np.full_like(x_TD, np.nan)}
    report.write(model, "Once upon a time", path, edits=edits, with_cost=False)
    opened(tab, path, "block/layers.3.q/3/0/0")
    tab.wait_for_function("() => document.querySelector('main .legend')?.textContent.includes('NaN or infinite')")
    assert "layer 3: rms NaN" in tab.text_content("main")
    opened(tab, path, "lens")
    assert tab.text_content("table.lens tbody tr button") == "NaN"
    for view in VIEWS:
        opened(tab, path, view)


def test_the_page_unpacks_what_was_packed(tab: Any, path: Path, model: mistral_ref.Model) -> None:
    trace = model.trace(model.token_ids(STORY)[:64])
    opened(tab, path)
    for name in ("embedding", "layers.0.scores", "layers.4.ffn_hidden", "logits"):
        found = np.array(tab.evaluate("async (name) => [...await values(name)].map(String)", name), dtype=np.float32)
        np.testing.assert_allclose(found, trace[name].ravel(), rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize(("window", "chunk"), [(1, 1), (8, 1), (8, 3), (5, 16), (64, 1), (64, 8)])
def test_the_ring_is_the_caches(tab: Any, path: Path, window: int, chunk: int) -> None:
    opened(tab, path, "ring")
    capacity = window + chunk - 1
    ring, held = Ring(window, capacity, capacity), np.full(capacity, -1)
    for start in range(0, 210, chunk):
        before = held.copy()
        held[ring.slots(start, start + chunk)] = np.arange(start, start + chunk)
        for query in range(start, start + chunk):
            found = tab.evaluate("([query, window, chunk]) => ringAt(query, window, chunk)", [query, window, chunk])
            assert (found["capacity"], found["slot"], found["begin"]) == (capacity, query % capacity, start)
            assert [slot["held"] for slot in found["slots"]] == held.tolist()
            assert [slot["was"] for slot in found["slots"]] == np.where(held != before, before, -1).tolist()
            seen = [slot["held"] for slot in found["slots"] if slot["kind"] == "seen"]
            assert sorted(seen) == [key for key in range(query + 1) if attends(query, key, window)]


def test_a_reader_finds_what_is_in_slot_3_at_token_200(tab: Any, path: Path) -> None:
    opened(tab, path, "ring")
    tab.click("text=this model's window, 64")
    tab.fill('input[type="number"]', "200")
    assert "lies in slot 200 % 64 = 8. It has overwritten the key of 136. It sees the keys of 137 to 200" in (
        tab.text_content("main .split")
    )
    slots = tab.evaluate("ringAt(200, 64, 1).slots")
    assert slots[3]["held"] == 195
    tab.click("text=▶ Play")
    tab.wait_for_function("() => document.querySelector('main').innerText.includes('203 % 64 = 11')", timeout=5000)
    tab.click("text=❚❚ Pause")


def test_the_receptive_field_is_what_windows_reach(tab: Any, path: Path) -> None:
    opened(tab, path, "field")
    for window, layers in ((1, 5), (3, 2), (4, 5)):
        sees = np.array([[attends(query, key, window) for key in range(33)] for query in range(33)]).astype(int)
        through = np.linalg.matrix_power(sees, layers) > 0
        for token in (0, 7, 32):
            first = tab.evaluate("([token, layers, window]) => reach(token, layers, window)", [token, layers, window])
            assert first == np.flatnonzero(through[token])[0]


def test_rope_s_scores_are_the_librarys(tab: Any, tmp_path: Path) -> None:
    config = ModelConfig(
        dim=24, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=32, vocab_size=50, norm_eps=1e-5,
        rope_theta=1e4, sliding_window=(None, 6), rope_row_order="halves",
        yarn=Yarn(factor=4, original_max_position_embeddings=16, beta_fast=4, beta_slow=1, attention_factor=1.1),
        query_temperature=QueryTemperature(beta=0.3, original_max_position_embeddings=16),
        moe=MixtureOfExperts(num_experts=4, num_experts_per_tok=2),
    )  # fmt: skip
    model, tokens = model_of(config), tokens_for(config, 9)
    report.write(model, tokens, tmp_path / "page.html", with_cost=False)
    trace = model.trace(tokens, keep=["layers.0.q", "layers.0.k"])
    q_1HK, k_1GK = trace["layers.0.q"][-1:].astype(np.float64), trace["layers.0.k"][:1].astype(np.float64)
    opened(tab, tmp_path / "page.html", "rope")
    ops = ReferenceOps("float64")
    for query, key in ((0, 0), (12, 7), (256, 130)):
        at_query, at_key = (rotation(np.array([p]), config, "float64") for p in (query, key))
        turned_q = ops.rotate(q_1HK, at_query.query_cos, at_query.query_sin)[0, 0]
        turned_k = ops.rotate(k_1GK, at_key.key_cos, at_key.key_sin)[0, 0]
        score = tab.evaluate("([i, j]) => ropeScore(i, j)", [query, key])
        assert score == pytest.approx(turned_q @ turned_k / np.sqrt(config.head_dim), rel=1e-4)
    for view in VIEWS:
        opened(tab, tmp_path / "page.html", f"{view}/layers.1.gate/1/3/8")


def test_hostile_text_is_shown_and_never_run(tab: Any, model: mistral_ref.Model, tmp_path: Path) -> None:
    ids = model.token_ids(HOSTILE)
    path = tmp_path / "hostile.html"
    report.write(model, ids, path, title=HOSTILE, with_cost=False)
    for view in VIEWS:
        opened(tab, path, f"{view}/<img src=x onerror='window.hacked = 1'>/2/3/4")
        assert tab.text_content("h1") == HOSTILE
        assert tab.evaluate("typeof window.hacked") == "undefined"
        assert tab.evaluate("document.images.length + document.querySelectorAll('b.piece, main b b').length") == 0
    pieces = tab.evaluate("[...document.querySelectorAll('[aria-label=Tokens] bdi')].map((node) => node.textContent)")
    assert pieces == [model.piece(token) for token in ids]


def test_a_page_of_one_token_and_one_over_a_cache(tab: Any, model: mistral_ref.Model, tmp_path: Path) -> None:
    ids = model.token_ids(STORY)
    cache = model.new_cache(chunk=8)
    model.forward(ids[:80], cache)
    report.write(model, ids[80:85], tmp_path / "cached.html", cache=cache, with_cost=False)
    report.write(model, ids[:1], tmp_path / "one.html", keep="*.q", with_cost=False)
    for name in ("cached.html", "one.html"):
        for view in VIEWS:
            opened(tab, tmp_path / name, view)
    opened(tab, tmp_path / "cached.html", "attention")
    tab.wait_for_function(IS_DRAWN)
    assert "from position 80" in tab.text_content("header")
    opened(tab, tmp_path / "one.html", "attention")
    tab.wait_for_selector("text=These weights were not kept")
