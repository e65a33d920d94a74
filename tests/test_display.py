"""How values are shown: statistics, numbers, tables that line up, pages that parse."""

from __future__ import annotations

import html
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from support.matrices import matrices
from support.pages import Page

from mistral_ref.display import html_table, html_text, markdown_table, numbers, size_text, statistics

INF, NAN = math.inf, math.nan


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
