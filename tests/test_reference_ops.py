"""NumPy's operations against loops that follow their formulas, and how far float32 lies from the float64 oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FAMILIES
from support.tiny import ACCUMULATED_BOUND, OWN_BOUND, configs, distances_in_ulps, model_of, tokens_for

from mistral_ref import InputError, reference_ops
from mistral_ref.config import ModelConfig
from mistral_ref.ops import KeyView
from mistral_ref.reference_ops import ReferenceOps, attends
from mistral_ref.steps import step_names
from mistral_ref.weights import Matrix

OPS = ReferenceOps("float64")
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).normal(size=shape)


@given(st.integers(0, 40), st.integers(0, 40), st.none() | st.integers(1, 12))
def test_a_query_sees_itself_and_the_window_before_it(query: int, key: int, window: int | None) -> None:
    first = 0 if window is None else query - window + 1
    assert attends(query, key, window) == (key in range(first, query + 1))


@given(seeds, st.integers(1, 5), st.integers(1, 9))
def test_rms_norm(seed: int, n_tokens: int, dim: int) -> None:
    x, weight = normal(seed, n_tokens, dim), normal(seed + 1 & 0xFFFF, dim)
    for row, found in zip(x, OPS.rms_norm(x, weight, 1e-5), strict=True):
        size = math.sqrt(sum(value * value for value in row) / dim + 1e-5)
        np.testing.assert_allclose(found, [value / size * w for value, w in zip(row, weight, strict=True)])


def test_rms_norm_by_hand() -> None:
    # Mean of squares 12.5, epsilon 3.5: the root is 4.
    np.testing.assert_array_equal(OPS.rms_norm(np.array([[3.0, 4.0]]), np.array([2.0, 1.0]), 3.5), [[1.5, 1.0]])


@given(seeds, st.integers(1, 4), st.integers(1, 30), st.integers(1, 9), st.integers(1, 40))
def test_linear_in_blocks_of_any_size(seed: int, n_tokens: int, n_out: int, n_in: int, block: int) -> None:
    x, weight = normal(seed, n_tokens, n_in), normal(seed // 2, n_out, n_in).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference_ops, "_WIDENED_ELEMENTS", block)
        found = OPS.linear(x, Matrix("w", "f32", weight))
    np.testing.assert_allclose(found, np.einsum("ti,oi->to", x, weight), atol=1e-12)


windows = st.none() | st.integers(1, 6)


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 12), windows)
def test_attention(seed: int, n_kv_heads: int, group: int, n_tokens: int, start: int, window: int | None) -> None:
    n_heads, head_dim, stop = n_kv_heads * group, 4, start + n_tokens
    q, k, v = normal(seed, n_tokens, n_heads, head_dim), *normal(seed // 2, 2, stop, n_kv_heads, head_dim)
    store = OPS.new_store(stop, n_kv_heads, head_dim, "float64")
    OPS.write(store, slice(0, stop), k, v)
    view = KeyView(store, slice(0, stop), range(stop), range(start, stop), window)
    with pytest.raises(StopIteration) as end:
        next(OPS.attention(q, [view], None))
    for token in range(n_tokens):
        first = 0 if window is None else max(0, start + token - window + 1)
        seen = range(first, start + token + 1)
        for head in range(n_heads):
            kv_head = head // group
            scores = [float(q[token, head] @ k[key, kv_head]) / math.sqrt(head_dim) for key in seen]
            weights = np.exp(scores) / np.sum(np.exp(scores))
            expected = sum(weight * v[key, kv_head] for weight, key in zip(weights, seen, strict=True))
            np.testing.assert_allclose(end.value.value[token, head], expected, atol=1e-12)


def test_attention_never_holds_more_scores_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FAMILIES["dense_no_window"].config
    model, largest = model_of(config), []
    monkeypatch.setattr(reference_ops, "SCORE_ELEMENTS", 1000)
    softmax = reference_ops.softmax
    monkeypatch.setattr(reference_ops, "softmax", lambda x: largest.append(x.size) or softmax(x))
    model.forward(tokens_for(config, 200))
    assert max(largest) <= 1000


@given(seeds, st.integers(1, 9))
def test_swiglu(seed: int, n: int) -> None:
    gate, up = normal(seed, 2, 1, n) * 10
    expected = [[g / (1 + math.exp(-g)) * u for g, u in zip(gate[0], up[0], strict=True)]]
    np.testing.assert_allclose(OPS.swiglu(gate, up), expected, rtol=1e-12)


def test_swiglu_has_limits_not_warnings() -> None:
    ops = ReferenceOps("float32")
    with ops.running():
        hidden = ops.swiglu(np.array([[-1e4, 0.0, 1e4]], np.float32), np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(hidden, [[0, 0, 1e4]])


@given(seeds, st.integers(1, 6), st.integers(1, 7), st.integers(1, 7))
def test_routing_by_logits_is_routing_by_probabilities(seed: int, n_tokens: int, n_experts: int, n_chosen: int) -> None:
    """Mistral takes the softmax of the chosen logits; transformers divides the chosen probabilities by their sum."""
    logits, n_chosen = normal(seed, n_tokens, n_experts), min(n_chosen, n_experts)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    kept = np.where(probabilities >= np.sort(probabilities)[:, [-n_chosen]], probabilities, 0)
    np.testing.assert_allclose(OPS.route(logits, n_chosen), kept / kept.sum(axis=-1, keepdims=True), atol=1e-12)


def test_of_equal_experts_the_first_wins() -> None:
    np.testing.assert_array_equal(OPS.route(np.array([[1.0, 2.0, 1.0, 1.0]]), 2) > 0, [[True, True, False, False]])


@given(seeds, st.integers(1, 6), st.integers(2, 5))
def test_mixing_experts_is_a_sum_over_each_tokens_own(seed: int, n_tokens: int, n_experts: int) -> None:
    shares = np.where(normal(seed, n_tokens, n_experts) > 0, np.abs(normal(seed // 2, n_tokens, n_experts)), 0)
    outputs = normal(seed // 3, n_experts, n_tokens, 3)
    tokens, experts = np.nonzero(shares)
    mixed = OPS.mix_experts(outputs[experts, tokens], tokens, experts, shares)
    np.testing.assert_allclose(mixed, np.einsum("te,etd->td", shares, outputs), atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_float32_stays_close_to_the_oracle_in_every_step(family: object) -> None:
    own = distances_in_ulps(family.config, 24, family.seed, own=True)
    assert list(own) == list(step_names(family.config))
    assert {name: ulps for name, ulps in own.items() if ulps > OWN_BOUND[name.rpartition(".")[2]]} == {}
    accumulated = distances_in_ulps(family.config, 24, family.seed, own=False)
    assert 1 < max(accumulated.values()) < ACCUMULATED_BOUND


@given(configs(), st.integers(1, 12))
@settings(max_examples=25)
def test_the_oracle_is_float64_in_every_step(config: ModelConfig, n_tokens: int) -> None:
    walk = model_of(config, dtype="float64").steps(tokens_for(config, n_tokens))
    for step in walk:
        assert step.value.dtype == np.float64, step.name
        if step.name == "logits":  # not float32 numbers in float64 clothes
            assert np.any(step.value != step.value.astype(np.float32))


@pytest.mark.parametrize("bad", [{"dtype": "float16"}, {"threads": 0}, {"threads": True}, {"angles": "f32"}])
def test_options_are_checked(bad: dict[str, object]) -> None:
    with pytest.raises(InputError):
        ReferenceOps(**bad)


def test_threads_limit_blas_and_only_while_running() -> None:
    ops = ReferenceOps("float32", threads=1)
    before = [pool["num_threads"] for pool in ops._blas.info()]
    with ops.running():
        assert [pool["num_threads"] for pool in ops._blas.info() if pool["user_api"] == "blas"] == [1]
    assert [pool["num_threads"] for pool in ops._blas.info()] == before
