"""JoinedPass: sequences that lie end to end in one pass get the logits that each gets alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused
from support.tiny import ACCUMULATED_BOUND, BACKENDS, LARGE, MIXTURE, configs, model_of, tokens_for

from mistral_ref import CacheError, KVCache, Model
from mistral_ref.joined_pass import JoinedPass
from mistral_ref.transformer import drain


def joined_logits(model: Model, parts: list[tuple[KVCache, list[int]]]) -> list[np.ndarray]:
    """Return the logits (T, V) of each sequence, whose tokens follow those in its cache."""
    joined = JoinedPass([cache.begin(len(ids)) for cache, ids in parts])
    logits_TV = drain(model.transformer.forward_steps(np.concatenate([ids for _, ids in parts]), joined), model.ops)
    return [logits_TV[rows] for _, rows in joined.parts()]


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    """Assert that logits agree within what rounding may have added in all steps."""
    assert np.abs(found - expected).max() <= ACCUMULATED_BOUND * np.spacing(np.float32(np.abs(expected).max()))


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_sequences_end_to_end_are_as_each_alone(backend: str, data: st.DataObject) -> None:
    model = model_of(data.draw(configs()), backend=backend)
    lengths = data.draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=4))
    texts = [tokens_for(model.config, sum(calls), seed) for seed, calls in enumerate(lengths)]
    caches = [model.new_cache(chunk=6) for _ in texts]
    expected = [model.forward(ids) for ids in texts]
    for number in range(max(map(len, lengths))):
        going_on = [n for n, calls in enumerate(lengths) if number < len(calls)]
        at = {n: slice(sum(lengths[n][:number]), sum(lengths[n][: number + 1])) for n in going_on}
        found = joined_logits(model, [(caches[n], texts[n][at[n]]) for n in going_on])
        for n, logits_TV in zip(going_on, found, strict=True):
            assert_near(logits_TV, expected[n][at[n]])
    assert [cache.tokens for cache in caches] == texts


@pytest.mark.parametrize("config", [LARGE, MIXTURE])
def test_kernels_give_the_tokens_of_up_to_24_sequences_the_same_bits_as_alone(config: object) -> None:
    model = model_of(config, backend="numba", threads=2)
    caches = [model.new_cache() for _ in range(24)]
    for n, cache in enumerate(caches):  # a ring has wrapped in some of them
        model.forward(tokens_for(config, 1 + 3 * n, n), cache)
    expected = [model.forward([n], cache.copy()) for n, cache in enumerate(caches)]
    found = joined_logits(model, [(cache, [n]) for n, cache in enumerate(caches)])
    np.testing.assert_array_equal(found, expected)


def test_a_pass_over_a_cache_that_is_used_meanwhile_ends_for_all() -> None:
    model = model_of(LARGE)
    first, second = model.new_cache(), model.new_cache()
    joined = JoinedPass([first.begin(2), second.begin(1)])
    model.forward([1], second)
    with refused(CacheError, "cache", "pass"):
        joined.commit([1, 2, 3])
    assert (first.tokens, second.tokens) == ([], [1])
    with refused(CacheError, "cache", "pass"):
        joined_logits(model, [(first, [1]), (first, [2])])
