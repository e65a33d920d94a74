"""What a query does not see cannot reach it, NaN and infinities included; and no row of an operation reaches another.

A result with a broken number in it is compared, bit by bit, with the result without that number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.kernels import as_stored, normal, seeds
from support.marks import slow
from support.tiny import BACKENDS, SMALL, chunkings, configs, model_of, ops_of, tokens_for

from mistral_ref.cache import KVCache
from mistral_ref.config import ModelConfig
from mistral_ref.files.rounding import quantized
from mistral_ref.model import Model
from mistral_ref.ops import Ops
from mistral_ref.reference_ops import attends
from mistral_ref.steps import Steps
from mistral_ref.weights import Matrix

BROKEN = [np.nan, np.inf, -np.inf]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_cache = pytest.mark.parametrize("dtype", ["float32", *slow(["float16", "int8"])])


# ----------------------------------------------------------------------------------------------------------- attention


class Attended(NamedTuple):
    """Queries, keys and values of one layer: how they are drawn and split into passes, and which number is broken.

    shape       T, H, G, K
    lengths     of the passes
    broken      which of q, k and v; the position and the head; the index in the head, or all of the head
    """

    shape: tuple[int, int, int, int]
    seed: int
    window: int | None
    lengths: list[int]
    broken: tuple[int, int, int, int | slice]
    value: float

    def heads(self, ops: Ops, dtype: str, is_broken: bool) -> np.ndarray:
        """Return what attention gives, (T, H, K), in passes over a cache whose numbers have this dtype."""
        n_tokens, n_heads, n_kv_heads, head_dim = self.shape
        parts = [normal(self.seed ^ i, n_tokens, n, head_dim) for i, n in enumerate((n_heads, n_kv_heads, n_kv_heads))]
        which, *place = self.broken
        if is_broken:
            parts[which][tuple(place)] = self.value
        config = SMALL.replace(
            n_layers=1, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, sliding_window=(self.window,)
        )
        cache, heads = KVCache(config, ops, chunk=max(self.lengths), dtype=dtype), []
        for start, stop in pairwise(np.cumsum([0, *self.lengths]).tolist()):
            q, k, v = (part[start:stop] for part in parts)
            this_pass = cache.begin(stop - start)
            with ops.running():
                this_pass.write(0, k, v)
                heads.append(result_of(ops.attention(q, this_pass.views(0), None)))
            cache.commit(this_pass, np.zeros(stop - start, int))
        return np.concatenate(heads)

    def reached(self) -> np.ndarray:
        """Return which heads (T, H) see the broken number."""
        n_tokens, n_heads, n_kv_heads, _ = self.shape
        which, position, head, _ = self.broken
        queries_T, heads_H = np.arange(n_tokens), np.arange(n_heads)
        if which == 0:
            return (queries_T[:, np.newaxis] == position) & (heads_H == head)
        return attends(queries_T[:, np.newaxis], position, self.window) & (heads_H // (n_heads // n_kv_heads) == head)


def result_of(steps: Steps) -> np.ndarray:
    """Return the result of an operation that yields no step."""
    with pytest.raises(StopIteration) as end:
        next(steps)
    return end.value.value


@st.composite
def attended(draw: st.DrawFn, *, is_long: bool = False) -> Attended:
    """Draw shapes that are multiples of nothing, a window or none, and any split into passes.

    A long text has a first pass of hundreds of tokens, and then up to three short ones.
    """
    n_kv_heads, group, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 4)), 2 * draw(st.integers(1, 10))
    lengths = draw(st.integers(1, 70).flatmap(lambda n_tokens: chunkings(n_tokens, draw(st.integers(1, 70)))))
    if is_long:
        lengths = [draw(st.integers(200, 900)), *lengths[:3]]
    which, n_heads, n_tokens = draw(st.integers(0, 2)), n_kv_heads * group, sum(lengths)
    position, head = draw(st.integers(0, n_tokens - 1)), draw(st.integers(0, (n_kv_heads if which else n_heads) - 1))
    return Attended(
        (n_tokens, n_heads, n_kv_heads, head_dim),
        draw(seeds),
        draw(st.none() | st.integers(1, 80)),
        lengths,
        (which, position, head, draw(st.just(slice(None)) | st.integers(0, head_dim - 1))),
        draw(st.sampled_from(BROKEN)),
    )


def with_broken_value(lengths: list[int], window: int | None, position: int) -> Attended:
    """Return a text in which a value at a position is NaN."""
    return Attended((sum(lengths), 4, 2, 6), 0, window, lengths, (2, position, 1, 3), np.nan)


def assert_contained(case: Attended, backend: str, dtype: str) -> None:
    ops, reached_TH = ops_of(backend), case.reached()
    plain, found = (case.heads(ops, dtype, is_broken) for is_broken in (False, True))
    np.testing.assert_array_equal(found[~reached_TH], plain[~reached_TH])
    which, _, _, index = case.broken
    if np.isnan(case.value):  # and it is not lost: a score that is NaN makes NaN of the whole head
        is_whole = which < 2 or dtype == "int8"
        assert np.isnan(found[reached_TH][:, slice(None) if is_whole else index]).all()


@each_backend
@each_cache
@given(attended())
@example(with_broken_value([8], window=None, position=5))  # later than a query of the same pass
@example(with_broken_value([9, 9], window=3, position=6))  # before the window of a query of the same pass
def test_a_broken_number_reaches_only_the_queries_that_see_it(backend: str, dtype: str, case: Attended) -> None:
    assert_contained(case, backend, dtype)


@pytest.mark.slow
@each_backend
@each_cache
@given(attended(is_long=True))
@example(with_broken_value([600, 3], window=None, position=601))
@example(with_broken_value([600, 3], window=80, position=522))
@settings(max_examples=30)
def test_a_broken_number_in_a_long_text_reaches_only_the_queries_that_see_it(
    backend: str, dtype: str, case: Attended
) -> None:
    assert_contained(case, backend, dtype)


@each_backend
def test_a_trace_shows_weights_of_0_for_unseen_keys_beside_nan(backend: str) -> None:
    model = model_of(SMALL, backend=backend)  # its windows have 5 tokens

    def break_a_key(k_TGK: np.ndarray) -> np.ndarray:
        broken = k_TGK.copy()
        broken[4] = np.nan
        return broken

    trace = model.trace(tokens_for(SMALL, 12), keep="*.attention_weights", edits={"layers.1.k_rotated": break_a_key})
    queries_T1, keys_S = np.arange(12)[:, np.newaxis], np.arange(12)
    sees_TS = attends(queries_T1, keys_S, 5)
    for weights_TS in trace["layers.1.attention_weights"]:
        assert not weights_TS[~sees_TS].any()
        np.testing.assert_array_equal(np.isnan(weights_TS), sees_TS & attends(queries_T1, 4, 5))


# ---------------------------------------------------------------------------------------------------- the whole model


@each_backend
@given(configs(), st.integers(0, 39), st.integers(1, 40), st.integers(1, 12), seeds, st.sampled_from(BROKEN))
@example(SMALL, 3, 30, 12, 0, np.nan)
@settings(max_examples=30)
def test_a_broken_token_reaches_only_the_tokens_that_see_it_layer_by_layer(
    backend: str, config: ModelConfig, position: int, n_tokens: int, chunk: int, seed: int, value: float
) -> None:
    """The embedding of one token is broken. A layer with a window of W hands it on to the next W - 1 tokens."""
    position %= n_tokens
    plain = model_of(config.replace(moe=None), seed, backend=backend)
    rows = plain.weights.tok_embeddings.data.copy()
    rows[-1] = value
    weights = dataclasses.replace(plain.weights, tok_embeddings=Matrix("tok_embeddings", "f32", rows))
    broken = Model(plain.config, weights, plain.ops)
    tokens = [token % (config.vocab_size - 1) for token in tokens_for(config, n_tokens, seed)]
    expected = plain.forward(tokens, plain.new_cache(chunk=chunk))
    tokens[position] = config.vocab_size - 1
    found = broken.forward(tokens, broken.new_cache(chunk=chunk))
    reach = sum(n_tokens if window is None else window - 1 for window in config.sliding_window)
    is_reached_T = (np.arange(n_tokens) >= position) & (np.arange(n_tokens) <= position + reach)
    np.testing.assert_array_equal(found[~is_reached_T], expected[~is_reached_T])
    assert np.isnan(found[is_reached_T]).all()


# ------------------------------------------------------------------------------------------------------ one operation

STORED = ("f32", "f16", "bf16", "fp8", "int8", "int4")
each_matrix = pytest.mark.parametrize("stored", STORED)


def matrix_of(stored: str, n_out: int, n_in: int, seed: int) -> Matrix:
    values = normal(seed, n_out, n_in)
    if stored in ("int8", "int4"):
        return quantized(Matrix("w", "f32", values), int(stored[3:]), 32)
    return as_stored(stored, values)


def assert_rows_apart(
    operation: Callable[[np.ndarray], np.ndarray], x: np.ndarray, data: st.DataObject, error: float = 0
) -> None:
    """Break a number in one row of x. No other row of the result changes by more than `error`, and NaN is not lost."""
    row, value = data.draw(st.integers(0, len(x) - 1)), data.draw(st.sampled_from(BROKEN))
    broken = x.copy()
    broken[row].reshape(-1)[data.draw(st.integers(0, x[row].size - 1))] = value
    with np.errstate(all="ignore"):
        plain, found = operation(x), operation(broken)
    np.testing.assert_allclose(np.delete(found, row, 0), np.delete(plain, row, 0), rtol=0, atol=error)
    assert np.isnan(found[row]).any() or not np.isnan(value)


@each_backend
@each_matrix
@given(st.integers(1, 30), st.integers(1, 80), st.integers(1, 300), seeds, st.data())
@settings(max_examples=20)
def test_a_broken_row_reaches_no_other_row_of_a_product(
    backend: str, stored: str, n_tokens: int, n_out: int, n_in: int, seed: int, data: st.DataObject
) -> None:
    ops, matrix = ops_of(backend), matrix_of(stored, n_out, n_in, seed)
    assert_rows_apart(lambda x_TI: ops.linear(x_TI, matrix), normal(seed ^ 1, n_tokens, n_in), data)


@each_backend
@each_matrix
@given(st.integers(1, 12), st.integers(1, 40), seeds, st.data())
@settings(max_examples=20)
def test_a_broken_row_reaches_no_other_row_of_a_mixture(
    backend: str, stored: str, n_tokens: int, dim: int, seed: int, data: st.DataObject
) -> None:
    """The broken row may leave an expert or join one. The number of an expert's rows decides the order of its sums, so
    other rows may be rounded otherwise.
    """
    ops, n_experts = ops_of(backend), data.draw(st.integers(1, 4))
    router = Matrix("gate", "f32", normal(seed, n_experts, dim))
    experts = [matrix_of(stored, dim, dim, seed ^ number) for number in range(1, n_experts + 1)]
    n_chosen = data.draw(st.integers(1, n_experts))

    def mixture(x_TD: np.ndarray) -> np.ndarray:
        weights_TE = ops.route(ops.linear(x_TD, router), n_chosen)
        tokens_N, experts_N = np.nonzero(weights_TE)
        y_ND = ops.expert_linear(x_TD[tokens_N], experts_N, experts)
        return ops.mix_experts(y_ND, tokens_N, experts_N, weights_TE)

    assert_rows_apart(mixture, normal(seed, n_tokens, dim), data, error=1e-4)


@each_backend
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 20), seeds, st.data())
@settings(max_examples=20)
def test_a_broken_row_reaches_no_other_row_of_a_norm_a_rotation_or_swiglu(
    backend: str, n_tokens: int, n_heads: int, n_pairs: int, seed: int, data: st.DataObject
) -> None:
    ops, x_THK = ops_of(backend), normal(seed, n_tokens, n_heads, 2 * n_pairs)
    x_TD, (cos, sin) = x_THK.reshape(n_tokens, -1), normal(seed ^ 1, 2, n_tokens, n_pairs)
    weight_D = normal(seed ^ 2, x_TD.shape[1])
    assert_rows_apart(lambda x: ops.rms_norm(x, weight_D, 1e-5), x_TD, data)
    assert_rows_apart(lambda x: ops.rotate(x, cos, sin), x_THK, data)
    assert_rows_apart(lambda x: ops.swiglu(x, x_TD), x_TD, data)
