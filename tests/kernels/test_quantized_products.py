"""Products with matrices of 8 and 4 bits against sums of integers, which are exact."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import (
    UNIT,
    How,
    any_inputs,
    any_quantized,
    assert_within,
    each_of_some_ways,
    each_quantized_product,
    each_way,
    few_together,
    normal,
    output_counts,
    quantized_input_counts,
    quantized_product,
    seeds,
    some,
    thread_counts,
    token_counts,
)

from mistral_kernels import quantized
from mistral_kernels.matmul import KEPT
from mistral_kernels.tile import WIDTH
from mistral_ref.files.quantized_format import quantized_tensors
from mistral_ref.quantized_matrix import QuantizedMatrix, scale_values
from mistral_ref.rounded_inputs import rounded


def quantized_product_exactly(how: How, matrix: QuantizedMatrix, x_TI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the product of rounded inputs and weights in float64, and how far kernels may lie from it.

    Sums of integers are exact. With one rounding for each step that follows, a group's

        scale scale_x (sum of code q - zero sum of q)

    is off by at most a unit of scale scale_x (|sum of code q| + |zero sum of q|), and by three of its own size: the
    subtraction, the product of the scales, and that with it. Adding up n groups, slab by slab, gives at most n + slabs
    more of these. So this is a bound and no measurement; scale (code + zero) is weight + 2 scale zero.
    """
    x_TI = rounded(x_TI.astype(np.float64), how.inputs, how.group)
    w_OI = matrix.rows(slice(None), np.float64)
    scales = matrix.scales.transpose(0, 3, 2, 1).reshape(-1, 2, matrix.scales.shape[1])[: matrix.n_out]
    zero_weights = (
        float(matrix.unit) * scale_values()[scales[:, 0]].astype(np.float64) * scales[:, 1] * 2.0 ** (how.bits - 8)
    )
    sums_of_both = w_OI + 2 * zero_weights.repeat(how.group, axis=1)[:, : matrix.n_in]
    n_sums = scales.shape[2] + -(-matrix.n_in // quantized.DEPTH)
    size = np.abs(x_TI)
    error = UNIT * (size @ sums_of_both.T + (4 + n_sums) * (size @ np.abs(w_OI).T))
    return x_TI @ w_OI.T, error


@each_quantized_product
@each_way
@given(token_counts, output_counts, quantized_input_counts, seeds, thread_counts)
@some
def test_quantized_products(
    how: How, one_by_one: bool, n_tokens: int, n_out: int, n_in: int, seed: int, n_threads: int
) -> None:
    """Of what the module that rounds says that inputs and weights are."""
    matrix = any_quantized(how, n_out, n_in, seed)
    x_TI = any_inputs(seed ^ 1, min(n_tokens, 3) if one_by_one else n_tokens, n_in)
    found = quantized_product(how, matrix, x_TI, n_threads, one_by_one=one_by_one)
    assert_within(found, *quantized_product_exactly(how, matrix, x_TI))


@each_of_some_ways
@given(st.integers(1, 20), output_counts, quantized_input_counts, seeds)
@some
def test_quantized_prompts_few_tokens_and_single_ones_agree_to_the_bit(
    how: How, n_tokens: int, n_out: int, n_in: int, seed: int
) -> None:
    matrix, x_TI = any_quantized(how, n_out, n_in, seed), any_inputs(seed ^ 1, n_tokens, n_in)
    one_by_one, together = (quantized_product(how, matrix, x_TI, one_by_one=one) for one in (True, False))
    np.testing.assert_array_equal(one_by_one, together)
    stored = matrix.as_bytes, matrix.scale_bytes, matrix.unit
    few = few_together((matrix.kind, how.inputs, how.group), stored, x_TI, n_out)
    np.testing.assert_array_equal(one_by_one, few)


@each_of_some_ways
def test_inputs_of_many_tokens_go_in_chunks_with_quantized_weights(how: How) -> None:
    n_tokens, n_in = KEPT // (2 * quantized.DEPTH) + 1, 2 * quantized.DEPTH + 1
    matrix, x_TI = any_quantized(how, WIDTH + 3, n_in, 0), any_inputs(1, n_tokens, n_in)
    found = quantized_product(how, matrix, x_TI, 2, one_by_one=False)
    for few in (slice(5), slice(n_tokens - 5, n_tokens)):
        for one_by_one in (True, False):
            alone = quantized_product(how, matrix, x_TI[few], one_by_one=one_by_one)
            np.testing.assert_array_equal(found[few], alone)


@each_quantized_product
@each_of_some_ways
@given(st.integers(1, 9), output_counts, quantized_input_counts, seeds)
@some
def test_threads_do_not_change_a_bit_of_a_quantized_product(
    how: How, one_by_one: bool, n_tokens: int, n_out: int, n_in: int, seed: int
) -> None:
    matrix = any_quantized(how, n_out, n_in, seed)
    x_TI = any_inputs(seed ^ 1, min(n_tokens, 2) if one_by_one else n_tokens, n_in)
    alone = quantized_product(how, matrix, x_TI, 1, one_by_one=one_by_one)
    for n_threads in (2, 3, 7):
        found = quantized_product(how, matrix, x_TI, n_threads, one_by_one=one_by_one)
        np.testing.assert_array_equal(found, alone)


@each_quantized_product
@each_of_some_ways
@given(st.integers(1, 6), output_counts, quantized_input_counts, seeds, st.data())
@some
def test_what_is_no_number_stays_in_its_token_of_a_quantized_product(
    how: How, one_by_one: bool, n_tokens: int, n_out: int, n_in: int, seed: int, data: st.DataObject
) -> None:
    """An input that is none makes none of its token alone."""
    matrix, x_TI = any_quantized(how, n_out, n_in, seed), any_inputs(seed ^ 1, n_tokens, n_in)
    matrix.scales[:, :, 0] |= 1  # a scale of 0 would make 0 of a group, whatever is in it, where weights are exact
    i, t = (data.draw(st.integers(0, n - 1)) for n in (n_in, n_tokens))
    plain = quantized_product(how, matrix, x_TI, one_by_one=one_by_one)
    x_TI[t, i] = data.draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    found = quantized_product(how, matrix, x_TI, one_by_one=one_by_one)
    np.testing.assert_array_equal(np.delete(found, t, 0), np.delete(plain, t, 0))
    assert not np.isfinite(found[t]).any()


@each_quantized_product
@each_of_some_ways
@given(st.integers(1, 20), st.integers(1, 150), seeds, st.integers(1, 63), st.integers(1, 63))
@some
def test_codes_and_scales_may_lie_at_any_address(
    how: How, one_by_one: bool, n_out: int, n_in: int, seed: int, offset: int, offset_of_scales: int
) -> None:
    matrix, x_TI = any_quantized(how, n_out, n_in, seed), any_inputs(seed ^ 1, 2, n_in)
    expected = quantized_product(how, matrix, x_TI, one_by_one=one_by_one)
    moved = []
    for array, start in ((matrix.data, offset), (matrix.scales, offset_of_scales)):
        buffer = np.zeros(array.nbytes + start, np.uint8)
        buffer[start:] = array.reshape(-1)
        moved.append(buffer[start:].reshape(array.shape))
    elsewhere = dataclasses.replace(matrix, data=moved[0], scales=moved[1])
    assert np.shares_memory(elsewhere.as_bytes, moved[0])
    assert np.shares_memory(elsewhere.scale_bytes, moved[1])
    np.testing.assert_array_equal(quantized_product(how, elsewhere, x_TI, one_by_one=one_by_one), expected)


@each_quantized_product
@each_of_some_ways
def test_inputs_of_next_to_nothing_are_nothing(how: How, one_by_one: bool) -> None:
    """Where largest / max |x| is beyond float32, as in `rounded`: such a group is as good as zeros."""
    n_in = 2 * how.group + 5
    matrix, x_TI = any_quantized(how, 20, n_in, 0), normal(1, 3, n_in)
    least = {"int16": 32767, "int8": 127}[how.inputs] / float(np.finfo(np.float32).max)
    tiny = np.linspace(-0.9 * least, 0.9 * least, how.group)
    for start in (0, how.group):
        x_TI[:, start : start + how.group] = 0
        expected = quantized_product(how, matrix, x_TI, one_by_one=one_by_one)
        x_TI[:, start : start + how.group] = tiny
        found = quantized_product(how, matrix, x_TI, one_by_one=one_by_one)
        np.testing.assert_array_equal(found, expected)
    x_TI[:] = 0.9 * least
    assert not quantized_product(how, matrix, x_TI, one_by_one=one_by_one).any()


@each_quantized_product
@each_of_some_ways
def test_the_largest_sums_of_integers_do_not_overflow(how: How, one_by_one: bool) -> None:
    """All codes as large as can be, and all inputs: 255 * 32767 * 128 is half of what int32 holds, and twice 15 * 127,
    or 255 * 127, is in or beyond what int16 holds.

    Zeros of 0 leave the sum as it is, and the largest ones take nearly all of it away again. Signs that take turns
    cancel exactly, also within a four and a pair.
    """
    n_out, n_in = 9, 256
    parts = quantized_tensors(n_out, n_in, how.bits, how.group)
    data = np.full(parts["weight"].shape, 255, np.uint8)  # or twice 15
    for zero, scale in ((0, 8 * 16), (255, 8 * 16), (0, 255), (255, 0)):
        both = np.empty(parts["scales"].shape, np.uint8)
        both[:, :, 0], both[:, :, 1] = scale, zero
        matrix = QuantizedMatrix("w", f"int{how.bits}", data, scales=both, n_out=n_out, n_in=n_in)
        i = np.arange(n_in)
        signs = [np.ones(n_in), -np.ones(n_in), 1 - 2 * (i % 2), 1 - 2 * (i // 2 % 2), 1 - 2 * (i // 4 % 2)]
        x_TI = (np.array(signs) * 3).astype(np.float32)
        found = quantized_product(how, matrix, x_TI, one_by_one=one_by_one)
        exact, error = quantized_product_exactly(how, matrix, x_TI)
        assert_within(found, exact, error)
        assert not found[2:].any()
        weight = float(scale_values()[scale]) * (2**how.bits - 1 - zero * 2.0 ** (how.bits - 8))
        for expected, outputs in ((3 * n_in * weight, exact[0]), (-3 * n_in * weight, exact[1])):
            np.testing.assert_allclose(outputs, expected, rtol=1e-6)
