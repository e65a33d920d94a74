"""How a matrix is rounded to 8 or 4 bits, and how inputs are: by the formulas that the module gives, number by number.

MISTRAL_REF_EXAMPLES says how many examples each property gets.
"""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.checkpoints import to_bfloat16, to_fp8
from support.errors import refused

from mistral_kernels.layout import PLANES, TILE, code_tiles, codes_of_tiles
from mistral_ref.errors import CheckpointError
from mistral_ref.files.quantized_format import quantized_tensors
from mistral_ref.files.rounding import quantized
from mistral_ref.quantized_matrix import BITS, GROUP_SIZES, QuantizedMatrix, scale_values
from mistral_ref.rounded_inputs import rounded
from mistral_ref.weights import Matrix

UNIT = 2.0**-24  # what one rounding to float32 changes at most, as a part of the number
LARGEST = {"int16": 32767, "int8": 127}

some = settings(max_examples=int(os.environ.get("MISTRAL_REF_EXAMPLES", "40")))
seeds = st.integers(0, 2**32 - 1)
each_bits = pytest.mark.parametrize("bits", BITS)
each_group_size = pytest.mark.parametrize("group_size", GROUP_SIZES)
each_rounding = pytest.mark.parametrize("quantized_inputs", LARGEST)

# Of neither are they multiples of a tile, a group or a block of rows; some are.
output_counts = st.integers(1, 40) | st.sampled_from([7, 8, 9, 300])
input_counts = st.integers(1, 300) | st.sampled_from([1, 31, 32, 33, 127, 128, 129, 172])


def float_matrix(values: np.ndarray) -> Matrix:
    return Matrix("w", "f32", values.astype(np.float32))


def unit_of(bits: int) -> float:
    """Return what a zero is counted in."""
    return 2.0 ** (bits - 8)


# ------------------------------------------------------------------------------------------------------------- scales


def test_every_scale_is_what_the_formula_says() -> None:
    values = scale_values()
    assert (values.dtype, values.shape) == (np.float32, (256,))
    for code, value in enumerate(values.tolist()):
        exponent, mantissa = divmod(code, 16)
        assert value == ((1 + mantissa / 16) * 2.0 ** (exponent - 15) if exponent else mantissa / 16 * 2.0**-14)
    assert (np.diff(values) > 0).all()  # so that a scale can be searched for


# ------------------------------------------------------------------------------------------------------------- layout


each_width = pytest.mark.parametrize("bits", PLANES)


@each_width
@given(st.integers(1, 20), st.integers(1, 5), seeds)
@some
def test_codes_come_back_from_their_tiles(bits: int, n_out: int, n_pieces: int, seed: int) -> None:
    random = np.random.RandomState(seed)
    codes = random.randint(0, 2**bits, (n_out, 32 * n_pieces)).astype(np.uint8)
    tiles = code_tiles(codes, bits)
    assert (tiles.shape, tiles.dtype) == ((-(-n_out // TILE), n_pieces * bits, TILE, 4), np.uint8)
    for rows in (random.randint(0, n_out, 9), np.empty(0, np.int64)):
        np.testing.assert_array_equal(codes_of_tiles(tiles, rows, bits), codes[rows])
    every = codes_of_tiles(tiles, np.arange(len(tiles) * TILE), bits)
    np.testing.assert_array_equal(every, np.pad(codes, ((0, -n_out % TILE), (0, 0))))


@each_width
@given(st.integers(1, 20), st.integers(1, 3), seeds)
@some
def test_each_code_is_at_its_place_in_the_file(bits: int, n_out: int, n_pieces: int, seed: int) -> None:
    """The bytes as files hold them, counted out one code and one plane at a time."""
    n_in = 32 * n_pieces
    codes = np.random.RandomState(seed).randint(0, 2**bits, (n_out, n_in)).astype(np.uint8)
    stored = code_tiles(codes, bits).tobytes()
    for o in range(n_out):
        for i in range(n_in):
            found, begin = 0, (o // 8 * n_in + i // 32 * 32) * bits
            below, quad = 0, i % 32 // 4
            for width in PLANES[bits]:
                vector, part = divmod(quad, 8 // width)
                byte = stored[begin + 32 * vector + o % 8 * 4 + i % 4]
                found += (byte >> part * width) % 2**width << below
                begin, below = begin + 32 * width, below + width
            assert found == codes[o, i], (o, i)


# --------------------------------------------------------------------------------------------------------------- rows


def any_matrix(n_out: int, n_in: int, bits: int, group_size: int, seed: int) -> QuantizedMatrix:
    """Return a matrix of any codes, zeros and scales: a file may hold them all."""
    random = np.random.RandomState(seed)
    parts = quantized_tensors(n_out, n_in, bits, group_size)
    both, data = (random.randint(0, 256, parts[name].shape).astype(np.uint8) for name in ("scales", "weight"))
    unit = np.float32(random.choice([2.0**-9, 1, 2.0**5]))
    return QuantizedMatrix("w", f"int{bits}", data, scales=both, unit=unit, n_out=n_out, n_in=n_in)


@each_bits
@each_group_size
@given(st.integers(1, 20), st.integers(1, 140), seeds)
@some
def test_each_weight_is_scale_times_code_less_zero(
    bits: int, group_size: int, n_out: int, n_in: int, seed: int
) -> None:
    matrix = any_matrix(n_out, n_in, bits, group_size, seed)
    assert (matrix.shape, matrix.bits, matrix.group_size) == ((n_out, n_in), bits, group_size)
    assert matrix.size == n_out * n_in
    assert matrix.nbytes == matrix.data.nbytes + matrix.scales.nbytes
    codes = codes_of_tiles(matrix.data, np.arange(n_out), bits)
    rows = matrix.rows(slice(None), np.float64)
    random = np.random.RandomState(seed)
    for o, i in zip(random.randint(0, n_out, 40), random.randint(0, n_in, 40), strict=True):
        scale, zero = matrix.scales[o // 8, i // group_size, :, o % 8]
        assert rows[o, i] == float(matrix.unit * scale_values()[scale]) * (int(codes[o, i]) - int(zero) * unit_of(bits))


@each_bits
@given(output_counts, input_counts, st.sampled_from(GROUP_SIZES), seeds)
@some
def test_rows_in_float32_are_exact(bits: int, n_out: int, n_in: int, group_size: int, seed: int) -> None:
    matrix = any_matrix(n_out, n_in, bits, group_size, seed)
    narrow, wide = (matrix.rows(slice(None), dtype) for dtype in (np.float32, np.float64))
    assert (narrow.dtype, wide.dtype) == (np.float32, np.float64)
    np.testing.assert_array_equal(narrow, wide)


@each_bits
@given(st.integers(1, 40), st.integers(1, 140), seeds, st.data())
@some
def test_some_rows_are_those_of_the_whole(bits: int, n_out: int, n_in: int, seed: int, data: st.DataObject) -> None:
    """By slices with any step, and by integers in any order, often, and counted from the end: as NumPy's own."""
    matrix = any_matrix(n_out, n_in, bits, 32, seed)
    every = matrix.rows(slice(None), np.float32)
    assert every.shape == (n_out, n_in)
    bound, step = st.none() | st.integers(-50, 50), st.none() | st.integers(-3, 3).filter(bool)
    index = slice(data.draw(bound), data.draw(bound), data.draw(step))
    assume(len(every[index]))
    np.testing.assert_array_equal(matrix.rows(index, np.float32), every[index])
    chosen = np.array(data.draw(st.lists(st.integers(-n_out, n_out - 1), min_size=1, max_size=9)), int)
    np.testing.assert_array_equal(matrix.rows(chosen, np.float32), every[chosen])
    with pytest.raises(IndexError):
        matrix.rows(np.array([n_out]), np.float32)


@each_bits
@pytest.mark.parametrize("index", [slice(0), slice(9, None), np.array([], int)], ids=str)
def test_no_rows_are_no_rows(bits: int, index: slice | np.ndarray) -> None:
    matrix = any_matrix(9, 40, bits, 32, 0)
    assert matrix.rows(index, np.float32).shape == float_matrix(np.zeros((9, 40))).rows(index, np.float32).shape


# ----------------------------------------------------------------------------------------------------- rounded weights


def groups_of(rows: np.ndarray, group_size: int) -> np.ndarray:
    """Return rows (O, I) as groups (O, N, G): the last one has its last weight again, where I is no multiple of G."""
    n_out, n_in = rows.shape
    padded = np.pad(rows, ((0, 0), (0, -n_in % group_size)), mode="edge")
    return padded.reshape(n_out, -1, group_size)


def smallest_scales(groups: np.ndarray, bits: int) -> np.ndarray:
    """Return the smallest scale, of one unit for all, whose codes reach from a group's least weight, or 0, to its
    largest one, or 0.

    Computed from float32 as the module does: one ulp decides which of two neighbouring scales it is.
    """
    low, high = np.minimum(groups.min(axis=-1), 0), np.maximum(groups.max(axis=-1), 0)
    least = 2 * float(np.abs(groups).max()) / (2**bits - 1) / 1.9375
    table = scale_values() * np.float32(2.0 ** math.ceil(math.log2(least)) if least else 1)
    found = np.searchsorted(table, ((high - low) / np.float32(2**bits - 1)).astype(np.float32))
    return table[np.maximum(found, 1)].astype(np.float64)


def plainly_rounded(groups: np.ndarray, bits: int) -> np.ndarray:
    """Return groups rounded without any search: smallest scale, middle of the group in the middle of the codes."""
    most, unit, scale = 2**bits - 1, unit_of(bits), smallest_scales(groups, bits)[..., np.newaxis]
    exact = groups.astype(np.float64)
    low, high = np.minimum(exact.min(-1, keepdims=True), 0), np.maximum(exact.max(-1, keepdims=True), 0)
    zero = np.rint((most / 2 - (low + high) / (2 * scale)) / unit) * unit
    return scale * (np.clip(np.rint(exact / scale + zero), 0, most) - zero)


KINDS_OF_WEIGHTS = ("normal", "outliers", "tiny", "large", "positive", "negative", "constant", "two values", "shifted")


class Drawn(NamedTuple):
    """A matrix of weights, and how it is to be rounded."""

    weights: np.ndarray
    bits: int
    group_size: int


@st.composite
def drawn(draw: st.DrawFn) -> Drawn:
    """Draw weights of one kind, from those that networks have to those that they have not."""
    n_out, n_in, seed = draw(output_counts), draw(input_counts), draw(seeds)
    bits, group_size, kind = (draw(st.sampled_from(one)) for one in (BITS, GROUP_SIZES, KINDS_OF_WEIGHTS))
    random = np.random.RandomState(seed)
    weights = random.normal(size=(n_out, n_in)) * 0.02
    if kind == "outliers":
        weights *= np.where(random.uniform(size=weights.shape) < 0.02, 50, 1)
    elif kind == "tiny":
        weights *= 1e-7  # scales without an exponent
    elif kind == "large":
        weights *= 500
    elif kind in ("positive", "negative"):
        weights = np.abs(weights) * (1 if kind == "positive" else -1)
    elif kind == "constant":
        weights[:] = weights[:, :1]
    elif kind == "two values":
        weights = np.where(random.uniform(size=weights.shape) < 0.5, weights[:, :1], weights[:1])
    elif kind == "shifted":
        weights += 0.3
    return Drawn(weights.astype(np.float32), bits, group_size)


def squares_of_errors(found: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the sum of the squared errors of each group, float64."""
    return np.square(found - groups.astype(np.float64)).sum(axis=-1)


def all_weights(matrix: QuantizedMatrix) -> np.ndarray:
    """Return a matrix's weights by group, float64, with those that make the last group a whole one."""
    n_groups = matrix.scales.shape[1]
    whole = QuantizedMatrix(
        "w", matrix.kind, matrix.data, scales=matrix.scales, unit=matrix.unit,
        n_out=matrix.n_out, n_in=n_groups * matrix.group_size,
    )  # fmt: skip
    return whole.rows(slice(None), np.float64).reshape(matrix.n_out, n_groups, -1)


def what_the_search_overlooks(groups: np.ndarray, bits: int) -> np.ndarray:
    """Return by how much the squares that the search takes for the least may be more than that.

    Codes, zeros and weights in scales are up to 2^bits, and rounded to float32; errors are differences between them.
    """
    n = groups.shape[-1]
    return 16 * UNIT * n * 2**bits * np.square(smallest_scales(groups, bits))


@given(drawn())
@some
def test_no_weight_is_further_off_than_its_group_allows(case: Drawn) -> None:
    """With the smallest scale that spans a group every weight is at most half a step off, and the search minimizes the
    sum of squares: so that is at most what half a step for each would give, and one weight's error at most its root.
    """
    weights, bits, group_size = case
    matrix = quantized(float_matrix(weights), bits, group_size)
    groups = groups_of(weights, group_size)
    step = smallest_scales(groups, bits)
    most = group_size * (step / 2) ** 2 + what_the_search_overlooks(groups, bits)
    assert (squares_of_errors(all_weights(matrix), groups) <= most).all()
    error = np.abs(matrix.rows(slice(None), np.float64) - weights)
    assert (error <= np.sqrt(most).repeat(group_size, axis=1)[:, : weights.shape[1]]).all()


@given(drawn())
@some
def test_the_search_never_does_worse_than_no_search(case: Drawn) -> None:
    """By the sum of squared errors."""
    weights, bits, group_size = case
    groups = groups_of(weights, group_size)
    found = squares_of_errors(all_weights(quantized(float_matrix(weights), bits, group_size)), groups)
    plain = squares_of_errors(plainly_rounded(groups, bits), groups)
    allowed = plain + what_the_search_overlooks(groups, bits)
    assert (found <= allowed).all(), (found / allowed).max()


@each_bits
def test_the_search_is_worth_it(bits: int) -> None:
    """On normal weights it takes away some percent of the squared error, and of 4 bits a quarter or more."""
    weights = np.random.RandomState(0).normal(size=(300, 172)).astype(np.float32)
    for group_size in GROUP_SIZES:
        groups = groups_of(weights, group_size)
        found = squares_of_errors(all_weights(quantized(float_matrix(weights), bits, group_size)), groups).sum()
        plain = squares_of_errors(plainly_rounded(groups, bits), groups).sum()
        assert found < {8: 0.98, 4: 0.8}[bits] * plain


@each_bits
@each_group_size
@given(st.integers(1, 20), st.integers(0, 3), seeds)
@some
def test_weights_that_can_be_held_are_held_exactly(
    bits: int, group_size: int, n_out: int, n_more: int, seed: int
) -> None:
    """Where the codes of a group reach from the first to the last, its own scale is the smallest that spans it, and its
    own zero the first that is tried. (With fewer codes another scale may come as close as float32 can tell.)
    """
    n_in = group_size * (1 + n_more)
    drawn = any_matrix(n_out, n_in, bits, group_size, seed)
    random = np.random.RandomState(seed)
    codes = random.randint(0, 2**bits, (n_out, n_in // group_size, group_size)).astype(np.uint8)
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    codes = random.permutation(codes.swapaxes(0, 2)).swapaxes(0, 2)
    scales = drawn.scales.copy()
    scales[:, :, 0] = scales[:, :, 0] % 200 + 40  # of a unit twice as large they still have an exponent
    # the zero is between the first code and the last one: a weight of 0 is always spanned
    scales[:, :, 1] = np.minimum(scales[:, :, 1], (2**bits - 1) / unit_of(bits))
    held = QuantizedMatrix(
        "w", drawn.kind, code_tiles(codes.reshape(n_out, n_in), bits), scales=scales, unit=drawn.unit,
        n_out=n_out, n_in=n_in,
    )  # fmt: skip
    rows = held.rows(slice(None), np.float32)
    np.testing.assert_array_equal(quantized(float_matrix(rows), bits, group_size).rows(slice(None), np.float32), rows)


@each_bits
@each_group_size
def test_rows_of_zeros_stay_zero(bits: int, group_size: int) -> None:
    weights = np.zeros((11, 172), np.float32)
    weights[3], weights[4] = -0.0, 1
    matrix = quantized(float_matrix(weights), bits, group_size)
    rows = matrix.rows(slice(None), np.float32)
    assert not rows[[0, 1, 2, 3, 5, 10]].any()
    np.testing.assert_allclose(rows[4], 1, rtol=0.004)
    assert not matrix.scales[0, :, :, 0].any()


@each_bits
@given(st.floats(2**-20, 100, width=32), st.booleans(), st.sampled_from(GROUP_SIZES))
@some
def test_groups_of_one_value_are_as_exact_as_their_zero(
    bits: int, value: float, is_negative: bool, group_size: int
) -> None:
    """One code is enough for them, and the zero, which has steps of 1 or 1/16, is fitted to it."""
    weights = np.full((2, group_size + 1), -value if is_negative else value, np.float32)
    rows = quantized(float_matrix(weights), bits, group_size).rows(slice(None), np.float64)
    step = smallest_scales(groups_of(weights, group_size), bits)[0, 0]
    assert np.abs(rows - weights).max() <= step * unit_of(bits) / 2 * 1.05
    assert len(np.unique(rows)) == 1


@each_bits
@given(st.integers(1, 20), st.integers(1, 140), st.sampled_from(GROUP_SIZES), seeds)
@some
def test_what_makes_tiles_and_groups_whole_is_as_the_module_says(
    bits: int, n_out: int, n_in: int, group_size: int, seed: int
) -> None:
    weights = np.random.RandomState(seed).normal(size=(n_out, n_in))
    matrix = quantized(float_matrix(weights), bits, group_size)
    parts = quantized_tensors(n_out, n_in, bits, group_size)
    assert (matrix.data.shape, matrix.scales.shape) == (parts["weight"].shape, parts["scales"].shape)
    beyond = matrix.scales.transpose(0, 3, 1, 2).reshape(-1, *parts["scales"].shape[1:3])[n_out:]
    assert not beyond.any()
    row_codes = codes_of_tiles(matrix.data, np.arange(n_out), bits)
    np.testing.assert_array_equal(
        row_codes[:, n_in:], row_codes[:, n_in - 1 : n_in].repeat(row_codes.shape[1] - n_in, 1)
    )


@given(drawn(), seeds)
@some
def test_rows_are_rounded_in_the_order_that_is_asked_for(case: Drawn, seed: int) -> None:
    """To the same bits: no row has anything to do with another one."""
    order = np.random.RandomState(seed).permutation(len(case.weights))
    plain = quantized(float_matrix(case.weights), case.bits, case.group_size).rows(slice(None), np.float32)
    ordered = quantized(float_matrix(case.weights), case.bits, case.group_size, row_order=order)
    np.testing.assert_array_equal(ordered.rows(slice(None), np.float32), plain[order])


@each_bits
def test_threads_do_not_change_a_bit(bits: int) -> None:
    """Of a matrix that is rounded in several blocks of rows."""
    weights = np.random.RandomState(0).normal(size=(300, 2500)).astype(np.float32)
    alone = quantized(float_matrix(weights), bits, 64, threads=1)
    for threads in (2, 5, None):
        found = quantized(float_matrix(weights), bits, 64, threads=threads)
        np.testing.assert_array_equal(found.data, alone.data)
        np.testing.assert_array_equal(found.scales, alone.scales)
    few = quantized(float_matrix(weights[:30]), bits, 64)
    np.testing.assert_array_equal(few.rows(slice(None), np.float32), alone.rows(slice(0, 30), np.float32))


@pytest.mark.parametrize("kind", ["f16", "bf16", "fp8"])
def test_matrices_of_any_kind_are_rounded_by_their_values(kind: str) -> None:
    values, scale = np.random.RandomState(0).normal(size=(40, 172)).astype(np.float32), None
    if kind == "fp8":
        data, scale = to_fp8(values)
        scale = scale.reshape(1, 1)
    else:
        data = values.astype(np.float16) if kind == "f16" else to_bfloat16(values)
    matrix = Matrix("w", kind, data, scale)
    found = quantized(matrix, 8, 32)
    expected = quantized(float_matrix(matrix.rows(slice(None), np.float32)), 8, 32)
    assert found.name == "w"
    np.testing.assert_array_equal(found.data, expected.data)
    np.testing.assert_array_equal(found.scales, expected.scales)


@each_bits
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 299])
def test_weights_that_are_no_numbers_are_refused(bits: int, bad: float, where: int) -> None:
    """In the last block of rows as in the first."""
    weights = np.random.RandomState(0).normal(size=(300, 1700)).astype(np.float32)
    weights[where, 40] = bad
    with refused(CheckpointError, "w", abs(bad), f"{2**bits} codes"):
        quantized(float_matrix(weights), bits, 32)


@each_bits
@pytest.mark.parametrize("size", [2.0**-100, 1.0, 2.0**100])
def test_weights_of_any_size_are_rounded_alike(bits: int, size: float) -> None:
    """The unit takes up the size."""
    weights = np.random.RandomState(0).normal(size=(9, 70)).astype(np.float32)
    plain = quantized(float_matrix(weights), bits, 32)
    scaled = quantized(float_matrix(weights * np.float32(size)), bits, 32)
    assert scaled.unit == plain.unit * np.float32(size)
    np.testing.assert_array_equal(scaled.data, plain.data)
    np.testing.assert_array_equal(scaled.scales, plain.scales)


def test_a_matrix_that_is_quantized_is_not_quantized_again() -> None:
    matrix = quantized(float_matrix(np.ones((3, 5))), 4, 32)
    with refused(CheckpointError, "w", "4 bits", "float weights"):
        quantized(matrix, 8, 32)


# ------------------------------------------------------------------------------------------------------ rounded inputs


def test_inputs_are_rounded_as_by_hand() -> None:
    """127 and 32767 make a scale of 1, so that what is between two whole numbers goes to the even one."""
    for quantized_inputs, largest in LARGEST.items():
        x = np.array([[largest, 0.5, 1.5, 2.5, -0.5, -1.5, largest - 0.5, 0.49, -3.51, 0]])
        expected = [[largest, 0, 2, 2, 0, -2, largest - 1, 0, -4, 0]]
        assert rounded(x, quantized_inputs, 32).tolist() == expected
        # and each group has a scale of its own: here the second and the third, which is not whole
        two = np.concatenate([x, np.zeros((1, 22)), x / 4, np.zeros((1, 22)), x[:, :3] * 8], axis=1)
        found = rounded(two, quantized_inputs, 32)
        assert found[:, :10].tolist() == expected
        assert (found[:, 32:42] * 4).tolist() == expected
        assert (found[:, 64:] / 8).tolist() == [[largest, 0, 2]]
        assert not found[:, 10:32].any()


@each_rounding
@given(st.integers(1, 5), st.integers(1, 300), st.sampled_from(GROUP_SIZES), seeds, st.sampled_from([1e-20, 1, 1e20]))
@some
def test_inputs_move_by_half_a_step_of_their_group_at_most(
    quantized_inputs: str, n_tokens: int, n_in: int, group_size: int, seed: int, size: float
) -> None:
    random = np.random.RandomState(seed)
    x = (random.normal(size=(n_tokens, n_in)) * random.choice([1, 1e-3, 30], (n_tokens, n_in)) * size).astype("f4")
    kept = x.copy()
    found, wide = rounded(x, quantized_inputs, group_size), rounded(x.astype(np.float64), quantized_inputs, group_size)
    assert (found.dtype, wide.dtype, found.shape) == (np.float32, np.float64, x.shape)
    np.testing.assert_array_equal(x, kept)
    largest = np.abs(np.pad(x, ((0, 0), (0, -n_in % group_size))).reshape(n_tokens, -1, group_size)).max(axis=-1)
    largest = largest.repeat(group_size, axis=1)[:, :n_in].astype(np.float64)
    step = largest / LARGEST[quantized_inputs]
    # x / scale has been rounded twice when it is rounded to a whole number, and the scale once
    assert (np.abs(wide - x) <= step / 2 + 3 * UNIT * largest).all()
    np.testing.assert_allclose(found, wide, rtol=UNIT, atol=0)
    q = wide / np.where(step == 0, 1, step)
    np.testing.assert_allclose(q, np.rint(q), rtol=2 * UNIT, atol=0)
    assert np.abs(q).max() <= LARGEST[quantized_inputs] * (1 + 2 * UNIT)
    # what is rounded already stays but for the rounding of its scale
    np.testing.assert_allclose(rounded(found, quantized_inputs, group_size), found, rtol=4 * UNIT, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_inputs_that_are_not_rounded_stay_as_they_are(dtype: str) -> None:
    x = np.random.RandomState(0).normal(size=(3, 50)).astype(dtype)
    assert rounded(x, "float", 32) is x


@each_rounding
@each_group_size
def test_a_group_of_zeros_or_of_next_to_nothing_becomes_zeros(quantized_inputs: str, group_size: int) -> None:
    """Where largest / max |x| is beyond float32: a scale that small would be no number to divide by."""
    least = LARGEST[quantized_inputs] / float(np.finfo(np.float32).max)
    x = np.zeros((1, 3 * group_size), np.float32)
    x[0, :group_size] = least * 0.9
    x[0, 2 * group_size :] = least * 1.1
    x[0, group_size] = -0.0
    found = rounded(x, quantized_inputs, group_size)
    assert not found[0, : 2 * group_size].any()
    np.testing.assert_allclose(found[0, 2 * group_size :], x[0, 2 * group_size :], rtol=1e-3)


@each_rounding
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_group_with_what_is_no_number_is_none_as_a_whole_and_no_other(quantized_inputs: str, bad: float) -> None:
    x = np.random.RandomState(0).normal(size=(3, 100)).astype(np.float32)
    plain = rounded(x, quantized_inputs, 32)
    for i in (0, 31, 32, 70, 99):
        broken = x.copy()
        broken[1, i] = bad
        found = rounded(broken, quantized_inputs, 32)
        of_group = slice(i // 32 * 32, i // 32 * 32 + 32)
        assert not np.isfinite(found[1, of_group]).any()
        found[1, of_group] = plain[1, of_group]
        np.testing.assert_array_equal(found, plain)
