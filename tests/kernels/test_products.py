"""Products with float matrices against NumPy in float64, row by row, whatever the kind of number and the way."""

from __future__ import annotations

import dataclasses

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import to_bfloat16
from support.kernels import (
    KINDS,
    PAIRS,
    UNIT,
    as_stored,
    assert_within,
    each_product,
    every_way,
    input_counts,
    normal,
    output_counts,
    possible_inputs,
    product,
    random_matrix,
    seeds,
    some,
    thread_counts,
    token_counts,
)
from support.marks import slow

from mistral_kernels.matmul import DEPTH, KEPT
from mistral_kernels.matvec import in_pairs
from mistral_kernels.simd import LANES, load, multiply_add_pairs, store
from mistral_kernels.tile import WIDTH
from mistral_ref.weights import Matrix, bf16_bits, bf16_values


@each_product
@given(token_counts, output_counts, input_counts, seeds, thread_counts)
@some
def test_products(stored: str, way: str, n_tokens: int, n_out: int, n_in: int, seed: int, n_threads: int) -> None:
    """The error is a part of the sum of |w x|: that sum grows like the number of inputs n, and so does the error.

    A sum of n random numbers is about sqrt(n), so each of its n roundings moves it by about sqrt(n) units, and as they
    are random themselves all together by about n. Many short sums in lanes lose less than one long one. Twice what was
    measured.
    """
    n_tokens, n_in = min(n_tokens, 3) if way == "one" else n_tokens, possible_inputs(stored, n_in)
    matrix, x_TI = random_matrix(stored, n_out, n_in, seed), normal(seed ^ 2, n_tokens, n_in)
    w_OI, x = matrix.rows(slice(None), np.float64), x_TI.astype(np.float64)
    if stored == PAIRS:
        x = bf16_values(to_bfloat16(x_TI)).astype(np.float64)
    found = product(matrix, x_TI, n_threads, way=way)
    assert_within(found, x @ w_OI.T, (12 if way == "many" else 6) * UNIT * (np.abs(x) @ np.abs(w_OI).T))


@each_product
@given(st.integers(1, 9), output_counts, input_counts, seeds)
@some
def test_threads_do_not_change_a_bit_of_a_product(
    stored: str, way: str, n_tokens: int, n_out: int, n_in: int, seed: int
) -> None:
    n_tokens, n_in = min(n_tokens, 2) if way == "one" else n_tokens, possible_inputs(stored, n_in)
    matrix, x_TI = random_matrix(stored, n_out, n_in, seed), normal(seed ^ 2, n_tokens, n_in)
    alone = product(matrix, x_TI, 1, way=way)
    for n_threads in (2, 3, 7):
        np.testing.assert_array_equal(product(matrix, x_TI, n_threads, way=way), alone)


@pytest.mark.parametrize("stored", [*KINDS, *slow([PAIRS])])
@given(st.integers(2, 24), output_counts, input_counts, seeds)
@some
def test_a_few_tokens_have_the_bits_that_each_has_alone(
    stored: str, n_tokens: int, n_out: int, n_in: int, seed: int
) -> None:
    n_in = possible_inputs(stored, n_in)
    matrix, x_TI = random_matrix(stored, n_out, n_in, seed), normal(seed ^ 2, n_tokens, n_in)
    np.testing.assert_array_equal(product(matrix, x_TI, way="few"), product(matrix, x_TI, way="one"))


@pytest.mark.parametrize("stored", ["f32", "bf16", *slow([PAIRS])])
def test_inputs_of_many_tokens_go_in_chunks(stored: str) -> None:
    """Of so many tokens that a chunk is one panel deep, each has the bits that it has among a few."""
    n_tokens, n_in = KEPT // (2 * DEPTH) + 1, 4 * DEPTH + 6
    matrix, x_TI = random_matrix(stored, WIDTH + 3, n_in, 0), normal(1, n_tokens, n_in)
    found = product(matrix, x_TI, 2, way="many")
    for few in (slice(5), slice(n_tokens - 5, n_tokens)):
        np.testing.assert_array_equal(found[few], product(matrix, x_TI[few], way="many"))


@each_product
@given(st.integers(1, 6), output_counts, input_counts, seeds, st.data())
@some
def test_what_is_no_number_stays_in_its_row(
    stored: str, way: str, n_tokens: int, n_out: int, n_in: int, seed: int, data: st.DataObject
) -> None:
    """A NaN or infinity in row o of the matrix reaches output o alone, and one in a token's x that token alone."""
    n_in = possible_inputs(stored, n_in)
    rows, x_TI = normal(seed, n_out, n_in), normal(seed ^ 2, n_tokens, n_in)
    o, i, t = (data.draw(st.integers(0, n - 1)) for n in (n_out, n_in, n_tokens))
    bad = np.float32(data.draw(st.sampled_from([np.nan] if "fp8" in stored else [np.nan, np.inf, -np.inf])))
    plain = product(as_stored(stored, rows, seed), x_TI, way=way)

    broken_rows = rows.copy()
    broken_rows[o, i] = bad
    found = product(as_stored(stored, broken_rows, seed), x_TI, way=way)
    np.testing.assert_array_equal(np.delete(found, o, 1), np.delete(plain, o, 1))
    np.testing.assert_array_equal(found[:, o], bad * np.sign(x_TI[:, i]))

    x_TI[t, i] = bad
    found = product(as_stored(stored, rows, seed), x_TI, way=way)
    np.testing.assert_array_equal(np.delete(found, t, 0), np.delete(plain, t, 0))
    assert not np.isfinite(found[t]).any()


@every_way(("f16", "bf16", "fp8"))
@pytest.mark.parametrize("n_in", [1, 6, 8, 2 * LANES, 2 * LANES + 6])
def test_every_code_is_widened_to_the_bit(stored: str, n_in: int, way: str) -> None:
    """Row c holds code c and zeros, and is multiplied with ones, so that nothing is rounded; -0 becomes 0."""
    n_in = possible_inputs(stored, n_in)
    codes = np.arange(256 if stored == "fp8" else 65536)
    rows = np.zeros((len(codes), n_in), np.uint8 if stored == "fp8" else np.uint16)
    rows[codes, codes // 3 % n_in] = codes  # a third of the neighbours in the same column, so that all lanes are met
    scale = np.ones((1, 1), np.float32) if stored == "fp8" else None
    matrix = Matrix("w", stored, rows.view(np.float16) if stored == "f16" else rows, scale)
    expected = matrix.rows(slice(None), np.float32)[codes, codes // 3 % n_in]
    expected[expected == 0] = 0
    for y_O in product(matrix, np.ones((2, n_in), np.float32), way=way):
        is_nan = np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(y_O), is_nan)
        np.testing.assert_array_equal(y_O[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32))


@numba.njit
def rounded_in_pairs(x: np.ndarray) -> np.ndarray:
    return in_pairs(x)


def test_every_kind_of_float_is_rounded_to_bf16_to_the_bit() -> None:
    """Every number of 16 bits, the ties between neighbours, and what lies beside them; those beyond become infinite."""
    upper = np.repeat(np.arange(65536, dtype=np.uint32) << 16, 6)
    x = (upper | np.tile(np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32), 65536)).view(np.float32)
    found, is_nan = rounded_in_pairs(x).view(np.uint16), np.isnan(x)
    np.testing.assert_array_equal(found[~is_nan], to_bfloat16(x[~is_nan]))
    assert np.isnan(bf16_values(found)[is_nan]).all()
    np.testing.assert_array_equal(found, bf16_bits(x))


@numba.njit
def one_step_of_pairs(a: np.ndarray, b: np.ndarray, sums: np.ndarray) -> None:
    for i in range(0, len(sums), LANES):
        store(sums, i, multiply_add_pairs(load(a, i), load(b, i), load(sums, i)))


def test_pairs_are_added_up_in_their_order_with_one_rounding_each() -> None:
    """The second of a pair comes first, on whatever processor. The sizes are such that float64 holds a sum exactly."""
    a, b = (to_bfloat16(normal(seed, 1000 * LANES, 2).ravel()) for seed in (1, 2))
    sums = normal(3, 1000 * LANES)
    exact = bf16_values(a).reshape(-1, 2).astype(np.float64) * bf16_values(b).reshape(-1, 2)
    expected = ((sums + exact[:, 1]).astype(np.float32) + exact[:, 0]).astype(np.float32)
    one_step_of_pairs(a.view(np.float32), b.view(np.float32), sums)
    np.testing.assert_array_equal(sums, expected)


@each_product
@given(st.integers(1, 20), st.integers(1, 60), seeds, st.integers(1, 7))
@some
def test_a_matrix_may_lie_at_any_address(stored: str, way: str, n_out: int, n_in: int, seed: int, offset: int) -> None:
    """Tensors of a mapped file begin wherever its header ends."""
    matrix = random_matrix(stored, n_out, possible_inputs(stored, n_in), seed)
    x_TI = normal(seed ^ 2, 2, matrix.shape[1])
    expected = product(matrix, x_TI, way=way)
    buffer = np.zeros(matrix.data.nbytes + offset, np.uint8)
    buffer[offset:] = matrix.as_bytes
    moved = dataclasses.replace(matrix, data=buffer[offset:].view(matrix.data.dtype).reshape(matrix.data.shape))
    assert np.shares_memory(moved.as_bytes, buffer)
    np.testing.assert_array_equal(product(moved, x_TI, way=way), expected)
