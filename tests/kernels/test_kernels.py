"""The compiled kernels against NumPy in float64: any shape, any kind of number, any number of threads, and no step
beyond an array's end.

MISTRAL_REF_EXAMPLES says how many examples each property gets; with ten or fewer not all kernels for quantized weights
are compiled. Run as a script, this file multiplies, attends and
normalizes with arrays that end where readable memory ends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import to_bfloat16
from support.marks import slow, slow_but
from support.paths import ROOT

from mistral_kernels import attention, elementwise, panels, quantized, threads
from mistral_kernels.matmul import DEPTH, KEPT, matmul, slab_shape
from mistral_kernels.matvec import FEW, ONE, PART, in_pairs, matvec, matvec_tiled
from mistral_kernels.quantized import matmul_quantized, matvec_quantized, slab_shapes
from mistral_kernels.simd import LANES, load, multiply_add_pairs, store
from mistral_kernels.tile import WIDTH
from mistral_ref.activations import rounded
from mistral_ref.files.quantized_format import quantized_parts
from mistral_ref.ops import KeyView
from mistral_ref.quantized_matrix import QuantizedMatrix, scale_values
from mistral_ref.reference_ops import ReferenceOps, in_steps
from mistral_ref.weights import FP8_BLOCK, Matrix, TiledMatrix, bf16_bits, bf16_values, e4m3_values, tiled

UNIT = 2.0**-24  # what one rounding to float32 changes at most, as a part of the number

EXAMPLES = int(os.environ.get("MISTRAL_REF_EXAMPLES", "40"))

HOST_FEATURES = {name for name, present in llvm.get_host_cpu_features().items() if present}

some = settings(max_examples=EXAMPLES)
seeds = st.integers(0, 2**32 - 1)
thread_counts = st.sampled_from([1, 2, 3, 7])


@pytest.fixture(autouse=True, scope="module")
def one_running_thread() -> Iterator[None]:
    """Let one thread do what several share out, except where a test says otherwise: on a busy machine they wait."""
    with threads.using(1):
        yield


def sizes(most: int, *borders: int) -> st.SearchStrategy[int]:
    """Draw a size up to `most`, and as often one beside those at which a kernel changes its way."""
    beside = sorted({border + more for border in borders for more in (-1, 0, 1) if border + more >= 1})
    return st.integers(1, most) | st.sampled_from(beside)


token_counts = sizes(40, 2, 4, 8)
output_counts = sizes(70, 8, 16, WIDTH, 2 * WIDTH, FP8_BLOCK, 2 * FP8_BLOCK)
input_counts = sizes(300, 8, LANES, 2 * LANES, 4 * LANES, FP8_BLOCK, DEPTH, PART)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).normal(size=shape).astype(np.float32)


def assert_within(found: np.ndarray, exact: np.ndarray, error: np.ndarray) -> None:
    """Fail where `found` is further from `exact` than `error` allows, and say by what factor at most."""
    factor = np.abs(found - exact) / np.maximum(error, np.finfo(np.float32).tiny)
    assert factor.max(initial=0) <= 1, np.unravel_index(factor.argmax(), factor.shape)


# ----------------------------------------------------------------------------------------------------------- products

KINDS = ("f32", "f16", "bf16", "fp8", "fp8 blocks")
TILED = ("f16 tiled", "bf16 tiled")
PAIRS = ("bf16 pairs", "bf16 tiled pairs")  # whose inputs are rounded to bf16
ALL_STORED = (*KINDS, *TILED, *PAIRS)


def ways(stored: str) -> tuple[str, ...]:
    """Return the ways to multiply with a matrix that is stored so: token by token, a few at once, or many."""
    return ("one", "many") if "tiled" in stored else ("one", "few", "many")


def every_way(all_stored: Iterable[str]) -> pytest.MarkDecorator:
    """Try every way of products with matrices that are stored so.

    Tiles and pairs are made only where somebody asks for them (repack=True, activations="bfloat16"), and are slow.
    """
    tried = [(stored, way) for stored in all_stored for way in ways(stored)]
    marks = {stored: () if stored in KINDS else pytest.mark.slow for stored in all_stored}
    return pytest.mark.parametrize(("stored", "way"), [pytest.param(*one, marks=marks[one[0]]) for one in tried])


each_product = every_way(ALL_STORED)
each_quantized_product = pytest.mark.parametrize("one_by_one", [True, False], ids=["one", "many"])


def as_stored(stored: str, values: np.ndarray, seed: int = 0) -> Matrix:
    """Return a matrix of a kind that holds about these values, the fp8 ones times scales of its own.

    Its name says how it is stored, and whether products take pairs of it.
    """
    kind, _, variant = stored.partition(" ")
    scale = None
    if kind == "f32":
        data = values
    elif kind == "f16":
        data = values.astype(np.float16)
    elif kind == "bf16":
        data = to_bfloat16(values)
    else:
        positive = e4m3_values()[:127]
        codes = np.searchsorted((positive[1:] + positive[:-1]) / 2, np.abs(values))
        codes = np.where(np.isnan(values), 127, codes)
        data = np.where(values < 0, codes + 128, codes).astype(np.uint8)
        grid = tuple(-(-size // FP8_BLOCK) for size in values.shape) if variant else (1, 1)
        scale = np.random.RandomState(seed).uniform(0.5, 2, grid).astype(np.float32)
    matrix = Matrix(stored, kind, data, scale)
    return tiled(matrix) if variant.startswith("tiled") else matrix


def random_matrix(stored: str, n_out: int, n_in: int, seed: int) -> Matrix:
    """Return random numbers of very different sizes, some of them subnormal in 16 bits."""
    spread = np.random.RandomState(seed ^ 1).choice([1, 1, 1, 2.0**-9, 2.0**-22], (n_out, n_in))
    return as_stored(stored, normal(seed, n_out, n_in) * spread.astype(np.float32), seed)


def product(
    matrix: Matrix, x_TI: np.ndarray, n_threads: int = 1, *, way: str, into: np.ndarray | None = None
) -> np.ndarray:
    """Return x · Wᵀ by one of the ways."""
    y_TO = np.full((len(x_TI), matrix.shape[0]), np.nan, np.float32) if into is None else into
    scale = np.ones((1, 1), np.float32) if matrix.scale is None else matrix.scale
    is_tiled, kind = isinstance(matrix, TiledMatrix), "pairs" if matrix.name in PAIRS else matrix.kind
    if way == "few":
        matvec(kind, FEW)(matrix.as_bytes, scale, x_TI, y_TO, n_threads)
        return y_TO
    if way == "many":
        slabs = np.full(slab_shape(kind, *x_TI.shape), np.nan, np.float32)
        matmul(kind, is_tiled)(matrix.as_bytes, scale, x_TI, slabs, y_TO, n_threads)
        return y_TO
    for t in range(len(x_TI)):
        if is_tiled:
            matvec_tiled(kind)(matrix.as_bytes, x_TI[t], y_TO[t], n_threads)
        else:
            matvec(kind, ONE)(matrix.as_bytes, scale, x_TI[t : t + 1], y_TO[t : t + 1], n_threads)
    return y_TO


def possible_inputs(stored: str, n_in: int) -> int:
    """Return a number of inputs, n_in or the next, that rows stored so can have: whole vectors of tiles, and pairs."""
    multiple = {"f16 tiled": 2, "bf16 tiled": 2, "bf16 pairs": 2, "bf16 tiled pairs": 4}.get(stored, 1)
    return -(-n_in // multiple) * multiple


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
    assert isinstance(matrix, TiledMatrix) == ("tiled" in stored)
    w_OI, x = matrix.rows(slice(None), np.float64), x_TI.astype(np.float64)
    if stored in PAIRS:
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


@pytest.mark.parametrize("stored", ["f32", "bf16", *slow(["bf16 pairs", "f16 tiled"])])
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


@every_way(("f16", "bf16", "fp8", *TILED))
@pytest.mark.parametrize("n_in", [1, 6, 8, 2 * LANES, 2 * LANES + 6])
def test_every_code_is_widened_to_the_bit(stored: str, n_in: int, way: str) -> None:
    """Row c holds code c and zeros, and is multiplied with ones, so that nothing is rounded; -0 becomes 0."""
    n_in = possible_inputs(stored, n_in)
    codes = np.arange(256 if stored == "fp8" else 65536)
    rows = np.zeros((len(codes), n_in), np.uint8 if stored == "fp8" else np.uint16)
    rows[codes, codes // 3 % n_in] = codes  # a third of the neighbours in the same column, so that all lanes are met
    kind = stored.removesuffix(" tiled")
    scale = np.ones((1, 1), np.float32) if kind == "fp8" else None
    matrix = Matrix("w", kind, rows.view(np.float16) if kind == "f16" else rows, scale)
    expected = matrix.rows(slice(None), np.float32)[codes, codes // 3 % n_in]
    expected[expected == 0] = 0
    matrix = tiled(matrix) if stored in TILED else matrix
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


# ------------------------------------------------------------------------------------- products with quantized weights


class How(NamedTuple):
    """What one of these kernels is made for."""

    bits: int
    activations: str
    group: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


EVERY_WAY = [How(*one) for one in itertools.product((8, 4), ("int16", "int8"), (32, 64, 128))]
# All bits with all activations, and all sizes of groups: each takes seconds to compile. The first has the largest sums.
SOME_WAYS = [How(8, "int16", 128), How(8, "int8", 32), How(4, "int16", 32), How(4, "int8", 64)]


def usual_first(ways: list[How]) -> list[Any]:
    """Return ways of which those with groups of 32, which all files have unless somebody asks, are tried each time."""
    return slow_but([str(how) for how in ways if how.group == 32], {str(how): how for how in ways})


each_way = pytest.mark.parametrize("how", usual_first(EVERY_WAY if EXAMPLES > 10 else SOME_WAYS))
each_of_some_ways = pytest.mark.parametrize("how", usual_first(SOME_WAYS))
quantized_input_counts = sizes(300, 32, 64, 128, quantized.DEPTH, 2 * quantized.DEPTH)


def any_quantized(how: How, n_out: int, n_in: int, seed: int) -> QuantizedMatrix:
    """Return a matrix of any codes, zeros and scales: a file may hold them all."""
    random = np.random.RandomState(seed)
    parts = quantized_parts(n_out, n_in, how.bits, how.group)
    both, data = (random.randint(0, 256, parts[name].shape).astype(np.uint8) for name in ("scales", "weight"))
    unit = np.float32(random.choice([2.0**-9, 1, 2.0**5]))
    return QuantizedMatrix("w", f"int{how.bits}", data, scales=both, unit=unit, n_out=n_out, n_in=n_in)


def any_inputs(seed: int, n_tokens: int, n_in: int) -> np.ndarray:
    """Return inputs some of which are much larger than their neighbours, and some of which are 0 for a while."""
    random = np.random.RandomState(seed)
    x_TI = random.normal(size=(n_tokens, n_in)) * random.choice([1, 1, 1, 1e-3, 40], (n_tokens, n_in))
    start = random.randint(0, n_in)
    x_TI[:, start : start + 70] *= random.choice([0, 1, 1, 1e-6], (n_tokens, 1))
    return x_TI.astype(np.float32)


def quantized_product(
    how: How,
    matrix: QuantizedMatrix,
    x_TI: np.ndarray,
    n_threads: int = 1,
    *,
    one_by_one: bool,
    into: np.ndarray | None = None,
) -> np.ndarray:
    """Return x · Wᵀ by matvec_quantized, token by token, or by matmul_quantized."""
    y_TO = np.full((len(x_TI), matrix.shape[0]), np.nan, np.float32) if into is None else into
    if not one_by_one:
        q_shape, scales_shape = slab_shapes(how.group, *x_TI.shape)
        q, scales_x = np.full(q_shape, 99, how.activations), np.full(scales_shape, np.nan, np.float32)
        matmul_quantized(*how)(matrix.as_bytes, matrix.scale_bytes, matrix.unit, x_TI, q, scales_x, y_TO, n_threads)
        return y_TO
    for x_I, y_O in zip(x_TI, y_TO, strict=True):
        matvec_quantized(*how)(matrix.as_bytes, matrix.scale_bytes, matrix.unit, x_I, y_O, n_threads)
    return y_TO


def quantized_product_exactly(how: How, matrix: QuantizedMatrix, x_TI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the product of rounded inputs and weights in float64, and how far kernels may lie from it.

    Sums of integers are exact. With one rounding for each step that follows, a group's

        scale scale_x (sum of code q - zero sum of q)

    is off by at most a unit of scale scale_x (|sum of code q| + |zero sum of q|), and by three of its own size: the
    subtraction, the product of the scales, and that with it. Adding up n groups, slab by slab, gives at most n + slabs
    more of these. So this is a bound and no measurement; scale (code + zero) is weight + 2 scale zero.
    """
    x_TI = rounded(x_TI.astype(np.float64), how.activations, how.group)
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
def test_quantized_prompts_and_single_tokens_agree(how: How, n_tokens: int, n_out: int, n_in: int, seed: int) -> None:
    """To the bit as long as groups are added up in the same order, which they are within a prompt's first slab."""
    matrix, x_TI = any_quantized(how, n_out, n_in, seed), any_inputs(seed ^ 1, n_tokens, n_in)
    one_by_one, together = (quantized_product(how, matrix, x_TI, one_by_one=one) for one in (True, False))
    if n_in <= quantized.DEPTH:
        np.testing.assert_array_equal(one_by_one, together)
    else:
        _, error = quantized_product_exactly(how, matrix, x_TI)
        assert_within(one_by_one, together.astype(np.float64), 2 * error)


@each_of_some_ways
def test_inputs_of_many_tokens_go_in_chunks_with_quantized_weights(how: How) -> None:
    n_tokens, n_in = KEPT // (2 * quantized.DEPTH) + 1, 2 * quantized.DEPTH + 1
    matrix, x_TI = any_quantized(how, WIDTH + 3, n_in, 0), any_inputs(1, n_tokens, n_in)
    found = quantized_product(how, matrix, x_TI, 2, one_by_one=False)
    for few in (slice(5), slice(n_tokens - 5, n_tokens)):
        alone = quantized_product(how, matrix, x_TI[few], one_by_one=False)
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
    least = {"int16": 32767, "int8": 127}[how.activations] / float(np.finfo(np.float32).max)
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
    parts = quantized_parts(n_out, n_in, how.bits, how.group)
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


# ---------------------------------------------------------------------------------------------------------- attention


class Past(NamedTuple):
    """What a pass of attention is given: queries at positions start, start + 1, ..., and all keys and values so far."""

    q: np.ndarray  # (T, H, K)
    k: np.ndarray  # (S, G, K)
    v: np.ndarray  # (S, G, K)
    window: int | None

    @property
    def positions(self) -> range:
        return range(len(self.k) - len(self.q), len(self.k))

    @property
    def first_visible(self) -> int:
        return 0 if self.window is None else max(0, self.positions.start - self.window + 1)

    def visible(self) -> np.ndarray:
        """Return which query sees which key, (T, S)."""
        distance = np.array(self.positions)[:, np.newaxis] - np.arange(len(self.k))
        return (distance >= 0) & (distance < (self.window or len(self.k)))


@st.composite
def pasts(draw: st.DrawFn, most_tokens: int = 40, most_before: int = 150) -> Past:
    """Draw shapes that are multiples of nothing; scores from flat to so sharp that one key takes all."""
    n_kv_heads, group, head_dim = draw(st.integers(1, 5)), draw(st.integers(1, 5)), 2 * draw(st.integers(1, 20))
    n_tokens = draw(sizes(most_tokens, 1, attention.TOGETHER // group))
    n_keys = n_tokens + draw(st.integers(0, most_before))
    seed, sharpness = draw(seeds), draw(st.sampled_from([0.3, 1, 5]))
    return Past(
        normal(seed, n_tokens, n_kv_heads * group, head_dim) * np.float32(sharpness),
        *normal(seed ^ 1, 2, n_keys, n_kv_heads, head_dim),
        draw(st.none() | sizes(100, panels.BLOCK, panels.PANEL)),
    )


def filled(past: Past, spare: int, dtype: str) -> tuple[panels.PanelStore, np.ndarray]:
    """Return a ring, with `spare` slots more than it needs, after all keys and values have gone through it, and the
    slots of those that the queries see.
    """
    n_seen = len(past.k) - past.first_visible
    capacity = spare + (n_seen if past.window is None else past.window + len(past.q) - 1)
    store = panels.new_store(capacity, *past.k.shape[1:], np.dtype(dtype))
    raw = "float32" if dtype == "float32" else "uint16"
    slots = np.arange(len(past.k)) % capacity
    if dtype == "int8":
        panels.write_steps()(*store, slots, past.k, past.v)
        return store, slots[past.first_visible :]
    k, v = (part.astype(dtype).view(raw) for part in (past.k, past.v))
    panels.write(raw)(store.k.view(raw), store.v.view(raw), slots, k, v)
    return store, slots[past.first_visible :]


def segments_of(slots: np.ndarray, first_position: int) -> np.ndarray:
    """Return the runs of neighbouring slots as the kernel takes them; a ring has one or two."""
    starts = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist()]
    ends = [*starts[1:], len(slots)]
    return np.array([[slots[a], slots[b - 1] + 1, first_position + a] for a, b in zip(starts, ends, strict=True)])


def attended(
    past: Past,
    store: panels.PanelStore,
    slots: np.ndarray,
    n_rows: int = attention.MANY_ROWS,
    n_threads: int = 1,
    into: np.ndarray | None = None,
) -> np.ndarray:
    """Return heads (T, H, K) as the kernel computes them."""
    heads = np.full_like(past.q, np.nan) if into is None else into
    attention.attention({"float32": "f32", "float16": "f16", "int8": "int8"}[store.k.dtype.name], n_rows)(
        past.q,
        store.k.view(np.uint8).reshape(-1),
        store.v.view(np.uint8).reshape(-1),
        store.k_steps,
        store.v_steps,
        store.k.shape[0],
        store.v.shape[1],
        segments_of(slots, past.first_visible),
        past.positions.start,
        past.window or 2**62,
        heads,
        n_threads,
    )
    return heads


def attended_exactly(past: Past, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return heads (T, H, K) in float64, from keys and values as a store of this dtype holds them; and their error.

    The error of a score moves its weight by as large a part. Of those parts the largest is taken, and twice, since the
    sum of weights has it too; times the largest value, as large as what is averaged. Exp, its sum and the products add
    a few units. Twice what was measured.
    """
    q, k, v = (part.astype(np.float64) for part in (past.q, past.k.astype(dtype), past.v.astype(dtype)))
    _, n_heads, head_dim = q.shape
    k, v = (part.repeat(n_heads // k.shape[1], axis=1) for part in (k, v))
    scores = np.where(past.visible(), np.einsum("thi,shi->hts", q, k) / head_dim**0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    score_sizes = np.where(past.visible(), np.einsum("thi,shi->hts", np.abs(q), np.abs(k)) / head_dim**0.5, 0)
    values = np.where(past.visible().any(axis=0)[:, np.newaxis, np.newaxis], np.abs(v), 0).max()
    error = UNIT * (8 + 4 * score_sizes.max(axis=-1).T) * values
    return np.einsum("hts,shi->thi", weights, v), error[..., np.newaxis]


each_store = pytest.mark.parametrize("dtype", ["float32", *slow(["float16"])])
each_tile = pytest.mark.parametrize("n_rows", [attention.FEW_ROWS, attention.MANY_ROWS], ids=["few_rows", "many_rows"])


@each_store
@each_tile
@given(pasts(), st.integers(0, 70), thread_counts)
@some
def test_attention(dtype: str, n_rows: int, past: Past, spare: int, n_threads: int) -> None:
    """With a window the ring has been gone round up to a hundred times."""
    found = attended(past, *filled(past, spare, dtype), n_rows, n_threads)
    expected, error = attended_exactly(past, dtype)
    assert_within(found, expected, error)


@pytest.mark.slow
@each_tile
@given(pasts(), st.integers(0, 70), thread_counts)
@some
def test_attention_over_keys_of_int8(n_rows: int, past: Past, spare: int, n_threads: int) -> None:
    """The store holds what NumPy's rounding gives, to the bit, and attention is that over what it holds."""
    store, slots = filled(past, spare, "int8")
    held = [(q * steps[..., np.newaxis]).astype(np.float32) for q, steps in map(in_steps, (past.k, past.v))]
    for part, expected_part in zip(panels.read(store, slots), held, strict=True):
        np.testing.assert_array_equal(part, expected_part[past.first_visible :])
    expected, error = attended_exactly(past._replace(k=held[0], v=held[1]), "float32")
    assert_within(attended(past, store, slots, n_rows, n_threads), expected, 2 * error)


@each_store
@given(pasts(most_tokens=4, most_before=1600), st.integers(0, 70), st.sampled_from([None, 511, 512, 513, 1300]))
@some
def test_attention_of_few_queries_splits_their_keys(dtype: str, past: Past, spare: int, window: int | None) -> None:
    past = past._replace(window=window)
    found = attended(past, *filled(past, spare, dtype))
    expected, error = attended_exactly(past, dtype)
    assert_within(found, expected, error)


@given(
    pasts() | pasts(most_tokens=3, most_before=1500), seeds
)  # the second: heads in pieces, put together by one or by all
@some
def test_threads_do_not_change_a_bit_of_attention(past: Past, seed: int) -> None:
    ring = filled(past, seed % 70, "float32")
    alone = attended(past, *ring)
    for n_threads in (2, 3, 4, 7):
        np.testing.assert_array_equal(attended(past, *ring, n_threads=n_threads), alone)


@each_store
@given(pasts(most_tokens=1, most_before=600), st.integers(0, 70))
@some
def test_one_query_hears_nothing_of_what_it_does_not_see(dtype: str, past: Past, spare: int) -> None:
    """Keys before the window, in slots that have not been used again, and slots that have never been used."""
    expected = attended(past, *filled(past, spare, dtype))
    past.k[: past.first_visible] = past.v[: past.first_visible] = np.nan
    store, slots = filled(past, spare, dtype)
    unseen = np.setdiff1d(np.arange(store.v.shape[1] * panels.BLOCK), slots)
    panels.write(store.k.dtype.name if dtype == "float32" else "uint16")(
        *(part if dtype == "float32" else part.view(np.uint16) for part in store[:2]),
        unseen,
        *np.full((2, len(unseen), *past.k.shape[1:]), np.nan, dtype).view("f4" if dtype == "float32" else "u2"),
    )
    np.testing.assert_array_equal(attended(past, store, slots), expected)


@given(pasts(), st.integers(0, 70), st.data())
@some
def test_a_broken_key_or_value_spreads_no_further_than_in_numpy(past: Past, spare: int, data: st.DataObject) -> None:
    """A key that is NaN makes NaN of the heads that see it and of no others. So does a value at least of those, and at
    most of those of which NumPy does, which multiplies the values that a query does not see with 0.
    """
    key, g = data.draw(st.integers(0, len(past.k) - 1)), data.draw(st.integers(0, past.k.shape[1] - 1))
    i, is_key = data.draw(st.integers(0, past.k.shape[2] - 1)), data.draw(st.booleans())
    (past.k if is_key else past.v)[key, g, i] = np.nan
    n_heads, n_kv_heads = past.q.shape[1], past.k.shape[1]
    of_group = np.arange(n_heads) // (n_heads // n_kv_heads) == g
    must = past.visible()[:, key, np.newaxis, np.newaxis] & of_group[:, np.newaxis] & np.ones(past.k.shape[2], bool)
    if not is_key:
        must &= np.arange(past.k.shape[2]) == i
    found = np.isnan(attended(past, *filled(past, spare, "float32")))
    plain = ReferenceOps("float32")
    store = plain.new_store(len(past.k), *past.k.shape[1:], "float32")
    plain.write(store, slice(None), past.k, past.v)
    keys = range(past.first_visible, len(past.k))
    with plain.running(), pytest.raises(StopIteration) as end:
        next(plain.attention(past.q, KeyView(store, slice(keys.start, None), keys, past.positions, past.window), None))
    may = np.isnan(end.value.value)
    assert np.array_equal(found, must) if is_key else np.all(found >= must) & np.all(found <= may)


@each_store
@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 40), seeds)
@some
def test_a_store_gives_back_what_was_written_last(
    dtype: str, capacity: int, n_kv_heads: int, half: int, seed: int
) -> None:
    head_dim, random = half, np.random.RandomState(seed)
    store = panels.new_store(capacity, n_kv_heads, head_dim, np.dtype(dtype))
    expected = np.zeros((2, capacity, n_kv_heads, head_dim), dtype)
    raw = "float32" if dtype == "float32" else "uint16"
    for _ in range(3):
        slots = random.randint(0, capacity, random.randint(1, 9))
        new = random.normal(size=(2, len(slots), n_kv_heads, head_dim)).astype(dtype)
        panels.write(raw)(store.k.view(raw), store.v.view(raw), slots, *new.view(raw))
        for n, slot in enumerate(slots):
            expected[:, slot] = new[:, n]
    np.testing.assert_array_equal(panels.read(store, slice(0, capacity)), expected)
    some_slots = random.randint(0, capacity, 5)
    np.testing.assert_array_equal(panels.read(store, some_slots), expected[:, some_slots])


# --------------------------------------------------------------------------------------------------- small operations


@given(token_counts, sizes(200, LANES, 2 * LANES), seeds, st.sampled_from([1e-6, 1, 1e6]), thread_counts)
@some
def test_rms_norm(n_tokens: int, dim: int, seed: int, size: float, n_threads: int) -> None:
    x, weight, y = (
        normal(seed, n_tokens, dim) * np.float32(size),
        normal(seed ^ 1, dim),
        np.empty((n_tokens, dim), "f4"),
    )
    elementwise.rms_norm()(x, weight, 1e-5, y, n_threads)
    exact = x.astype(np.float64)
    exact = exact / np.sqrt(np.mean(exact * exact, axis=-1, keepdims=True) + np.float32(1e-5)) * weight
    np.testing.assert_allclose(y, exact, rtol=8 * UNIT, atol=0)


@given(token_counts, st.integers(1, 5), st.integers(1, 20), seeds, thread_counts)
@some
def test_rotate(n_tokens: int, n_heads: int, n_pairs: int, seed: int, n_threads: int) -> None:
    x, y = normal(seed, n_tokens, n_heads, 2 * n_pairs), np.empty((n_tokens, n_heads, 2 * n_pairs), np.float32)
    angles = np.random.RandomState(seed ^ 1).uniform(-9, 9, (n_tokens, n_pairs))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    elementwise.rotate()(x, cos, sin, y, n_threads)
    exact = ReferenceOps("float64").rotate(*(part.astype(np.float64) for part in (x, cos, sin)))
    length = np.hypot(x[..., 0::2], x[..., 1::2]).repeat(2, axis=-1)
    assert_within(y, exact, 3 * UNIT * length)


def gated(gate: np.ndarray, up: np.ndarray, n_threads: int = 1) -> np.ndarray:
    hidden = np.full_like(gate, np.nan)
    elementwise.swiglu()(gate, up, hidden, n_threads)
    return hidden


@given(sizes(300, LANES, 2 * LANES, 7 * LANES), seeds, st.sampled_from([0.1, 1, 10]), thread_counts)
@some
def test_swiglu(n: int, seed: int, size: float, n_threads: int) -> None:
    gate, up = normal(seed, 2, n) * np.float32(size)
    exact = ReferenceOps("float64").swiglu(gate.astype(np.float64), up.astype(np.float64))
    np.testing.assert_allclose(gated(gate, up, n_threads), exact, rtol=8 * UNIT, atol=0)


@pytest.mark.parametrize("n_beside", [0, LANES - 1], ids=["in a vector", "in the rest"])
def test_the_exponential_is_exact_to_two_parts_in_ten_million(n_beside: int) -> None:
    """Below 0, SwiGLU is gate * e^gate / (1 + e^gate): exp's own error, and four roundings beside it."""
    gates = np.concatenate([np.linspace(-87, 88, 200_000), [0, -0.0, 1e-30, -1e-30, -87.2, 88.2]]).astype(np.float32)
    gates = gates[: len(gates) // LANES * LANES]
    found = gated(gates, np.ones_like(gates))
    if n_beside:  # the same numbers, fewer at a time than a vector holds
        short = [gated(part, np.ones_like(part)) for part in np.split(gates[: 50 * n_beside], 50)]
        gates, found = gates[: 50 * n_beside], np.concatenate(short)
    exact = gates.astype(np.float64) / (1 + np.exp(-gates.astype(np.float64)))
    np.testing.assert_allclose(found, exact, rtol=2e-7 + 4 * UNIT, atol=1e-37)


@pytest.mark.parametrize("n", [1, LANES])
@pytest.mark.parametrize("gate", [-88.5, -104, -1e4, -1e20, -1e30, -3.4e38, 89, 104, 1e4, 3.4e38, np.inf, np.nan])
def test_gates_of_any_size_have_their_limits(gate: float, n: int) -> None:
    """0 far below 0 and the gate itself far above, as in NumPy, whether in a vector or in the rest."""
    plain = ReferenceOps("float32")
    gates, ups = np.full(n, gate, np.float32), np.full(n, 0.5, np.float32)
    with plain.running():
        expected = plain.swiglu(gates, ups)
    np.testing.assert_allclose(gated(gates, ups), expected, rtol=8 * UNIT, atol=1e-30)


def test_what_is_no_number_stays_where_it_is() -> None:
    x = normal(1, 3, 5 * LANES + 3)
    plain, ups = gated(x.ravel(), x.ravel()), x.ravel()
    broken = x.copy()
    broken[1, 2] = np.nan
    found = gated(broken.ravel(), ups)
    assert np.flatnonzero(np.isnan(found)).tolist() == [x.shape[1] + 2]
    np.testing.assert_array_equal(np.delete(found, x.shape[1] + 2), np.delete(plain, x.shape[1] + 2))
    y = np.empty_like(x)
    elementwise.rms_norm()(broken, x[0], 1e-5, y, 1)
    assert np.isnan(y).all(axis=1).tolist() == [False, True, False]
    assert np.isfinite(y[[0, 2]]).all()


@given(st.integers(1, 20), st.integers(1, 6), st.integers(1, 40), seeds)
@some
def test_mix_experts(n_tokens: int, n_experts: int, dim: int, seed: int) -> None:
    """Some tokens have no expert at all."""
    shares = normal(seed, n_tokens, n_experts)
    shares[shares < 0] = 0
    tokens, experts = (np.ascontiguousarray(part) for part in np.nonzero(shares))
    outputs, mixed = normal(seed ^ 1, len(tokens), dim), np.full((n_tokens, dim), np.nan, np.float32)
    elementwise.mix_experts()(outputs, tokens, experts, shares, mixed)
    exact, sizes_of_sums = np.zeros((2, n_tokens, dim))
    products = shares[tokens, experts, np.newaxis].astype(np.float64) * outputs
    np.add.at(exact, tokens, products)
    np.add.at(sizes_of_sums, tokens, np.abs(products))
    assert_within(mixed, exact, 4 * UNIT * sizes_of_sums)


@pytest.mark.parametrize("n", [1, LANES, 7 * LANES + 5, 1000])
def test_threads_do_not_change_a_bit_of_the_small_operations(n: int) -> None:
    x, weight, up = normal(n, 5, n), normal(n + 1, n), normal(n + 2, 5 * n)
    heads, angles = normal(n + 3, 5, 3, 2 * n), normal(n + 4, 5, n)

    def outputs(n_threads: int) -> list[np.ndarray]:
        normed, turned = np.full_like(x, np.nan), np.full_like(heads, np.nan)
        elementwise.rms_norm()(x, weight, 1e-5, normed, n_threads)
        elementwise.rotate()(heads, angles, angles, turned, n_threads)
        return [normed, turned, gated(x.ravel(), up, n_threads)]

    for n_threads in (2, 3, 7):
        for found, alone in zip(outputs(n_threads), outputs(1), strict=True):
            np.testing.assert_array_equal(found, alone)


@pytest.mark.slow
def test_threads_that_really_run_at_once_do_not_change_a_bit() -> None:
    """The tests above share the work out and let one thread do it; here as many run as there are."""
    x_TI, past = normal(3, 30, 700), Past(normal(4, 30, 6, 16), *normal(5, 2, 900, 3, 16), 700)

    def outputs(n_threads: int) -> list[np.ndarray]:
        products = [
            product(random_matrix(stored, 300, 700, 9), x_TI[: 1 if way == "one" else 30], n_threads, way=way)
            for stored in ALL_STORED
            for way in ways(stored)
        ]
        products += [
            quantized_product(how, any_quantized(how, 300, 700, 9), x_TI[:n_tokens], n_threads, one_by_one=one_by_one)
            for how in SOME_WAYS
            for n_tokens, one_by_one in ((1, True), (30, False))
        ]
        few = past._replace(q=past.q[-2:])
        heads = [attended(part, *filled(part, 5, "float32"), n_threads=n_threads) for part in (past, few)]
        normed, turned = np.full_like(x_TI, np.nan), np.full_like(past.q, np.nan)
        elementwise.rms_norm()(x_TI, x_TI[0], 1e-5, normed, n_threads)
        elementwise.rotate()(past.q, x_TI[:, :8].copy(), x_TI[:, 8:16].copy(), turned, n_threads)
        return [*products, *heads, normed, turned, gated(x_TI.ravel(), x_TI.ravel(), n_threads)]

    alone = outputs(1)
    with threads.using(numba.config.NUMBA_NUM_THREADS):
        for n_threads in (2, 3, 7):
            for found, expected in zip(outputs(n_threads), alone, strict=True):
                np.testing.assert_array_equal(found, expected)


# ------------------------------------------------------------------------------------------------- the ends of arrays


def at_the_end(array: np.ndarray) -> np.ndarray:
    """Return a copy whose last byte is the last one that may be touched: the page after it is forbidden."""
    n_bytes = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, n_bytes + mmap.PAGESIZE)
    last_page = ctypes.addressof(ctypes.c_char.from_buffer(memory, n_bytes))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    if protect(last_page, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, array.dtype, array.size, n_bytes - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


def run_to_the_ends() -> None:
    """Run every kernel on arrays at whose ends the process would be killed for one step further."""
    for stored in ALL_STORED:
        for n_out in (1, 7, 8, 9, 33, WIDTH, WIDTH + 1, FP8_BLOCK + 5):
            for n_in in (1, 3, 8, LANES - 1, 2 * LANES + 1, FP8_BLOCK + 2, DEPTH + 1):
                drawn = random_matrix(stored, n_out, possible_inputs(stored, n_in), n_in)
                scale = None if drawn.scale is None else at_the_end(drawn.scale)
                matrix = dataclasses.replace(drawn, data=at_the_end(drawn.data), scale=scale)
                x_TI = at_the_end(normal(n_in, 5, drawn.shape[1]))
                for way in ways(stored):
                    into = at_the_end(np.empty((5, n_out), np.float32))
                    found = product(matrix, x_TI, way=way, into=into)
                    np.testing.assert_array_equal(found, product(drawn, x_TI.copy(), way=way))
    for how in SOME_WAYS:
        for n_out in (1, 7, 8, 9, 33, WIDTH, WIDTH + 1):
            for n_in in (1, 3, 31, 33, how.group, how.group + 1, quantized.DEPTH, quantized.DEPTH + 1):
                drawn = any_quantized(how, n_out, n_in, n_in)
                matrix = dataclasses.replace(drawn, data=at_the_end(drawn.data), scales=at_the_end(drawn.scales))
                x_TI = at_the_end(normal(n_in, 5, n_in))
                for one_by_one in (True, False):
                    into = at_the_end(np.empty((5, n_out), np.float32))
                    found = quantized_product(how, matrix, x_TI, one_by_one=one_by_one, into=into)
                    expected = quantized_product(how, drawn, x_TI.copy(), one_by_one=one_by_one)
                    np.testing.assert_array_equal(found, expected)
    for n_tokens, head_dim, window in ((1, 2, None), (1, 10, 70), (5, 18, None), (30, 34, 9), (2, 36, 600)):
        for n_rows in (attention.FEW_ROWS, attention.MANY_ROWS):
            for dtype in ("float32", "float16"):
                drawn_q, drawn_kv = normal(1, n_tokens, 6, head_dim), normal(2, 2, 700 + n_tokens, 2, head_dim)
                past = Past(at_the_end(drawn_q), *drawn_kv, window)
                store, slots = filled(past, 3, dtype)
                at_end = panels.PanelStore(*map(at_the_end, store))
                found = attended(past, at_end, slots, n_rows, into=at_the_end(np.empty_like(drawn_q)))
                np.testing.assert_array_equal(found, attended(past, store, slots, n_rows))
    for n in (1, LANES - 1, LANES, 2 * LANES + 3):
        x, weight = at_the_end(normal(n, 3, n)), at_the_end(normal(n, n))
        elementwise.rms_norm()(x, weight, 1e-5, at_the_end(x), 1)
        elementwise.swiglu()(weight, at_the_end(weight), at_the_end(weight), 1)
        heads, angles = at_the_end(normal(n, 3, 2, 2 * n)), at_the_end(normal(n, 3, n))
        elementwise.rotate()(heads, angles, at_the_end(angles), at_the_end(heads), 1)


@pytest.mark.slow
def test_nothing_is_touched_beyond_the_end_of_an_array() -> None:
    """In a process of its own, which a step too far would kill."""
    if os.name == "posix":  # elsewhere memory is protected by other calls; what kernels read does not depend on it
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
        command = [sys.executable, __file__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# Bytes are multiplied with bytes four at once where there is an instruction for it (VNNI), else in pairs if the codes
# have 4 bits, else as int16: so with no instruction sets. This machine's own way is tried above.
VARIANTS = {
    "4 lanes, no instruction sets": {"NUMBA_CPU_NAME": "generic"},
    "8 lanes": {"MISTRAL_KERNELS_LANES": "8"},
}
_AVX2 = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe"
_AVX512 = f"{_AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"
for _name, _cpu, _features in (
    ("8 lanes, pairs of bytes", "haswell", _AVX2),
    ("16 lanes, pairs of bytes", "skylake-avx512", _AVX512),
    ("16 lanes, pairs of bf16 in prompts", "znver4", f"{_AVX512},+avx512bf16,+avx512vnni"),
):
    if {name[1:] for name in _features.split(",")} <= HOST_FEATURES:  # else its instructions would be illegal here
        VARIANTS[_name] = {"NUMBA_CPU_NAME": _cpu, "NUMBA_CPU_FEATURES": _features}


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [pytest.param(one, id=name, marks=pytest.mark.xdist_group(name)) for name, one in VARIANTS.items()]
)
def test_the_kernels_of_other_machines(variant: dict[str, str], tmp_path: Path) -> None:
    """All of the above again, as compiled for a machine with other instructions or wider or narrower vectors."""
    environment = os.environ | variant | {"NUMBA_CACHE_DIR": str(tmp_path), "MISTRAL_REF_EXAMPLES": "10"}
    chosen = ["-m", "not soak", "-k", "not of_other_machines", "tests/kernels/test_kernels.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


if __name__ == "__main__":
    run_to_the_ends()
    print("done")
