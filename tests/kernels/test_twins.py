"""Each kernel beside the plain loop that stands above it: the loop says what is computed, the kernel how."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import (
    How,
    Past,
    any_inputs,
    any_quantized,
    as_stored,
    attended,
    filled,
    gated,
    normal,
    pasts,
    product,
    quantized_product,
    seeds,
    some,
)

from mistral_kernels import attention, elementwise, matvec, quantized
from mistral_kernels.layout import codes_of_tiles
from mistral_ref.quantized_matrix import QuantizedMatrix, scale_values

few = st.integers(1, 5)


@given(few, st.integers(1, 40), seeds)
@some
def test_rms_norm(n_tokens: int, dim: int, seed: int) -> None:
    x, weight, y, expected = normal(seed, n_tokens, dim), normal(seed ^ 1, dim), *np.empty((2, n_tokens, dim), "f4")
    elementwise.plain_rms_norm(x.astype(float), weight.astype(float), 1e-5, expected)
    elementwise.rms_norm()(x, weight, 1e-5, y, 1)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


@given(st.integers(1, 70), seeds)
@some
def test_swiglu(n: int, seed: int) -> None:
    gate, up, expected = normal(seed, n), normal(seed ^ 1, n), np.empty(n, np.float32)
    elementwise.plain_swiglu(gate.astype(float), up.astype(float), expected)
    np.testing.assert_allclose(gated(gate, up), expected, rtol=1e-6)


@pytest.mark.parametrize("way", ["one", "few", "many"])
@given(few, st.integers(1, 30), st.integers(1, 40), seeds)
@some
def test_products(way: str, n_tokens: int, n_out: int, n_in: int, seed: int) -> None:
    matrix, x_TI = as_stored("bf16", normal(seed, n_out, n_in)), normal(seed ^ 1, n_tokens, n_in)
    expected = np.empty((n_tokens, n_out))
    matvec.plain_product(matrix.rows(slice(None), np.float64), x_TI.astype(float), expected)
    np.testing.assert_allclose(product(matrix, x_TI, way=way), expected, atol=1e-4)


def parts_of(matrix: QuantizedMatrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the codes (O, groups, group), the scales and the zeros (O, groups) of a matrix, in float64."""
    rows = np.arange(matrix.n_out)
    codes = codes_of_tiles(matrix.data, rows, matrix.bits).reshape(len(rows), -1, matrix.group_size)
    scales = matrix.scales[rows // 8, :, :, rows % 8]
    return codes, scale_values()[scales[..., 0]] * float(matrix.unit), scales[..., 1] * 2.0 ** (matrix.bits - 8)


@pytest.mark.parametrize("how", [How(8, "int16", 32), How(4, "int8", 32)], ids=str)
@given(st.integers(1, 20), few, seeds)
@some
def test_quantized_products(how: How, n_out: int, n_groups: int, seed: int) -> None:
    matrix, x_TI = any_quantized(how, n_out, n_groups * how.group, seed), any_inputs(seed, 1, n_groups * how.group)
    expected, largest = np.empty(n_out), np.iinfo(how[1]).max
    x = x_TI.reshape(n_groups, how.group)
    quantized.plain_product(*parts_of(matrix), largest, x, expected)
    found = quantized_product(how, matrix, x_TI, one_by_one=True)[0]
    error = np.abs(matrix.rows(slice(None), np.float64)) @ np.abs(x_TI[0])
    np.testing.assert_array_less(np.abs(found - expected), 1e-5 * error + 1e-30)


@given(pasts(most_tokens=4, most_before=10))
@some
def test_attention(past: Past) -> None:
    expected = np.empty(past.q.shape)
    window = past.window or len(past.k)
    attention.plain_attention(*(part.astype(float) for part in past[:3]), window, expected)
    np.testing.assert_allclose(attended(past, *filled(past, 0, "float32")), expected, atol=1e-4)
