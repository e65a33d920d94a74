"""Heat maps against a loop, their colours, and their images read back."""

from __future__ import annotations

import base64
import math
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from support.matrices import matrices
from support.pages import Page

from mistral_ref.heat_map import (
    HeatMap,
    cell_ranges,
    colours,
    heat_figure,
    heat_image,
    heat_map,
    heat_text,
    legend,
    merged_text,
    shade,
)

INF, NAN = math.inf, math.nan


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
