"""Heat maps: a matrix made small enough to look at, as characters and as an image. This module knows arrays only."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mistral_ref.display import html_text

_POSITIVE, _NEGATIVE, _UNSEEN, _BROKEN = " ░▒▓█", " -=≡#", "·", "!"
_RED, _BLUE = np.array([178.0, 24.0, 43.0]), np.array([33.0, 102.0, 172.0])  # the ends of ColorBrewer's RdBu


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
