"""Products with the packed types of GGUF files against sums of integers, which are exact."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.blocks import (
    as_stored,
    block_product,
    each_inputs,
    each_stored,
    each_stored_in_tiles,
    kind_of,
    random_blocks,
    with_ordinary_units,
)
from support.kernels import (
    UNIT,
    any_inputs,
    assert_within,
    each_quantized_product,
    few_together,
    output_counts,
    seeds,
    some,
    thread_counts,
    token_counts,
)

from mistral_kernels.blocks import PACKINGS
from mistral_kernels.quantized import DEPTH
from mistral_ref.block_matrix import BLOCK_TYPES, BlockMatrix, group_factors
from mistral_ref.rounded_inputs import rounded
from mistral_ref.tiled_matrix import TiledMatrix

block_counts = st.integers(1, 20)  # of 32 weights; of 256 there are an eighth as many


def n_blocks_of(kind: Any, blocks_of_32: int) -> int:
    return -(-blocks_of_32 * 32 // BLOCK_TYPES[kind].weights)


def any_matrix(stored: str, n_out: int, blocks_of_32: int, seed: int) -> BlockMatrix:
    kind = kind_of(stored)
    return as_stored(stored, random_blocks(kind, n_out, n_blocks_of(kind, blocks_of_32), seed))


def product_exactly(matrix: BlockMatrix, x_TI: np.ndarray, inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the product of rounded inputs and weights in float64, and how far kernels may lie from it.

    Kernels take codes from 0 on: the code of 0 may be 2^(bits - 1). So a weight counts as much as scale * (|code| +
    2^bits) + |minimum|. Each is rounded eight times at most, and then added up with a rounding for the scale and one
    for the offset of each group, and for each slab.
    """
    x_TI, blocks = rounded(x_TI.astype(np.float64), inputs, matrix.group_size), matrix.blocks(slice(None))
    size = np.abs(group_factors(blocks.scale_unit, blocks.scales).astype(np.float64))[..., np.newaxis]
    size = size * (np.abs(blocks.codes.astype(np.float64)) + 2 ** PACKINGS[matrix.kind].bits)
    if blocks.minimum_unit is not None and blocks.minimums is not None:
        size += np.abs(group_factors(blocks.minimum_unit, blocks.minimums))[..., np.newaxis]
    n_in = matrix.shape[1]
    n_sums = 2 * (n_in // matrix.group_size) + -(-n_in // DEPTH)
    error = UNIT * (8 + n_sums) * (np.abs(x_TI) @ size.reshape(matrix.shape).T)
    return x_TI @ matrix.rows(slice(None), np.float64).T, error


def test_kernels_and_numpy_cut_rows_in_the_same_way() -> None:
    assert {kind: (*packing[:3], packing.has_minimums) for kind, packing in PACKINGS.items()} == {
        kind: (packed.weights, packed.group_size, packed.bytes, packed.has_minimums)
        for kind, packed in BLOCK_TYPES.items()
    }


@each_quantized_product
@each_stored
@each_inputs
@given(token_counts, output_counts, block_counts, seeds, thread_counts)
@some
def test_packed_products(
    stored: str, inputs: Any, one_by_one: bool, n_tokens: int, n_out: int, n_blocks: int, seed: int, n_threads: int
) -> None:
    matrix = any_matrix(stored, n_out, n_blocks, seed)
    x_TI = any_inputs(seed ^ 1, min(n_tokens, 3) if one_by_one else n_tokens, matrix.shape[1])
    found = block_product(matrix, x_TI, inputs, n_threads, one_by_one=one_by_one)
    assert_within(found, *product_exactly(matrix, x_TI, inputs))


@each_quantized_product
@each_stored
@each_inputs
@given(st.integers(1, 9), output_counts, block_counts, seeds)
@some
def test_threads_do_not_change_a_bit_of_a_packed_product(
    stored: str, inputs: Any, one_by_one: bool, n_tokens: int, n_out: int, n_blocks: int, seed: int
) -> None:
    matrix = any_matrix(stored, n_out, n_blocks, seed)
    x_TI = any_inputs(seed ^ 1, min(n_tokens, 2) if one_by_one else n_tokens, matrix.shape[1])
    alone = block_product(matrix, x_TI, inputs, 1, one_by_one=one_by_one)
    for n_threads in (2, 3, 7):
        found = block_product(matrix, x_TI, inputs, n_threads, one_by_one=one_by_one)
        np.testing.assert_array_equal(found, alone)


@each_quantized_product
@each_stored
@each_inputs
@given(st.integers(1, 20), block_counts, seeds, st.integers(1, 63))
@some
def test_blocks_may_lie_at_any_address(
    stored: str, inputs: Any, one_by_one: bool, n_out: int, n_blocks: int, seed: int, offset: int
) -> None:
    matrix = any_matrix(stored, n_out, n_blocks, seed)
    x_TI = any_inputs(seed ^ 1, 2, matrix.shape[1])
    buffer = np.zeros(matrix.data.nbytes + offset, np.uint8)
    buffer[offset:] = matrix.data.reshape(-1)
    elsewhere = dataclasses.replace(matrix, data=buffer[offset:].reshape(matrix.data.shape))
    assert np.shares_memory(elsewhere.as_bytes, buffer)
    found = block_product(elsewhere, x_TI, inputs, one_by_one=one_by_one)
    np.testing.assert_array_equal(found, block_product(matrix, x_TI, inputs, one_by_one=one_by_one))


@each_quantized_product
@each_stored
@each_inputs
@given(st.integers(1, 30), block_counts, seeds)
@some
def test_any_bytes_are_weights(
    stored: str, inputs: Any, one_by_one: bool, n_out: int, n_blocks: int, seed: int
) -> None:
    """Also scales that are subnormal, infinite or NaN: a row has no numbers, or those of its weights."""
    random = np.random.default_rng(seed)
    kind = kind_of(stored)
    shape = n_out, n_blocks_of(kind, n_blocks), BLOCK_TYPES[kind].bytes
    plain = BlockMatrix("w", kind, random.integers(0, 256, shape, dtype=np.uint8))
    matrix = as_stored(stored, plain)
    x_TI = random.uniform(1, 2, (2, matrix.shape[1])).astype(np.float32)
    found = block_product(matrix, x_TI, inputs, one_by_one=one_by_one)
    is_finite = np.isfinite(matrix.rows(slice(None), np.float32)).all(axis=1)
    assert not np.isfinite(found[:, ~is_finite]).any()
    finite = BlockMatrix("w", kind, plain.data[is_finite])
    assert_within(found[:, is_finite], *product_exactly(finite, x_TI, inputs))


@each_quantized_product
@each_stored
@each_inputs
def test_the_largest_sums_of_integers_of_packed_weights_do_not_overflow(
    stored: str, inputs: Any, one_by_one: bool
) -> None:
    """All codes as large as can be, or as small, and all inputs, with signs that take turns or do not."""
    i = np.arange(512)
    signs = [np.ones(512), -np.ones(512), 1 - 2 * (i % 2), 1 - 2 * (i // 2 % 2), 1 - 2 * (i // 4 % 2)]
    x_TI = (np.array(signs) * 3).astype(np.float32)
    kind = kind_of(stored)
    for byte in (0, 0x7F, 0x80, 255):
        data = np.full((9, n_blocks_of(kind, 16), BLOCK_TYPES[kind].bytes), byte, np.uint8)
        matrix = as_stored(stored, BlockMatrix("w", kind, with_ordinary_units(kind, data)))
        found = block_product(matrix, x_TI, inputs, one_by_one=one_by_one)
        assert_within(found, *product_exactly(matrix, x_TI, inputs))


@each_stored_in_tiles
@each_inputs
@given(st.integers(1, 20), output_counts, block_counts, seeds)
@some
def test_prompts_few_tokens_and_single_ones_agree_to_the_bit_in_tiles(
    stored: str, inputs: Any, n_tokens: int, n_out: int, n_blocks: int, seed: int
) -> None:
    matrix = any_matrix(stored, n_out, n_blocks, seed)
    x_TI = any_inputs(seed ^ 1, n_tokens, matrix.shape[1])
    one_by_one, together = (block_product(matrix, x_TI, inputs, one_by_one=one) for one in (True, False))
    np.testing.assert_array_equal(one_by_one, together)
    assert isinstance(matrix, TiledMatrix)
    stored = matrix.as_bytes, matrix.scale_bytes, np.float32(1)
    few = few_together((matrix.kind, inputs, matrix.group_size), stored, x_TI, n_out)
    np.testing.assert_array_equal(one_by_one, few)
