"""Figures: what is drawn equals what was computed, foreign text is drawn as it is, and nothing is cut off."""

from __future__ import annotations

import importlib
import importlib.util
import io
import subprocess
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from support.checkpoints import FAMILIES
from support.errors import refused
from support.paths import ROOT
from support.tiny import model_of, tokens_for

import mistral_ref
from mistral_ref.cache import KVCache
from mistral_ref.errors import InputError
from mistral_ref.measure.cost import Limits
from mistral_ref.measure.cost_table import cost_table
from mistral_ref.model import Model
from mistral_ref.reference_ops import ReferenceOps, attends
from mistral_ref.rope import rotation
from mistral_ref.steps import CATALOGUE, Step
from mistral_ref.study import lens, plots
from mistral_ref.study.drawing import BLUE, ORANGE, VERMILLION, literal, spread
from mistral_ref.study.patching import Sweep
from mistral_ref.trace import Trace

pytestmark = pytest.mark.slow

SENTENCE = "Once upon a time there was a little girl named Lily. She"
HOSTILE = [
    "$\\frac{a}{b}$", "$x^2$", "$", "\\$", "a_b^c", "<b>", "&amp;", "%s {0}", "\N{ROCKET}", "中文", "שלום",
    "مرحبا", "\u202eevil", "\x00\x1b[31m\n\t", "\u200d\ufe0f", "\ud800", "e\u0301", "", " ", "▁", "x" * 200,
]  # fmt: skip


@pytest.fixture(scope="module")
def demo() -> Model:
    return mistral_ref.load(backend="numpy")


@pytest.fixture(scope="module")
def trace(demo: Model) -> Trace:
    return demo.trace(SENTENCE)


def texts_of(ax: Axes) -> list[Text]:
    """Return all texts of axes that can be seen; ticks out of view have labels too."""
    hidden = set()
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks() + axis.get_minor_ticks():
            if not low <= tick.get_loc() <= high or not ax.axison:
                hidden |= {tick.label1, tick.label2}
    return [text for text in ax.findobj(Text) if text.get_visible() and text.get_text() and text not in hidden]


def check_drawn(ax: Axes) -> None:
    """Draw a figure of its own; check that no text reaches beyond it, and that no labels of ticks overlap."""
    figure = ax.figure
    figure.draw_without_rendering()
    for part in figure.axes:
        for text in texts_of(part):
            box = text.get_window_extent()
            assert box.x0 > -1, text
            assert box.y0 > -1, text
            assert box.x1 < figure.bbox.x1 + 1, text
            assert box.y1 < figure.bbox.y1 + 1, text
        if part.axison:
            for axis in (part.xaxis, part.yaxis):
                labels = set(axis.get_ticklabels()).intersection(texts_of(part))
                check_apart(labels)


def check_apart(texts: Iterable[Text]) -> None:
    boxes = [Text.get_window_extent(text) for text in texts]  # an annotation's, without its line
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))


def strings(texts: list[Text]) -> list[str]:
    return [text.get_text() for text in texts]


def labels_of(axis: object) -> list[str]:
    return strings(axis.get_ticklabels())


# ------------------------------------------------------------------------------------------------ attention


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_draws_the_weights_and_hides_what_is_out_of_sight(name: str) -> None:
    config = FAMILIES[name].config
    trace = model_of(config).trace(tokens_for(config, 20), keep="*.attention_weights")
    for layer, window in enumerate(config.sliding_window):
        ax = plots.attention(trace, layer, 1)
        cells = ax.images[0].get_array()
        query, key = np.indices((20, 20))
        assert np.array_equal(np.ma.getmaskarray(cells), ~attends(query, key, window))
        assert np.array_equal(cells.compressed(), trace[f"layers.{layer}.attention_weights"][1][~cells.mask])
        edges = [line for line in ax.lines if line.get_color() == VERMILLION]
        assert len(edges) == (window is not None and window < 20)
        for edge in edges:  # in each row the line stands left of the oldest key that is seen
            x, y = np.array(edge.get_xdata())[::2], np.array(edge.get_ydata())[::2] + 0.5
            assert np.array_equal(y, np.arange(window, 20))
            assert np.array_equal(x + 0.5, y - window + 1)
    check_drawn(ax)


def test_attention_of_more_tokens_than_the_window_thins_its_labels(demo: Model) -> None:
    tokens = tokens_for(demo.config, 100)
    trace = demo.trace(tokens, keep="layers.1.attention_weights")
    ax = plots.attention(trace, 1, 2, window=64)
    check_drawn(ax)
    labels = labels_of(ax.yaxis)
    assert 20 < len(labels) < 50
    assert labels[1] == f"{literal(trace.pieces[3])} 3"
    assert "window's edge: 64 keys, itself included" in strings(ax.get_legend().get_texts())


def test_attention_finds_the_windows_of_a_trace_in_a_file(tmp_path: Path) -> None:
    config = FAMILIES["interleaved_windows"].config  # None, 6, 6, 6
    model_of(config).trace(tokens_for(config, 9), keep="*.attention_weights").save(tmp_path / "t")
    trace = Trace.load(tmp_path / "t")
    assert trace.windows == config.sliding_window
    asked = [(0, {}, 0), (1, {}, 1), (3, {}, 1), (1, {"window": None}, 0), (0, {"window": 3}, 1)]
    for layer, window, n_edges in asked:
        ax = plots.attention(trace, layer, 0, **window)
        assert [line.get_color() for line in ax.lines].count(VERMILLION) == n_edges


def test_attention_of_a_dump_needs_a_window() -> None:
    step = Step("layers.0.attention_weights", CATALOGUE["attention_weights"], np.eye(3)[np.newaxis], range(3))
    for windows in (None, ()):
        with refused(InputError, "layer 0", "window"):
            plots.attention(Trace([step], [], [], windows=windows), 0, 0)


def test_attention_after_a_cache_names_positions_before_the_trace(demo: Model) -> None:
    cache = demo.new_cache()
    demo.forward(tokens_for(demo.config, 99), cache)
    trace = demo.trace(" girl", cache=cache)
    ax = plots.attention(trace, 0, 0)
    check_drawn(ax)
    assert labels_of(ax.xaxis)[0] == f"@{100 + trace.n_tokens - trace['layers.0.attention_weights'].shape[2] - 1}"
    (edge,) = (line for line in ax.lines if line.get_color() == VERMILLION)
    assert np.array(edge.get_xdata())[0] == -0.5


def test_attention_shows_what_should_not_be() -> None:
    weights = np.zeros((1, 4, 4))
    weights[0, 3, 0], weights[0, 1, 1], weights[0, 0, 2] = 0.5, np.nan, 0.1
    step = Step("layers.0.attention_weights", CATALOGUE["attention_weights"], weights, range(4))
    ax = plots.attention(Trace([step], [], []), 0, 0, window=2)
    image = ax.images[0]
    cells = image.get_array()
    assert not cells.mask[3, 0]  # outside the window, and yet
    assert not cells.mask[0, 2]  # later, and yet
    assert cells.mask[0, 1]
    assert to_hex(image.to_rgba(cells)[1, 1]).upper() == ORANGE
    check_drawn(ax)


# ------------------------------------------------------------------------------------ heads, receptive field


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(8, 2), (4, 4), (6, 1), (1, 1), (32, 8), (32, 32), (96, 8)])
def test_head_map_joins_query_heads_to_the_heads_that_attention_reads(n_heads: int, n_kv_heads: int) -> None:
    config = FAMILIES["dense_windowed"].config.replace(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=2)
    ax = plots.head_map(config)
    check_drawn(ax)
    check_apart(ax.texts)
    boxes = [patch for patch in ax.patches if isinstance(patch, Rectangle)]
    kept = sorted((box for box in boxes if box.get_y() < 0), key=Rectangle.get_x)
    assert (len(kept), len(boxes)) == (n_kv_heads, n_kv_heads + n_heads)
    # What the operations do: the values of key/value head g are all g, and every query sees one key.
    values = np.tile(np.arange(n_kv_heads, dtype=float)[:, np.newaxis], (1, 1, 2))
    read_H = ReferenceOps("float64").gather(np.ones((n_heads, 1, 1)), values)[0, :, 0]
    assert len(ax.lines) == n_heads
    for line in ax.lines:
        (x0, y0), (head, y1) = np.array(line.get_xydata())
        assert kept[int(read_H[int(head)])].contains_point(ax.transData.transform((x0, y0)))
        assert (y0, y1) == (0, 1)
    numbers = {(text.get_position()[1], int(text.get_text())) for text in ax.texts}
    assert {(0, 0), (1, 0)} <= numbers
    assert len(numbers) == n_heads + n_kv_heads or n_heads > 32


def influence_on_the_last(model: Model, n_tokens: int) -> np.ndarray:
    """Return for each row of a receptive field and each position whether the last token's logits depend on it."""
    names = ["embedding", *(f"layers.{layer}.residual_after_ffn" for layer in range(model.config.n_layers))]
    tokens = tokens_for(model.config, n_tokens)
    before = model.forward(tokens)[-1]

    def depends(name: str, position: int) -> bool:
        at = (np.arange(n_tokens) == position)[:, np.newaxis]
        edits = {name: lambda x_TD: np.where(at, x_TD[:, ::-1], x_TD)}
        return not np.array_equal(model.forward(tokens, edits=edits)[-1], before)

    return np.array([[depends(name, position) for position in range(n_tokens)] for name in names])


@pytest.mark.parametrize(
    ("n_layers", "window", "n_tokens"), [(3, 3, 12), (2, 4, None), (3, 4, 6), (1, 1, 3), (4, 2, 1)]
)
def test_receptive_field_is_what_a_model_s_last_token_depends_on(
    n_layers: int, window: int, n_tokens: int | None
) -> None:
    ax = plots.receptive_field(n_layers, window, n_tokens)
    check_drawn(ax)
    n_tokens = round(ax.get_xlim()[1] + 0.5)
    drawn, dark = np.zeros((2, n_layers + 1, n_tokens), bool)
    for bar in (patch for patch in ax.patches if isinstance(patch, Rectangle)):
        columns = slice(round(bar.get_x() + 0.5), round(bar.get_x() + bar.get_width() + 0.5))
        row = round(bar.get_y() + bar.get_height() / 2)
        drawn[row, columns] = True
        dark[row, columns] |= to_hex(bar.get_facecolor()) == to_hex(BLUE)
    config = FAMILIES["dense_windowed"].config.replace(n_layers=n_layers, sliding_window=(window,) * n_layers)
    assert np.array_equal(drawn, influence_on_the_last(model_of(config), n_tokens))
    assert np.array_equal(dark[0], attends(n_tokens - 1, np.arange(n_tokens), window))
    counts = [int(text.get_text()) for text in ax.texts if text.get_text() != "tokens"]
    assert counts == drawn.sum(axis=1).tolist()


@pytest.mark.parametrize(("n_layers", "window", "widest"), [(32, 4096, "131,041"), (5, 64, "316"), (200, 2, "201")])
def test_receptive_field_of_published_sizes(n_layers: int, window: int, widest: str) -> None:
    ax = plots.receptive_field(n_layers, window)
    check_drawn(ax)
    check_apart(ax.texts)
    assert ax.texts[0].get_text() == widest  # 32 * 4095 + 1


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ((0, 4), ("n_layers", 0)),
        ((3, 0), ("window", 0)),
        ((3, 4, 0), ("n_tokens", 0)),
        ((3, None), ("window", None)),
        ((2.5, 4), ("n_layers", 2.5)),
    ],
)
def test_receptive_field_refuses_what_is_no_number(arguments: tuple[int, ...], facts: tuple[object, ...]) -> None:
    with refused(InputError, *facts, "whole number", 1):
        plots.receptive_field(*arguments)


# ----------------------------------------------------------------------------------------------------- ring


@pytest.mark.parametrize(("window", "chunk", "n_tokens"), [(4, 1, 12), (4, 2, 12), (1, 1, 3), (3, 5, 13), (8, 4, 30)])
def test_ring_shows_what_a_cache_holds(window: int, chunk: int, n_tokens: int) -> None:
    config = FAMILIES["dense_windowed"].config.replace(sliding_window=(window,) * 3)
    cache: KVCache = model_of(config).new_cache(chunk=chunk)
    shape = (config.n_kv_heads, config.head_dim)
    ax = plots.ring(window, chunk, n_tokens)
    check_drawn(ax)
    drawn = {text.get_position(): int(text.get_text()) for text in ax.texts if text.get_text().isdigit()}
    over = {
        (round(x), round(y)): int(text.get_text().removeprefix("over "))
        for text in ax.texts
        if text.get_text().startswith("over")
        for x, y in [text.get_position()]
    }
    slots: dict[int, int] = {}
    expected, expected_over = {}, {}
    for start in range(0, n_tokens, chunk):
        stop = min(start + chunk, n_tokens)
        for position in range(start, stop):
            slot = position % (window + chunk - 1)
            if slot in slots:
                expected_over[start, slot] = slots[slot]
            slots[slot] = position
        this_pass = cache.begin(stop - start)
        keys = np.broadcast_to(this_pass.positions[:, np.newaxis, np.newaxis], (stop - start, *shape))
        this_pass.write(0, keys, keys)
        cache.commit(this_pass, this_pass.positions)
        stored = cache.rings[0].store.k[:, 0, 0]
        assert all(stored[slot] == position for slot, position in slots.items())
        expected |= {(query, slot): position for query in range(start, stop) for slot, position in slots.items()}
    assert drawn == expected
    assert over == expected_over


def test_ring_colours_what_each_query_sees() -> None:
    ax = plots.ring(4, 2, 12)
    cells = [patch for patch in ax.patches if isinstance(patch, Rectangle) and patch.get_width() == 1]
    keys = {text.get_position(): int(text.get_text()) for text in ax.texts if text.get_text().isdigit()}
    colours: dict[str, set[str]] = {"seen": set(), "old": set(), "later": set()}
    for cell in cells:
        query, slot = cell.get_x() + 0.5, cell.get_y() + 0.5
        key = keys[query, slot]
        state = "seen" if attends(query, key, 4) else "old" if key < query else "later"
        colours[state].add(to_hex(cell.get_facecolor()))
    assert [len(found) for found in colours.values()] == [1, 1, 1]
    assert len(set.union(*colours.values())) == 3
    # One token at a time leaves nothing in the ring that is not seen.
    legend = plots.ring(4).get_legend()
    assert legend is not None
    assert strings(legend.get_texts()) == ["seen", "written now, over the key in small"]


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ((0,), ("window", 0)),
        ((4, 0), ("chunk", 0)),
        ((4, 1, 0), ("n_tokens", 0)),
        ((33,), ("window", 33, "1 to 32")),
        ((32, 2), ("chunk", 2, "1 to 1")),
        ((4, 1, 33), ("n_tokens", 33, "1 to 32")),
        ((2.5,), ("window", 2.5)),
    ],
)
def test_ring_refuses_what_cannot_be_read(arguments: tuple[int, ...], facts: tuple[object, ...]) -> None:
    with refused(InputError, *facts, "whole number"):
        plots.ring(*arguments)


# ----------------------------------------------------------------------------------------------------- RoPE


@pytest.mark.parametrize("name", ["dense_windowed", "yarn_mistral", "ministral3"])
def test_rope_hands_stand_where_rope_turns_pairs(name: str) -> None:
    config = FAMILIES[name].config
    positions = (0, 1, 5, 700)
    ax = plots.rope(config, positions)
    check_drawn(ax)
    turned = rotation(np.array(positions), config, "float64")
    scale = 1.0 if config.yarn is None else config.yarn.attention_factor
    n_pairs = config.head_dim // 2
    hands = [np.array(line.get_xydata()) for line in ax.lines if line.get_marker() == "o"]
    assert len(hands) == 3 * len(positions)
    for number, hand in enumerate(hands):
        pair = (0, (n_pairs - 1) // 2, n_pairs - 1)[number // len(positions)]
        at = number % len(positions)
        expected = np.array([turned.key_cos[at, pair], turned.key_sin[at, pair]]) / scale
        assert np.allclose((hand[1] - hand[0]) / 0.42, expected, atol=1e-12)


def test_rope_of_heads_with_one_pair() -> None:
    config = FAMILIES["dense_windowed"].config.replace(head_dim=2)
    check_drawn(plots.rope(config))


@pytest.mark.parametrize("name", ["dense_windowed", "yarn_mistral", "ministral3"])
def test_rope_scores_lie_on_each_other(name: str) -> None:
    ax = plots.rope_scores(FAMILIES[name].config)
    check_drawn(ax)
    curves = np.array([line.get_ydata() for line in ax.lines])
    assert curves.shape == (3, 64)
    assert np.abs(curves - curves[0]).max() < 1e-9
    assert np.ptp(curves[0]) > 0.1


# ---------------------------------------------------------------------------- logit lens, residuals, logits


def test_logit_lens_shows_the_likeliest_pieces(demo: Model, trace: Trace) -> None:
    predictions = lens.logit_lens(demo, trace)
    ax = plots.logit_lens(predictions)
    check_drawn(ax)
    assert np.array_equal(ax.images[0].get_array(), np.exp(predictions.logprobs_RTN[:, :, 0]))
    cells = {text.get_position(): text.get_text() for text in ax.texts}
    assert len(cells) == predictions.ids_RTN[:, :, 0].size
    for (row, column), token in np.ndenumerate(predictions.ids_RTN[:, :, 0]):
        assert cells[column, row] == literal(demo.piece(int(token)), 9)
    assert labels_of(ax.yaxis)[:2] == ["embedding", "layer 0, attention"]
    assert ax.get_ylim()[0] < ax.get_ylim()[1]  # the embedding at the bottom

    ax = plots.logit_lens(predictions, token=2)
    check_drawn(ax)
    assert np.array_equal(ax.images[0].get_array(), np.exp(predictions.logprobs_RTN[:, 2]))
    with refused(InputError, "token", 99):
        plots.logit_lens(predictions, token=99)


def test_residual_norms_are_those_of_the_trace(demo: Model, trace: Trace) -> None:
    ax = plots.residual_norms(trace)
    check_drawn(ax)
    names = [name for name in trace if name == "embedding" or ".residual_after_" in name]
    rms_RT = np.array([np.sqrt(np.mean(trace[name].astype(np.float64) ** 2, axis=-1)) for name in names])
    thin = [line for line in ax.lines if line.get_linewidth() < 1]
    assert np.allclose(np.array([line.get_ydata() for line in thin]).T, rms_RT)
    (mean,) = (line for line in ax.lines if line.get_label() == "stream, mean")
    assert np.allclose(mean.get_ydata(), rms_RT.mean(axis=1))
    for label, part in (("attention adds", "attention_out"), ("feed-forward adds", "ffn_out")):
        (line,) = (line for line in ax.lines if line.get_label() == label)
        added = [trace[f"layers.{layer}.{part}"].astype(np.float64) for layer in range(demo.config.n_layers)]
        assert np.allclose(line.get_ydata(), [np.sqrt(np.mean(x_TD**2, axis=-1)).mean() for x_TD in added])
        at = [names.index(f"layers.{n}.residual_after_{part.removesuffix('_out')}") for n in range(len(added))]
        assert list(line.get_xdata()) == at


def test_residual_norms_of_part_of_a_trace(demo: Model) -> None:
    check_drawn(plots.residual_norms(demo.trace([1, 2], keep="layers.1.residual_after_ffn")))
    silent = demo.trace([1, 2], edits={"*.ffn_out": np.zeros_like})
    check_drawn(plots.residual_norms(silent))
    with refused(InputError, "trace", "no residual", "embedding"):
        plots.residual_norms(demo.trace([1, 2], keep="logits"))


def test_attribution_shows_every_part(demo: Model, trace: Trace) -> None:
    parts = lens.attribution(demo, trace)
    ax = plots.attribution(parts)
    check_drawn(ax)
    heads, ffn, embedding = (np.asarray(image.get_array()) for image in ax.images)
    assert np.array_equal(heads, parts.heads_LH)
    assert np.array_equal(ffn[:, 0], parts.ffn_L)
    assert embedding.tolist() == [[parts.embedding]]
    assert heads.sum() + ffn.sum() + embedding.sum() == pytest.approx(parts.logit, abs=1e-4)
    n_layers, n_heads = parts.heads_LH.shape
    numbers = [float(text.get_text()) for text in ax.texts]
    assert np.allclose(numbers[: n_layers * n_heads], parts.heads_LH.ravel(), atol=0.0051)
    assert labels_of(ax.xaxis)[-1] == "feed-forward"


def test_deep_and_wide_models_fit() -> None:
    config = FAMILIES["dense_windowed"].config.replace(n_layers=32, n_heads=32, n_kv_heads=8, sliding_window=(5,) * 32)
    model = model_of(config)
    trace = model.trace(tokens_for(config, 40))
    ax = plots.attribution(lens.attribution(model, trace))
    check_drawn(ax)
    parts = np.asarray(ax.images[0].get_array())
    scale = ax.images[0].get_clim()[1]
    heads = [text for text in ax.texts[: parts.size] if text.get_text()]
    assert strings(heads) == ["−"] * int((parts < -scale / 8).sum())  # signs can be told apart in grey
    ax = plots.logit_lens(lens.logit_lens(model, trace))
    check_drawn(ax)
    assert not ax.texts  # no room
    check_drawn(plots.residual_norms(trace))


def test_a_sweep_shows_each_change() -> None:
    values_RC = np.array([[1.0, 3.0, np.nan], [2.0, -4.0, 1.5]])
    found = Sweep(["embedding", "layers.1"], [*HOSTILE[:2], "x"], values_RC, 1, 3, "set to zero", computed=1, naive=1)
    for share, expected in ((False, found.change), (True, found.share)):
        ax = plots.sweep(found, share=share)
        check_drawn(ax)
        np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), expected)
        shown = [float(text) if text else np.nan for text in strings(list(ax.texts))]
        np.testing.assert_allclose(shown, expected.ravel(), atol=0.0051)
        assert ax.images[0].get_clim() == (-np.nanmax(np.abs(expected)), np.nanmax(np.abs(expected)))
    assert labels_of(ax.yaxis) == ["embedding", "layer 1"]
    many = Sweep(["embedding"] * 40, ["x"] * 60, np.zeros((40, 60)), 1, None, "set to zero", computed=1, naive=1)
    check_drawn(plots.sweep(many))


# ------------------------------------------------------------------------------------------------- roofline


@pytest.mark.parametrize("n_tokens", [1, 40])
def test_roofline_places_steps_by_intensity_and_speed(demo: Model, n_tokens: int) -> None:
    limits = Limits(bandwidth=2e10, peak=1e11)
    table = cost_table(demo, tokens_for(demo.config, n_tokens), repeats=2, limits=limits)
    ax = plots.roofline(table)
    check_drawn(ax)
    rows = [row for row in table.rows(by_kind=True) if row.cost.flops]
    roof, predicted, measured = (np.array(line.get_xydata()) for line in ax.lines)
    assert np.allclose(roof[:, 1], np.minimum(20 * roof[:, 0], 100))
    for row, foreseen, found in zip(rows, predicted, measured, strict=True):
        assert foreseen[0] == found[0] == row.cost.intensity
        assert found[1] == pytest.approx(row.cost.flops / np.median(row.seconds) / 1e9)
        assert foreseen[1] == pytest.approx(row.cost.flops / row.predicted / 1e9)
    assert strings(list(ax.texts)) == [row.cost.name for row in rows[:-1]] + ["whole pass"]
    check_apart(ax.texts)


def test_spread_keeps_gap_order_and_bounds() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.choice([0.0, 0.1, 0.5, 0.99, 1.0], 12) + rng.uniform(0, 1e-3, 12)
        placed = spread(wanted.tolist(), 0.08)
        assert np.array_equal(np.argsort(placed), np.argsort(wanted))
        assert np.diff(np.sort(placed)).min() > 0.08 - 1e-12
        assert placed.min() >= 0
        assert placed.max() <= 1 + 1e-12
    apart = [0.1, 0.5, 0.9]
    assert np.allclose(spread(apart, 0.1), apart)


# -------------------------------------------------------------------------------------- text, style, import


def test_hostile_pieces_are_drawn_as_they_are(demo: Model) -> None:
    tokens = tokens_for(demo.config, len(HOSTILE))
    honest = demo.trace(tokens)
    trace = Trace(honest.steps.values(), tokens, HOSTILE)
    predictions = lens.logit_lens(demo, trace)
    pieces = {token: HOSTILE[n % len(HOSTILE)] for n, token in enumerate(predictions.pieces)}
    predictions = lens.LogitLens(**(vars(predictions) | {"pieces": pieces, "labels": HOSTILE}))
    attribution = lens.attribution(demo, trace)
    for ax in (
        plots.attention(trace, 0, 0, window=64),
        plots.logit_lens(predictions),
        plots.logit_lens(predictions, token=0),
        plots.attribution(lens.Attribution(**(vars(attribution) | {"piece": HOSTILE[0], "label": HOSTILE[1]}))),
    ):
        check_drawn(ax)
        ax.figure.savefig(io.BytesIO(), format="svg")


SHOWN = {
    "$x^2$": "$x^2$", "$": "$", "\\$": "\\$", "\\$$": "\\$$", "a_b^c": "a_b^c", "<b>": "<b>", "": "", " ": " ",
    "▁x": "▁x", "שלום": "שלום", "e\u0301": "e\u0301", "中": "\\u{4e2d}", "\N{ROCKET}!": "\\u{1f680}!",
    "\u202eevil": "\\u{202e}evil", "\x1b[m\n": "\\u{1b}[m\\u{a}", "\ud800": "\\u{d800}",
    "x" * 16: "x" * 16, "x" * 17: "x" * 15 + "…", "$" * 17: "$" * 15 + "…",
    "\N{ROCKET}" * 5: "\\u{1f680}…", "abcdefgh\N{ROCKET}": "abcdefgh…",  # never half an escape
}  # fmt: skip


@pytest.mark.parametrize("piece", SHOWN)
def test_literal_is_drawn_as_it_is_written(piece: str) -> None:
    text = Figure().text(0, 0, literal(piece))
    assert text._preprocess_math(text.get_text()) == (SHOWN[piece], False)


def test_a_style_of_the_user_s_stays_and_does_not_reach_pieces(trace: Trace) -> None:
    with matplotlib.rc_context({"text.usetex": True, "font.family": "serif", "axes.titlesize": 30}):
        ax = plots.attention(trace, 0, 0, window=64)
        assert matplotlib.rcParams["axes.titlesize"] == 30
    texts = [ax.title, *ax.get_xticklabels(), *ax.get_yticklabels()]
    assert not any(text.get_usetex() for text in texts)
    assert {text.get_fontfamily()[0] for text in texts} == {"DejaVu Sans"}


def test_figures_draw_into_axes_that_are_given(demo: Model, trace: Trace) -> None:
    figure = Figure((24, 12), layout="constrained")
    given = figure.subplots(2, 5).ravel()
    table = cost_table(demo, [1, 2], repeats=1, limits=Limits(1e10, 1e11))
    drawn = [
        plots.attention(trace, 0, 0, window=64, ax=given[0]),
        plots.ring(4, ax=given[1]),
        plots.rope(demo.config, ax=given[2]),
        plots.rope_scores(demo.config, ax=given[3]),
        plots.logit_lens(lens.logit_lens(demo, trace), ax=given[4]),
        plots.residual_norms(trace, ax=given[5]),
        plots.attribution(lens.attribution(demo, trace), ax=given[6]),
        plots.roofline(table, ax=given[7]),
        plots.head_map(demo.config, ax=given[8]),
        plots.receptive_field(5, 64, ax=given[9]),
    ]
    assert all(ax is mine for ax, mine in zip(drawn, given, strict=True))
    assert all(ax.get_title(loc="left") for ax in drawn)
    figure.draw_without_rendering()


def test_a_notebook_shows_the_figure() -> None:
    assert plots.ring(4)._repr_png_().startswith(b"\x89PNG")


def test_pyplot_is_not_needed_and_matplotlib_only_here() -> None:
    code = (
        "import sys, mistral_ref, mistral_ref.cli; assert 'matplotlib' not in sys.modules;"
        "from mistral_ref import plots; plots.ring(4).figure.savefig('/dev/null', format='png');"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_without_matplotlib_one_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("plots", "diagrams", "drawing"):
        monkeypatch.delitem(sys.modules, f"mistral_ref.study.{name}")
    with refused(InputError, "figures", "matplotlib", "pip install 'mistral-ref[plots]'"):
        importlib.import_module("mistral_ref.study.plots")


def test_the_documentation_s_figures_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "docs" / "make_figures.py"
    monkeypatch.syspath_prepend(script.parent)
    spec = importlib.util.spec_from_file_location("make_figures", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(tmp_path / "figures")])
    made = {path.name: path.stat().st_size for path in (tmp_path / "figures").iterdir()}
    kept = {
        path.name for path in (script.parent / "figures").iterdir() if not path.name.startswith(("bench_", "page_"))
    }
    assert made.keys() == kept
    assert max(made.values()) < 120_000
