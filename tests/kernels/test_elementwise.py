"""RMSNorm, RoPE, SwiGLU and the mixing of experts against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import UNIT, assert_within, gated, normal, seeds, shared, sizes, some, thread_counts, token_counts

from mistral_kernels import elementwise
from mistral_kernels.processor import LANES
from mistral_ref.reference_ops import ReferenceOps


@given(token_counts, sizes(200, LANES, 2 * LANES), seeds, st.sampled_from([1e-6, 1, 1e6]), thread_counts)
@some
def test_rms_norm(n_tokens: int, dim: int, seed: int, size: float, n_threads: int) -> None:
    x, weight, y = (
        normal(seed, n_tokens, dim) * np.float32(size),
        normal(seed ^ 1, dim),
        np.empty((n_tokens, dim), "f4"),
    )
    elementwise.rms_norm()(x, weight, 1e-5, y, shared(n_threads))
    exact = x.astype(np.float64)
    exact = exact / np.sqrt(np.mean(exact * exact, axis=-1, keepdims=True) + np.float32(1e-5)) * weight
    np.testing.assert_allclose(y, exact, rtol=8 * UNIT, atol=0)


@given(token_counts, st.integers(1, 5), st.integers(1, 20), seeds, thread_counts)
@some
def test_rotate(n_tokens: int, n_heads: int, n_pairs: int, seed: int, n_threads: int) -> None:
    x, y = normal(seed, n_tokens, n_heads, 2 * n_pairs), np.empty((n_tokens, n_heads, 2 * n_pairs), np.float32)
    angles = np.random.RandomState(seed ^ 1).uniform(-9, 9, (n_tokens, n_pairs))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    elementwise.rotate()(x, cos, sin, y, shared(n_threads))
    exact = ReferenceOps("float64").rotate(*(part.astype(np.float64) for part in (x, cos, sin)))
    length = np.hypot(x[..., 0::2], x[..., 1::2]).repeat(2, axis=-1)
    assert_within(y, exact, 3 * UNIT * length)


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
        elementwise.rms_norm()(x, weight, 1e-5, normed, shared(n_threads))
        elementwise.rotate()(heads, angles, angles, turned, shared(n_threads))
        return [normed, turned, gated(x.ravel(), up, n_threads)]

    for n_threads in (2, 3, 7):
        for found, alone in zip(outputs(n_threads), outputs(1), strict=True):
            np.testing.assert_array_equal(found, alone)
