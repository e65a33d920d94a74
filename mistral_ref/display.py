"""Show values as text and as HTML: statistics, numbers, tables and heat maps. This module knows arrays, not models.

Some texts come from outside: pieces of a tokenizer, names in a file. They must not act as commands of a terminal or as
HTML. The module that reads such a text makes it safe for terminals with `errors.printable`. For HTML pages `html_text`
escapes it here.
"""

from __future__ import annotations

import base64
import html
import math
import struct
import zlib
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from rich.cells import cell_len

_POSITIVE, _NEGATIVE, _UNSEEN, _BROKEN = " ░▒▓█", " -=≡#", "·", "!"
_MAX_SUMMARISED = 2**26  # bytes of values; above this a table in a notebook has no statistics, to stay fast
_RED, _BLUE = np.array([178.0, 24.0, 43.0]), np.array([33.0, 102.0, 172.0])  # the ends of ColorBrewer's RdBu


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


class HeatMap(NamedTuple):
    """A matrix made small enough to look at. Neighbouring values share a cell.

    cells   (rows, columns), from -1 to 1: the value of the cell with the largest magnitude, divided by `scale`. NaN if
            all values of the cell are -inf (keys out of sight), inf if one of them is NaN or +inf
    scale   the largest magnitude of a finite value, or the `scale` given to `heat_map`
    is_root     whether the cells are square roots, with their signs kept; small values are then visible beside large
    """

    cells: np.ndarray
    scale: float
    is_root: bool = False


def cell_ranges(size: int, most: int) -> list[range]:
    """Return for each cell the indices of an axis of `size` that share it. There are at most `most` cells.

    >>> cell_ranges(5, 2), cell_ranges(2, 9)
    ([range(0, 2), range(2, 5)], [range(0, 1), range(1, 2)])
    """
    n_cells = min(most, size)
    edges = [cell * size // n_cells for cell in range(n_cells + 1)] if n_cells else []
    return [range(*pair) for pair in pairwise(edges)]


def heat_map(
    matrix: np.ndarray, most_rows: int, most_columns: int, *, is_root: bool = False, scale: float | None = None
) -> HeatMap:
    """Return a HeatMap of a matrix, with at most `most_rows` rows and `most_columns` columns of cells.

    is_root     take the square root of every cell; this suits attention weights, which add up to 1
    scale       the value that a cell of 1 stands for; it must be at least the largest magnitude. Maps of one scale can
                be compared. None: the largest magnitude

    >>> heat_map(np.array([[1.0, -4.0, 2.0, -np.inf]]), 1, 2)
    HeatMap(cells=array([[-1. ,  0.5]]), scale=4.0, is_root=False)
    """
    with np.errstate(invalid="ignore"):  # NaN bit patterns that processors warn about
        matrix = np.atleast_2d(matrix).astype(np.float64)
    is_broken = np.isnan(matrix) | (matrix == np.inf)
    magnitudes = np.where(np.isfinite(matrix), np.abs(matrix), -1.0)  # -1: no finite value
    scale = float(magnitudes.max(initial=0.0)) if scale is None else scale
    values = np.where(np.isfinite(matrix), matrix, 0.0)
    for axis, most in enumerate((most_rows, most_columns)):
        starts = np.array([cell.start for cell in cell_ranges(matrix.shape[axis], most)], int)
        largest = np.maximum.reduceat(magnitudes, starts, axis)
        low, high = np.minimum.reduceat(values, starts, axis), np.maximum.reduceat(values, starts, axis)
        values, magnitudes = np.where(-low > high, low, high), largest
        is_broken = np.logical_or.reduceat(is_broken, starts, axis)
    values = values / (scale or 1.0)
    values = np.copysign(np.sqrt(np.abs(values)), values) if is_root else values
    cells = np.where(magnitudes < 0, np.nan, values)
    return HeatMap(np.where(is_broken, np.inf, cells), scale, is_root)


def merged_text(axis: str, size: int, most: int) -> str:
    """Return a text that says how many indices of an axis share a cell; "" if each index has its own cell.

    >>> merged_text("dim", 224, 56), merged_text("dim", 224, 100), merged_text("dim", 224, 224)
    ('each cell the largest of 4 (dim)', 'each cell the largest of 2 or 3 (dim)', '')
    """
    sizes = sorted({len(cell) for cell in cell_ranges(size, most)} - {0})
    return f"each cell the largest of {' or '.join(map(str, sizes))} ({axis})" if size > most else ""


def shade(cell: float) -> str:
    """Return a cell of a heat map as one character. Negative and positive cells have different characters.

    >>> "".join(shade(cell) for cell in (0.0, 0.2, 0.4, 0.6, 1.0, -0.3, -1.0, np.nan, np.inf))
    ' ░▒▓█=#·!'
    """
    if not np.isfinite(cell):
        return _UNSEEN if np.isnan(cell) else _BROKEN
    return (_POSITIVE if cell >= 0 else _NEGATIVE)[int(np.ceil(4 * abs(cell)))]


def colours(cells: np.ndarray) -> np.ndarray:
    """Return cells (...) of a heat map as colours (..., 3), uint8.

    White is 0, red 1, blue -1, grey NaN (keys out of sight), black inf (a NaN or +inf in the matrix).
    """
    strength = np.abs(np.where(np.isfinite(cells), cells, 0.0))[..., np.newaxis]
    ends = np.where((cells < 0)[..., np.newaxis], _BLUE, _RED)
    rgb = 255 + (ends - 255) * strength
    rgb[np.isnan(cells)] = 214
    rgb[np.isinf(cells)] = 0
    return rgb.astype(np.uint8)


def heat_text(heat: HeatMap) -> list[str]:
    """Return a heat map as lines of text, one character a cell."""
    return ["".join(map(shade, row)) for row in heat.cells.tolist()]


def legend(heat: HeatMap) -> str:
    """Return a line that says which values the characters of a heat map stand for.

    >>> print(legend(heat_map(np.array([0.8, 0.05]), 1, 2, is_root=True)))
    ░▒▓█ up to 0.05, 0.2, 0.45, 0.8 (square-root scale)
    """
    ends = [heat.scale * (n / 4) ** 2 for n in (1, 2, 3, 4)] if heat.is_root else [heat.scale]
    scale = " (square-root scale)" if heat.is_root else ""
    text = f"{_POSITIVE[1:]} up to {', '.join(f'{end:.4g}' for end in ends)}{scale}"
    text += f"   {_NEGATIVE[1:]} down to {-heat.scale:.4g}{scale}" if (heat.cells < 0).any() else ""
    text += f"   {_UNSEEN} out of sight" if np.isnan(heat.cells).any() else ""
    return text + (f"   {_BROKEN} NaN or infinite" if np.isinf(heat.cells).any() else "")


def heat_image(heat: HeatMap, cell_pixels: int = 6) -> str:
    """Return a heat map as an HTML image with its data inside; "" if the heat map has no cells."""
    if heat.cells.size == 0:
        return ""
    n_rows, n_columns = heat.cells.shape
    data = base64.b64encode(_png(colours(heat.cells))).decode()
    return (
        f'<img alt="heat map of {n_rows} by {n_columns} cells, scale {heat.scale:.4g}" '
        f'width="{n_columns * cell_pixels}" height="{n_rows * cell_pixels}" '
        f'style="image-rendering: pixelated; margin: 2px" src="data:image/png;base64,{data}">'
    )


def heat_figure(values: np.ndarray, axes: Sequence[str], by_axis: str | None = None, *, is_root: bool = False) -> str:
    """Return an array as HTML images of at most 32 by 96 cells, with a text below that explains rows and colours.

    axes        the names of the array's axes
    by_axis     for an array of three axes: the axis that gets one image for each index, at most 16 images of one scale
    is_root     as in `heat_map`
    """
    most_rows, most_columns, most_images = 32, 96, 16
    parts, names = values[np.newaxis], list(axes)
    if by_axis is not None:
        parts = np.moveaxis(values, names.index(by_axis), 0)
        names.remove(by_axis)
    whole = heat_map(parts.reshape(-1, parts.shape[-1]), most_rows, most_columns, is_root=is_root)
    heats = [
        heat_map(part, most_rows, most_columns, is_root=is_root, scale=whole.scale) for part in parts[:most_images]
    ]
    sizes = dict(zip(names, parts.shape[1:], strict=True))
    words = [f"{which}: {axis} {sizes[axis]}" for which, axis in zip(("rows", "columns"), names, strict=True)]
    words += [merged_text(axis, sizes[axis], most) for axis, most in zip(names, (most_rows, most_columns), strict=True)]
    if by_axis is not None:
        shown = f"the first {most_images} of " if len(parts) > most_images else ""
        words.insert(0, f"a picture for each {by_axis}, {shown}{len(parts)}")
    words.append(f"white 0, red up to {whole.scale:.4g}, blue down to {-whole.scale:.4g}")
    words.append("square-root scale" if is_root else "")
    words.append("grey: out of sight" if any(np.isnan(heat.cells).any() for heat in heats) else "")
    words.append("black: NaN or infinite" if any(np.isinf(heat.cells).any() for heat in heats) else "")
    caption = html_text("; ".join(word for word in words if word))
    return f"<div>{''.join(map(heat_image, heats))}</div><div>{caption}</div>"


def _png(rgb: np.ndarray) -> bytes:
    """Return an image (rows, columns, 3), uint8, as the bytes of a PNG file (RFC 2083).

    A PNG file is a signature and then chunks. A chunk is a length, a name, data and a checksum.
    """

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    n_rows, n_columns, _ = rgb.shape
    lines = np.concatenate([np.zeros((n_rows, 1), np.uint8), rgb.reshape(n_rows, -1)], axis=1)  # 0: no filter
    header = struct.pack(">IIBBBBB", n_columns, n_rows, 8, 2, 0, 0, 0)  # 8 bits of each of three colours
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(name, data) for name, data in chunks)


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


class ShownStep(Protocol):
    """The attributes of a step that tables and pictures in a notebook need."""

    @property
    def name(self) -> str: ...
    @property
    def axes(self) -> tuple[str, ...]: ...
    @property
    def value(self) -> np.ndarray: ...
    @property
    def formula(self) -> str: ...
    @property
    def sentence(self) -> str: ...
    @property
    def source(self) -> str: ...


def step_html(step: ShownStep) -> str:
    """Return the HTML that a notebook shows for a step: a table of its facts, and its values as images.

    A value with a head axis gets one image for each head.
    """
    rows = [
        ["value", f"{size_text(step.axes, step.value.shape)}, {step.value.dtype}"],
        ["formula", step.formula],
        ["meaning", step.sentence],
        ["statistics", str(statistics(step.value))],
    ]
    rows += [["source", step.source]] if step.source else []
    head_axis = next((axis for axis in step.axes if axis in ("head", "kv_head")), None)
    picture = heat_figure(step.value, step.axes, head_axis, is_root=step.name.endswith("attention_weights"))
    return f"<div>{html_table([step.name, ''], rows)}{picture}</div>"


def steps_html(steps: Collection[ShownStep], caption: str) -> str:
    """Return the HTML table that a notebook shows for several steps; it has no statistics above 64 MiB of values."""
    is_small = sum(step.value.nbytes for step in steps) <= _MAX_SUMMARISED
    rows = [
        [
            step.name,
            size_text(step.axes, step.value.shape),
            str(step.value.dtype),
            str(statistics(step.value)) if is_small else "",
            step.formula,
            step.source,
        ]
        for step in steps
    ]
    return html_table(["step", "axes", "dtype", "statistics", "formula", "source"], rows, caption=caption)


def html_text(text: str) -> str:
    """Return a text as HTML: escaped, and inside <bdi>, so that right-to-left text does not reorder its neighbours."""
    return f"<bdi>{html.escape(text)}</bdi>"
