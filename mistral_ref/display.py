"""Show values as text and as HTML: statistics, numbers and tables. This module knows arrays, not models.

Some texts come from outside: pieces of a tokenizer, names in a file. They must not act as commands of a terminal or as
HTML. The module that reads such a text makes it safe for terminals with `errors.printable`. For HTML pages `html_text`
escapes it here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rich.cells import cell_len


class Statistics(NamedTuple):
    """Statistics of an array: four of its finite values, and the numbers of NaN and infinite values.

    low, high   the smallest and the largest finite value
    mean        their mean
    rms         the square root of the mean of their squares
    n_nan, n_infinite   how many values are NaN, and how many are infinite

    If no value is finite, the first four are NaN.
    """

    low: float
    high: float
    mean: float
    rms: float
    n_nan: int
    n_infinite: int

    def __str__(self) -> str:
        text = f"min {self.low:.4g}, max {self.high:.4g}, mean {self.mean:.4g}, rms {self.rms:.4g}"
        text += f", {self.n_infinite:,} infinite" if self.n_infinite else ""
        return text + (f", {self.n_nan:,} NaN" if self.n_nan else "")


def statistics(values: np.ndarray) -> Statistics:
    """Return the Statistics of an array, computed in float64.

    >>> print(statistics(np.array([1.0, -1.0, 3.0, -np.inf])))
    min -1, max 3, mean 1, rms 1.915, 1 infinite
    """
    finite = values[np.isfinite(values)].astype(np.float64)
    n_nan = int(np.isnan(values).sum())
    n_infinite = values.size - finite.size - n_nan
    if finite.size == 0:
        return Statistics(np.nan, np.nan, np.nan, np.nan, n_nan, n_infinite)
    with np.errstate(over="ignore"):
        rms, mean = float(np.sqrt(np.mean(finite * finite))), float(finite.mean())
    return Statistics(float(finite.min()), float(finite.max()), mean, rms, n_nan, n_infinite)


def size_text(axes: Sequence[str], shape: Sequence[int]) -> str:
    """Return the names of the axes with their sizes, as one text.

    >>> size_text(("token", "dim"), (4, 224))
    'token 4, dim 224'
    """
    return ", ".join(f"{axis} {size}" for axis, size in zip(axes, shape, strict=True))


def numbers(values: np.ndarray, width: int = 100) -> str:
    """Return an array as text with four decimals. If it needs more than 40 lines, its middle is left out.

    width   characters a line
    """
    per_line = max(width // 10, 1)
    n_lines = math.prod(values.shape[:-1]) * -(-values.shape[-1] // per_line) if values.ndim else 1
    return np.array2string(
        values,
        precision=4,
        suppress_small=True,
        threshold=values.size if n_lines <= 40 else 0,
        edgeitems=4 if values.ndim < 3 else 2,
        max_line_width=width,
    )


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """Return a Markdown table that is also readable as plain text.

    The first column is aligned to the left, the others to the right. A table that needs more than `width` columns
    becomes a list, as `list_of_rows` makes it.

    >>> print(markdown_table(["what", "ms"], [["read", "1.5"]]))
    | what |  ms |
    |------|----:|
    | read | 1.5 |
    >>> print(markdown_table(["what", "ms"], [["read", "1.5"]], width=12))
    read
      ms  1.5
    """
    widths = [max(cell_len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    if width is not None and sum(widths) + 3 * len(widths) + 1 > width:
        return list_of_rows(headings, rows)

    def line(cells: Sequence[str]) -> str:
        blanks = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
        padded = [f" {blank}{cell} " for cell, blank in zip(cells, blanks, strict=True)]
        padded[0] = f" {cells[0]}{blanks[0]} "
        return f"|{'|'.join(padded)}|"

    rule = "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])])
    return "\n".join([line(headings), f"|{rule}|", *(line(row) for row in rows)])


def list_of_rows(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as a narrow list: each row is its first cell, and below that a line for each other cell."""
    margin = max(map(cell_len, headings[1:]), default=0)
    lines = []
    for first, *cells in rows:
        named = zip(headings[1:], cells, strict=True)
        lines += [first, *(f"  {name:<{margin}}  {cell}" for name, cell in named if cell)]
    return "\n".join(lines)


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """Return an HTML table. Every text in it goes through `html_text`.

    >>> html_table(["piece"], [["<b>"]])
    '<table><thead><tr><th><bdi>piece</bdi></th></tr></thead><tbody><tr><td><bdi>&lt;b&gt;</bdi></td></tr></tbody></table>'
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html_text(cell)}</{tag}>" for cell in cells) + "</tr>"

    title = f"<caption>{html_text(caption)}</caption>" if caption else ""
    body = "".join(line(row, "td") for row in rows)
    return f"<table>{title}<thead>{line(headings, 'th')}</thead><tbody>{body}</tbody></table>"


def html_text(text: str) -> str:
    """Return a text as HTML: escaped, and inside <bdi>, so that right-to-left text does not reorder its neighbours."""
    return f"<bdi>{html.escape(text)}</bdi>"
