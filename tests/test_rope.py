"""RoPE against hand-worked numbers, transformers' tables, and what it is for: scores that depend on distance alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.checkpoints import FAMILIES
from support.paths import GOLDEN

from mistral_ref.config import ModelConfig, QueryTemperature, Yarn
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.rope import inverse_frequencies, query_temperature, rotation, yarn_ramp

MINISTRAL_3 = Yarn(factor=16, original_max_position_embeddings=16384, beta_fast=32, beta_slow=1, attention_factor=1)


@given(st.integers(0, 2**17), st.integers(0, 2**17), st.integers(0, 2**17), st.integers(1, 8), st.integers(0, 99))
def test_scores_depend_on_distance_alone(query: int, key: int, shift: int, half: int, seed: int) -> None:
    config = FAMILIES["dense_windowed"].config.replace(head_dim=2 * half)
    ops, random = ReferenceOps("float64"), np.random.RandomState(seed)
    q_1HK, k_1HK = random.normal(size=(2, 1, 1, 2 * half))

    def score(query: int, key: int) -> float:
        turn = ops.rotation(np.array([query]), config), ops.rotation(np.array([key]), config)
        q = ops.rotate(q_1HK, turn[0].query_cos, turn[0].query_sin)
        k = ops.rotate(k_1HK, turn[1].key_cos, turn[1].key_sin)
        return float(np.sum(q * k))

    assert score(query, key) == pytest.approx(score(query + shift, key + shift), abs=1e-8)


def test_neighbours_are_pairs_and_turn_counterclockwise() -> None:
    config = FAMILIES["dense_windowed"].config.replace(head_dim=4, rope_theta=1e4)
    ops = ReferenceOps("float64")
    turn = ops.rotation(np.array([1]), config)
    turned = ops.rotate(np.array([[[1.0, 0.0, 1.0, 0.0]]]), turn.key_cos, turn.key_sin)
    np.testing.assert_allclose(turned[0, 0], [np.cos(1), np.sin(1), np.cos(0.01), np.sin(0.01)], rtol=1e-15)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99))
def test_halves_become_neighbours(n_tokens: int, n_heads: int, half: int, seed: int) -> None:
    rows = np.random.RandomState(seed).normal(size=(n_tokens, n_heads, 2, half))
    heads = ReferenceOps("float64").split_heads(rows.reshape(n_tokens, -1), n_heads, "halves")
    for pair in range(half):
        np.testing.assert_array_equal(heads[:, :, 2 * pair], rows[:, :, 0, pair])
        np.testing.assert_array_equal(heads[:, :, 2 * pair + 1], rows[:, :, 1, pair])


@pytest.mark.parametrize("name", ["yarn_mistral", "ministral3"])
def test_yarn_frequencies_and_factor_are_those_of_transformers(name: str) -> None:
    config, golden = FAMILIES[name].config, load_file(GOLDEN / f"{name}.safetensors")
    assert config.yarn is not None
    ours = inverse_frequencies(config.rope_theta, config.head_dim, config.yarn)
    np.testing.assert_allclose(ours, golden["inv_freq"], rtol=1e-6)  # transformers computes them in float32
    np.testing.assert_allclose(config.yarn.attention_factor, golden["attention_scaling"], rtol=1e-6)


def test_ministral_3_keeps_fast_pairs_and_divides_slow_ones() -> None:
    plain, stretched = inverse_frequencies(1e6, 128), inverse_frequencies(1e6, 128, MINISTRAL_3)
    np.testing.assert_array_equal(stretched[:21], plain[:21])
    np.testing.assert_array_equal(stretched[37:], plain[37:] / 16)
    assert np.all(np.diff(stretched) < 0)
    assert yarn_ramp(1e6, 128, MINISTRAL_3) == (20, 37)


def test_a_yarn_ramp_of_no_width_is_a_step() -> None:
    yarn = Yarn(factor=4, original_max_position_embeddings=64, beta_fast=11, beta_slow=11, attention_factor=1)
    frequencies = inverse_frequencies(1e4, 8, yarn)  # within 64 positions even the fastest pair turns 10.2 times
    assert yarn_ramp(1e4, 8, yarn) == (0, 0.001)
    assert frequencies[0] == 1
    np.testing.assert_array_equal(frequencies[1:], inverse_frequencies(1e4, 8)[1:] / 4)


def test_query_temperature_of_ministral_3() -> None:
    positions = np.array([0, 16383, 16384, 32768, 131072, 262143])
    factors = query_temperature(positions, QueryTemperature(beta=0.1, original_max_position_embeddings=16384))
    np.testing.assert_allclose(factors, [1, 1, 1.0693, 1.1099, 1.2197, 1.2773], atol=5e-5)


def test_temperature_turns_up_queries_only_and_the_attention_factor_both() -> None:
    config = FAMILIES["ministral3"].config
    assert config.yarn is not None
    loud = config.replace(yarn=Yarn(**(vars(config.yarn) | {"attention_factor": 1.5})))
    positions = np.arange(200)
    turn = rotation(positions, loud, "float64")
    lengths = [np.hypot(turn.query_cos, turn.query_sin), np.hypot(turn.key_cos, turn.key_sin)]
    expected = 1.5 * query_temperature(positions, config.query_temperature)[:, np.newaxis]
    np.testing.assert_allclose(lengths[0], np.broadcast_to(expected, lengths[0].shape))
    np.testing.assert_allclose(lengths[1], 1.5)


@pytest.mark.parametrize(("position", "least", "most"), [(4095, 1e-5, 4e-4), (32767, 1e-4, 3e-3), (262143, 1e-3, 3e-2)])
def test_float32_angles_are_off_by_what_the_docstring_says(position: int, least: float, most: float) -> None:
    config: ModelConfig = FAMILIES["dense_windowed"].config.replace(head_dim=128)
    exact = rotation(np.array([position]), config, "float64")
    rounded = rotation(np.array([position]), config, "float64", "float32")
    turned = np.angle((rounded.key_cos + 1j * rounded.key_sin) / (exact.key_cos + 1j * exact.key_sin))
    assert least < np.abs(turned).max() < most
