"""How values are shown: statistics, heat maps against a loop, PNG read back, tables that line up, pages that parse."""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from support.checkpoints import FAMILIES
from support.pages import Page
from support.tiny import model_of

from mistral_ref import Trace
from mistral_ref.display import (
    HeatMap,
    cell_ranges,
    colours,
    heat_figure,
    heat_image,
    heat_map,
    heat_text,
    html_table,
    html_text,
    legend,
    markdown_table,
    merged_text,
    numbers,
    shade,
    size_text,
    statistics,
)
from mistral_ref.steps import CATALOGUE, Step

INF, NAN = math.inf, math.nan
SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0, -2.0, INF, -INF, NAN]


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    values = st.sampled_from(SPECIAL) | st.floats(-1e6, 1e6, width=32)
    flat = draw(st.lists(values, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]))
    return np.array(flat, draw(st.sampled_from([np.float32, np.float64]))).reshape(shape)


# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.0, -3.0, 2.0, 4.0], "min -3, max 4, mean 1, rms 2.739"),
        ([1.0, -1.0, NAN, INF, -INF, NAN], "min -1, max 1, mean 0, rms 1, 2 infinite, 2 NaN"),
        ([NAN], "min nan, max nan, mean nan, rms nan, 1 NaN"),
        ([-INF] * 1234, "min nan, max nan, mean nan, rms nan, 1,234 infinite"),
        ([], "min nan, max nan, mean nan, rms nan"),
        ([1e300], "min 1e+300, max 1e+300, mean 1e+300, rms inf"),
        ([1.7e308, 1.7e308], "min 1.7e+308, max 1.7e+308, mean inf, rms inf"),
    ],
)
def test_statistics(values: list[float], text: str) -> None:
    assert str(statistics(np.array(values))) == text
    assert str(statistics(np.array(values)[np.newaxis])) == text


def test_statistics_are_computed_in_float64() -> None:
    found = statistics(np.array([[1e30, 1e30]], np.float32))
    assert found.rms == found.mean == found.low == float(np.float32(1e30))
    assert statistics(np.full(2**14, 0.1, np.float32)).mean == pytest.approx(float(np.float32(0.1)), rel=1e-15)


@given(matrices())
def test_statistics_are_what_a_loop_finds(matrix: np.ndarray) -> None:
    values = [float(x) for x in matrix.ravel()]
    finite = [x for x in values if math.isfinite(x)]
    found = statistics(matrix)
    assert found.n_nan == sum(math.isnan(x) for x in values)
    assert found.n_infinite == sum(math.isinf(x) for x in values)
    if finite:
        assert (found.low, found.high) == (min(finite), max(finite))
        assert found.mean == pytest.approx(math.fsum(finite) / len(finite), rel=1e-12, abs=1e-6)
        assert found.rms == pytest.approx(math.sqrt(math.fsum(x * x for x in finite) / len(finite)), rel=1e-12)


def test_sizes_and_numbers() -> None:
    assert size_text((), ()) == ""
    assert size_text(("head", "query", "key"), (2, 3, 4)) == "head 2, query 3, key 4"
    assert numbers(np.array([1.0, -0.123456, 1e-9])) == "[ 1.     -0.1235  0.    ]"
    long = numbers(np.arange(1000.0).reshape(2, 500))
    assert long.splitlines() == [
        "[[  0.   1.   2.   3. ... 496. 497. 498. 499.]",
        " [500. 501. 502. 503. ... 996. 997. 998. 999.]]",
    ]
    assert numbers(np.arange(400.0)).count(".") == 400
    for shape, width in (((200, 2), 100), ((100, 2, 2), 100), ((400,), 20), ((5, 8, 32), 40)):
        assert numbers(np.ones(shape), width).count("\n") <= 60
    assert all(len(line) <= 30 for line in numbers(np.arange(50.0), width=30).splitlines())
    assert numbers(np.array([NAN, -INF])) == "[ nan -inf]"


# ---------------------------------------------------------------------------------------------------------- heat maps


def pooled(matrix: np.ndarray, n_rows: int, n_columns: int) -> tuple[list[list[float]], float]:
    """Return cells and scale as heat_map should, cell by cell. Of 2 and -2 the positive one is taken."""
    rows, columns = min(n_rows, matrix.shape[0]), min(n_columns, matrix.shape[1])
    finite = [abs(float(x)) for x in matrix.ravel() if math.isfinite(x)]
    scale = max(finite, default=0.0)
    cells = []
    for row in range(rows):
        cells.append([])
        for column in range(columns):
            block = [
                float(matrix[i, j])
                for i in range(row * matrix.shape[0] // rows, (row + 1) * matrix.shape[0] // rows)
                for j in range(column * matrix.shape[1] // columns, (column + 1) * matrix.shape[1] // columns)
            ]
            assert block
            if any(math.isnan(x) or x == INF for x in block):
                cells[-1].append(INF)
            elif seen := [x for x in block if x != -INF]:
                cells[-1].append(max(seen, key=lambda x: (abs(x), x)) / (scale or 1))
            else:
                cells[-1].append(NAN)
    return cells, scale


@given(matrices(), st.integers(1, 11), st.integers(1, 11))
def test_a_heat_map_is_what_a_loop_finds(matrix: np.ndarray, n_rows: int, n_columns: int) -> None:
    heat = heat_map(matrix, n_rows, n_columns)
    cells, scale = pooled(matrix, n_rows, n_columns)
    np.testing.assert_array_equal(heat.cells, cells)
    assert heat.scale == scale
    assert (np.abs(heat.cells[np.isfinite(heat.cells)]) <= 1).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 4)])
def test_a_matrix_that_is_small_enough_is_shown_as_it_is(shape: tuple[int, int]) -> None:
    matrix = np.random.RandomState(0).normal(size=shape)
    for most in (shape, (100, 200)):
        heat = heat_map(matrix, *most)
        np.testing.assert_array_equal(heat.cells, matrix / np.abs(matrix).max())
    assert heat_map(matrix, 1, 1).cells.shape == (1, 1)
    assert abs(heat_map(matrix, 1, 1).cells[0, 0]) == 1


def test_a_row_is_a_matrix() -> None:
    np.testing.assert_array_equal(heat_map(np.array([1.0, -2.0]), 4, 4).cells, [[0.5, -1.0]])


def test_a_heat_map_of_nothing_to_be_seen() -> None:
    hidden = heat_map(np.full((3, 2), -INF), 2, 2)
    assert hidden.scale == 0
    assert np.isnan(hidden.cells).all()
    assert heat_text(hidden) == ["··", "··"]
    assert legend(hidden) == "░▒▓█ up to 0   · out of sight"
    assert (colours(hidden.cells) == 214).all()
    zeros = heat_map(np.zeros((1, 3)), 2, 2)
    assert heat_text(zeros) == ["  "]
    assert (colours(zeros.cells) == 255).all()
    empty = heat_map(np.zeros((0, 3)), 2, 2)
    assert (empty.cells.shape, heat_text(empty), heat_image(empty)) == ((0, 2), [], "")


def test_a_square_root_scale_brings_small_weights_out() -> None:
    weights = np.array([[0.05, 0.8, -0.2, 0.0, -INF]])
    heat = heat_map(weights, 1, 5, is_root=True)
    np.testing.assert_allclose(heat.cells, [[0.25, 1, -0.5, 0, NAN]])
    assert heat_text(heat) == ["░█= ·"]
    assert legend(heat) == (
        "░▒▓█ up to 0.05, 0.2, 0.45, 0.8 (square-root scale)   -=≡# down to -0.8 (square-root scale)   · out of sight"
    )
    assert heat_map(weights, 1, 5, scale=1.6).cells[0, 1] == 0.5


@given(st.integers(0, 40), st.integers(1, 40))
def test_cells_share_an_axis_and_it_is_said_how(size: int, most: int) -> None:
    cells = cell_ranges(size, most)
    assert [at for cell in cells for at in cell] == list(range(size))
    assert len(cells) == min(size, most)
    assert max(map(len, cells), default=0) - min(map(len, cells), default=0) <= 1
    assert bool(merged_text("dim", size, most)) == (size > most)
    assert all(f"{len(cell)}" in merged_text("dim", size, most) for cell in cells if size > most)


def test_one_broken_value_breaks_its_cell_alone() -> None:
    matrix = np.ones((4, 4))
    matrix[1, 2] = NAN
    matrix[3, 0] = INF
    matrix[0, :] = -INF
    heat = heat_map(matrix, 2, 2)
    np.testing.assert_array_equal(heat.cells, [[1, INF], [INF, 1]])
    assert heat_text(heat) == ["█!", "!█"]
    assert colours(heat.cells)[0, 1].tolist() == [0, 0, 0]
    assert legend(heat) == "░▒▓█ up to 1   ! NaN or infinite"


def test_shades() -> None:
    edges = [0.0, 1e-9, 0.25, 0.2500001, 0.5, 0.75, 0.76, 1.0]
    assert "".join(map(shade, edges)) == " ░░▒▒▓██"
    assert "".join(shade(-edge) for edge in edges) == " --==≡##"
    assert [shade(x) for x in (NAN, INF, -INF)] == ["·", "!", "!"]
    assert all(cell_len(char) == 1 for char in " ░▒▓█-=≡#·!")


def test_the_legend_tells_what_there_is() -> None:
    assert legend(heat_map(np.array([[0.5, 2.0]]), 1, 2)) == "░▒▓█ up to 2"
    everything = heat_map(np.array([[123456.0, -1.0, -INF, NAN]]), 1, 4)
    assert legend(everything) == ("░▒▓█ up to 1.235e+05   -=≡# down to -1.235e+05   · out of sight   ! NaN or infinite")
    assert heat_text(everything) == ["█-·!"]


@given(matrices())
def test_colours(matrix: np.ndarray) -> None:
    """White at 0; towards red and blue by as much as the cell is far from it."""
    rgb = colours(heat_map(matrix, 9, 9).cells)
    assert rgb.dtype == np.uint8
    for cell, colour in zip(heat_map(matrix, 9, 9).cells.ravel(), rgb.reshape(-1, 3).tolist(), strict=True):
        if math.isnan(cell):
            assert colour == [214, 214, 214]
        elif math.isinf(cell):
            assert colour == [0, 0, 0]
        else:
            end = (33, 102, 172) if cell < 0 else (178, 24, 43)
            exact = [255 + (x - 255) * abs(cell) for x in end]
            assert all(abs(found - x) <= 1 for found, x in zip(colour, exact, strict=True))


def decoded(png: bytes) -> np.ndarray:
    """Return a PNG's colours, read by the book: chunks with checksums, one filter byte a line."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        name, data = png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        assert struct.unpack(">I", png[at + 8 + length : at + 12 + length]) == (zlib.crc32(name + data),)
        chunks.append((name, data))
        at += 12 + length
    assert at == len(png)
    assert [name for name, _ in chunks] == [b"IHDR", b"IDAT", b"IEND"]
    n_columns, n_rows, *rest = struct.unpack(">IIBBBBB", chunks[0][1])
    assert rest == [8, 2, 0, 0, 0]  # bits, true colour; deflate, filters line by line, not interlaced
    assert chunks[2][1] == b""
    lines = np.frombuffer(zlib.decompress(chunks[1][1]), np.uint8).reshape(n_rows, 1 + 3 * n_columns)
    assert not lines[:, 0].any()  # no filter
    return lines[:, 1:].reshape(n_rows, n_columns, 3)


@given(matrices(), st.integers(1, 12))
def test_an_image_holds_the_colours(matrix: np.ndarray, cell_pixels: int) -> None:
    heat = heat_map(matrix, 7, 5)
    page = Page(heat_image(heat, cell_pixels))
    (image,) = page.images
    n_rows, n_columns = heat.cells.shape
    png = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
    np.testing.assert_array_equal(decoded(png), colours(heat.cells))
    assert (int(image["width"]), int(image["height"])) == (n_columns * cell_pixels, n_rows * cell_pixels)
    assert image["alt"] == f"heat map of {n_rows} by {n_columns} cells, scale {heat.scale:.4g}"


def test_an_image_that_is_wider_than_high() -> None:
    heat = HeatMap(np.array([[0.0, 1.0, -1.0]]), 3.5)
    image = Page(heat_image(heat, 2)).images[0]
    assert (image["width"], image["height"]) == ("6", "2")
    png = base64.b64decode(image["src"].partition(",")[2])
    assert decoded(png).tolist() == [[[255, 255, 255], [178, 24, 43], [33, 102, 172]]]


# -------------------------------------------------------------------------------------------------------------- tables


TEXTS = st.text(st.sampled_from("ab 日本🙂é▁|\u0301"), max_size=6)


@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(TEXTS, min_size=n, max_size=n), min_size=1, max_size=5)))
def test_tables_line_up_however_wide_characters_are(table: list[list[str]]) -> None:
    headings, *rows = table
    lines = markdown_table(headings, rows).split("\n")
    assert len({cell_len(line) for line in lines}) == 1
    widths = [max(cell_len(row[column]) for row in table) for column in range(len(headings))]
    rule = [f"{'-' * (widths[0] + 2)}", *(f"{'-' * (width + 1)}:" for width in widths[1:])]
    assert lines[1] == f"|{'|'.join(rule)}|"
    for line, row in zip([lines[0], *lines[2:]], table, strict=True):
        blanks = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        first, *others = zip(row, blanks, strict=True)
        expected = [f" {first[0]}{first[1]} ", *(f" {blank}{cell} " for cell, blank in others)]
        assert line == f"|{'|'.join(expected)}|"


def test_a_table_with_wide_characters() -> None:
    assert markdown_table(["piece", "p"], [["日本", "0.5"], ["🙂", "🙂"], ["é", "1"]]) == (
        "| piece |   p |\n"
        "|-------|----:|\n"
        "| 日本  | 0.5 |\n"
        "| 🙂    |  🙂 |\n"
        "| é     |   1 |"
    )  # fmt: skip
    assert markdown_table(["only"], []) == "| only |\n|------|"


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img onerror=x>',
    "&lt;b&gt;",
    "</bdi></td>",
    "<!-- x",
    "]]>",
    "'",
    "é🙂",
    "",
]


def test_texts_in_a_page_are_escaped() -> None:
    for text in HOSTILE:
        page = Page(html_text(text))
        assert page.texts == ([text] if text else [])
        assert html_text(text) == f"<bdi>{html.escape(text)}</bdi>"
    rows = [[one, other] for one in HOSTILE for other in HOSTILE]
    page = Page(html_table(HOSTILE[:2], rows, caption=HOSTILE[0]))
    assert page.tables == [[HOSTILE[:2], *rows]]
    assert page.texts[0] == HOSTILE[0]
    assert "<caption>" not in html_table(["a"], [["b"]])


@given(st.lists(st.text(max_size=8), min_size=1, max_size=3))
def test_any_text_in_a_page_is_that_text(texts: list[str]) -> None:
    shown = [text for text in texts if text.isprintable()] or ["x"]  # whoever takes a text in makes it printable
    assert Page(html_table(shown, [shown])).tables == [[shown, shown]]


@pytest.mark.parametrize("family", ["dense_windowed", "mixtral_windowed"])
def test_every_step_is_shown_in_a_notebook(family: str) -> None:
    model = model_of(FAMILIES[family].config)
    trace = model.trace([5, 6, 7])
    for name, step in trace.steps.items():
        page = Page(step._repr_html_())
        assert page.tables == [
            [
                [name, ""],
                ["value", f"{size_text(step.axes, step.value.shape)}, float32"],
                ["formula", step.formula],
                ["meaning", step.sentence],
                ["statistics", str(step.statistics)],
                ["source", step.source],
            ]
        ]
        heads = [axis for axis in step.axes if axis in ("head", "kv_head")]
        assert len(page.images) == (step.value.shape[step.axes.index(heads[0])] if heads else 1)
        caption = page.texts[-1]
        rows, columns = (axis for axis in step.axes if axis not in heads)
        sizes = dict(zip(step.axes, step.value.shape, strict=True))
        assert f"rows: {rows} {sizes[rows]}; columns: {columns} {sizes[columns]};" in caption
        assert f"white 0, red up to {np.abs(step.value[np.isfinite(step.value)]).max():.4g}, blue down to" in caption
        assert ("a picture for each" in caption) == bool(heads)
        assert ("square-root scale" in caption) == name.endswith("attention_weights")
        assert ("grey: out of sight" in caption) == name.endswith("scores")
        assert step.statistics == statistics(step.value)
        assert repr(step) == f"<Step {name} ({size_text(step.axes, step.value.shape)}) float32: {step.formula}>"
    (table,) = Page(trace._repr_html_()).tables
    assert table[0] == ["step", "axes", "dtype", "statistics", "formula", "source"]
    assert [row[0] for row in table[1:]] == list(trace)
    assert [row[3] for row in table[1:]] == [str(step.statistics) for step in trace.steps.values()]
    assert [row[5] for row in table[1:]] == [step.source for step in trace.steps.values()]
    assert Page(trace._repr_html_()).texts[0] == repr(trace)
    assert Page(Trace([], [], [])._repr_html_()).tables == [[table[0]]]


def test_a_figure_has_one_scale_and_at_most_sixteen_pictures() -> None:
    values = np.ones((2, 20, 200)) * np.arange(20)[:, np.newaxis]
    page = Page(heat_figure(values, ("token", "head", "head_dim"), "head"))
    assert len(page.images) == 16
    assert {image["alt"] for image in page.images} == {"heat map of 2 by 96 cells, scale 19"}
    assert page.texts == [
        "a picture for each head, the first 16 of 20; rows: token 2; columns: head_dim 200; "
        "each cell the largest of 2 or 3 (head_dim); white 0, red up to 19, blue down to -19"
    ]
    png = base64.b64decode(page.images[15]["src"].partition(",")[2])
    np.testing.assert_array_equal(decoded(png), colours(np.full((2, 96), 15 / 19)))


def test_a_step_of_broken_values_is_shown_too() -> None:
    for value in (np.full((2, 3), NAN), np.full((2, 3), -INF), np.zeros((0, 3)), np.full((2, 3), 1e308)):
        step = Step("norm", CATALOGUE["norm"], value)
        page = Page(step._repr_html_())
        assert page.tables[0][4] == ["statistics", str(statistics(value))]
        assert len(page.images) == (value.size > 0)
