"""The packed types of GGUF files: every weight, bit for bit, is what the package gguf makes of the same bytes."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.blocks import random_blocks
from support.paths import GOLDEN

from mistral_ref.block_matrix import BLOCK_TYPES, BlockMatrix, group_factors
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.rounded_inputs import rounded
from mistral_ref.tiled_matrix import tiled, tiled_shapes
from mistral_ref.weights import BlockKind

STORED = load_file(GOLDEN / "gguf_blocks.safetensors")
KINDS = get_args(BlockKind)
each_kind = pytest.mark.parametrize("kind", KINDS)


def test_every_kind_has_a_type_and_a_golden_row() -> None:
    assert set(KINDS) == set(BLOCK_TYPES) == {name.split(".")[0].lower() for name in STORED}


@each_kind
def test_rows_equal_the_published_formula_bit_for_bit(kind: Any) -> None:
    blocks, expected = (STORED[f"{kind.upper()}.{name}"] for name in ("blocks", "weights"))
    matrix = BlockMatrix("w", kind, blocks.reshape(len(blocks), -1, BLOCK_TYPES[kind].bytes))
    rows = matrix.rows(slice(None), np.float32)
    assert rows.dtype == np.float32
    assert matrix.shape == rows.shape == expected.shape
    same = (rows.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(rows) & np.isnan(expected))
    assert same.all()


@each_kind
@settings(max_examples=20)
@given(n_out=st.integers(1, 9), n_blocks=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_any_rows_are_those_of_the_whole_matrix(
    kind: Any, n_out: int, n_blocks: int, seed: int, data: st.DataObject
) -> None:
    matrix = random_blocks(kind, n_out, n_blocks, seed)
    whole = matrix.rows(slice(None), np.float32)
    start, stop = sorted(data.draw(st.lists(st.integers(0, n_out), min_size=2, max_size=2)))
    several = np.array(data.draw(st.lists(st.integers(0, n_out - 1), max_size=5)), np.int64)
    for index in (slice(start, stop), several):
        for dtype in (np.float32, np.float64):  # float64 has the weights of float32
            rows = matrix.rows(index, dtype)
            assert rows.dtype == dtype
            assert rows.flags.aligned
            np.testing.assert_array_equal(rows, whole[index])


@each_kind
@settings(max_examples=20)
@given(n_out=st.integers(1, 20), n_blocks=st.integers(1, 3), seed=st.integers(0, 99), data=st.data())
def test_tile_order_keeps_every_weight(kind: Any, n_out: int, n_blocks: int, seed: int, data: st.DataObject) -> None:
    """Also scales that are subnormal, infinite or NaN."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (n_out, n_blocks, BLOCK_TYPES[kind].bytes), dtype=np.uint8)
    matrix = BlockMatrix("w", kind, blocks)
    in_tiles = tiled(matrix)
    assert (in_tiles.shape, in_tiles.group_size, in_tiles.kind) == (matrix.shape, matrix.group_size, kind)
    assert (in_tiles.data.shape, in_tiles.scales.shape) == tiled_shapes(kind, *matrix.shape)
    several = np.array(data.draw(st.lists(st.integers(0, n_out - 1), max_size=5)), np.int64)
    for index in (slice(None), several):
        found, expected = (one.rows(index, np.float32).view(np.uint32) for one in (in_tiles, matrix))
        np.testing.assert_array_equal(found, expected)


@each_kind
def test_blocks_are_what_the_weights_are_made_of(kind: Any) -> None:
    matrix = random_blocks(kind, 5, 2)
    blocks, n_groups = matrix.blocks(slice(None)), matrix.shape[1] // matrix.group_size
    assert blocks.codes.reshape(5, n_groups, -1).shape == (5, n_groups, matrix.group_size)
    assert {blocks.codes.dtype, blocks.scales.dtype} == {np.dtype(np.int8)}
    scale = group_factors(blocks.scale_unit, blocks.scales).astype(np.float64)
    np.testing.assert_array_equal(scale, blocks.scale_unit.astype(np.float64)[..., None] * blocks.scales)  # exact
    weights = scale[..., None] * blocks.codes
    if blocks.minimum_unit is not None:
        weights -= group_factors(blocks.minimum_unit, blocks.minimums)[..., None].astype(np.float64)
    rows = matrix.rows(slice(None), np.float64)
    np.testing.assert_allclose(rows, weights.reshape(rows.shape), rtol=2**-23, atol=2**-30)
    if not kind.startswith("iq4"):  # whose codes are taken from a table
        assert int(blocks.codes.max()) - int(blocks.codes.min()) < 2**matrix.type.bits


@each_kind
def test_numpy_rounds_the_inputs_of_each_group_and_the_oracle_does_not(kind: Any) -> None:
    matrix = random_blocks(kind, 7, 2)
    x = np.random.default_rng(1).normal(size=(3, matrix.shape[1]))
    exact = x @ matrix.rows(slice(None), np.float64).T
    np.testing.assert_allclose(ReferenceOps("float64").linear(x, matrix), exact, rtol=1e-12)
    x_rounded = rounded(x.astype(np.float32), "int16", matrix.group_size).astype(np.float64)
    expected = x_rounded @ matrix.rows(slice(None), np.float64).T
    found = ReferenceOps("float32").linear(x.astype(np.float32), matrix)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
