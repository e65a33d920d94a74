"""Sampling: against an implementation that only loops and compares, and what each step means at its ends."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.errors import refused

from mistral_ref.errors import InputError, short_repr
from mistral_ref.sampling import SamplingSettings, distribution, keep_min_p, keep_top_p, log_softmax, sample, softmax

INF, NAN = math.inf, math.nan


class Uniform(np.random.Generator):
    """A generator whose one number is known beforehand; a second one is an error."""

    def __init__(self, uniform: float) -> None:
        super().__init__(np.random.PCG64(0))
        self.left = [uniform]

    def random(self) -> float:
        return self.left.pop()


def slow_probabilities(logits: list[float], settings: SamplingSettings, seen_ids: list[int]) -> dict[int, float]:
    """Return the probability of every token that can be drawn, most probable first. No vectors, no tricks."""
    scores = dict(enumerate(logits))
    for token in set(seen_ids):
        c = settings.repetition_penalty
        scores[token] = scores[token] / c if scores[token] > 0 else scores[token] * c
    order = sorted(scores, key=lambda token: (-scores[token], token))
    if settings.temperature == 0:
        return {order[0]: 1.0}

    def probabilities(kept: list[int]) -> dict[int, float]:
        weight = {token: math.exp((scores[token] - scores[order[0]]) / settings.temperature) for token in kept}
        return {token: weight[token] / math.fsum(weight.values()) for token in kept}

    p = probabilities(order if settings.top_k is None else order[: settings.top_k])
    kept, mass = [], 0.0
    for token in p:
        if mass <= settings.top_p or settings.top_p == 1:
            kept.append(token)
        mass += p[token]
    p = probabilities(kept)
    return probabilities([token for token in kept if p[token] >= settings.min_p * p[order[0]]])


# Halves, so that ties are common and that the same sums are exact in any order of adding.
logit_lists = st.lists(st.integers(-20, 20).map(lambda n: n / 2), min_size=1, max_size=12)
any_settings = st.builds(
    SamplingSettings,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.integers(1, 14),
    top_p=st.just(1.0) | st.floats(0.01, 1.0),
    min_p=st.just(0.0) | st.floats(0.01, 1.0),
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.3]),
)


@given(logit_lists, any_settings, st.data(), st.floats(0, 1, exclude_max=True))
def test_a_draw_is_that_of_the_slow_implementation(
    logits: list[float], settings: SamplingSettings, data: st.DataObject, uniform: float
) -> None:
    seen_ids = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=6))
    p = slow_probabilities(logits, settings, seen_ids)
    token = sample(np.float32(logits), settings, Uniform(uniform), seen_ids)
    # The token's share of [0, 1) holds the uniform number, up to the rounding of a dozen sums.
    before = sum(list(p.values())[: list(p).index(token)])
    assert before - 1e-9 <= uniform <= before + p[token] + 1e-9


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40))
def test_log_softmax_is_the_logarithm_of_the_probabilities(logits: list[float]) -> None:
    p = slow_probabilities(logits, SamplingSettings(temperature=1.0), [])
    log_p_TV = log_softmax([logits, [1e4 + logit for logit in logits]])
    assert log_softmax(np.float32(logits)).dtype == np.float64
    np.testing.assert_allclose(np.exp(log_p_TV[0]), [p[token] for token in range(len(logits))], atol=1e-12)
    np.testing.assert_allclose(log_p_TV[1], log_p_TV[0], atol=1e-9)


def test_log_softmax_of_impossible_tokens() -> None:
    np.testing.assert_array_equal(log_softmax([0.0, -INF]), [0.0, -INF])


def test_the_same_seed_draws_the_same_tokens() -> None:
    logits_V = np.random.default_rng(1).normal(size=100)
    settings = SamplingSettings(temperature=1.0)

    def draws(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return [sample(logits_V, settings, rng, []) for _ in range(20)]

    assert draws(0) == draws(0) != draws(1)


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(temperature=1.0),
        SamplingSettings(temperature=2.0, top_k=9, top_p=0.9, min_p=0.2, repetition_penalty=1.2),
    ],
)
def test_tokens_come_as_often_as_they_are_probable(settings: SamplingSettings) -> None:
    logits = np.random.default_rng(2).normal(size=12).tolist()
    rng = np.random.default_rng(3)
    n = 20_000
    counts = np.bincount([sample(logits, settings, rng, [1, 2]) for _ in range(n)], minlength=len(logits))
    p = slow_probabilities(logits, settings, [1, 2])
    for token in range(len(logits)):
        expected = p.get(token, 0.0)
        assert abs(counts[token] / n - expected) <= 5 * math.sqrt(expected * (1 - expected) / n)


def test_equal_logits_are_taken_by_the_lower_id() -> None:
    logits = [1.0, 3.0, 3.0, 3.0, 0.0]
    rng = np.random.default_rng(0)
    assert sample(logits, SamplingSettings(), rng, []) == 1
    assert sample(logits, SamplingSettings(temperature=1.0, top_k=1), rng, []) == 1
    drawn = {sample(logits, SamplingSettings(temperature=1.0, top_k=2), rng, []) for _ in range(100)}
    assert drawn == {1, 2}
    drawn = {sample(logits, SamplingSettings(temperature=1.0, min_p=1.0), rng, []) for _ in range(100)}
    assert drawn == {1, 2, 3}


@pytest.mark.parametrize(
    "settings",
    [
        SamplingSettings(),
        SamplingSettings(temperature=100.0, top_k=1),
        SamplingSettings(temperature=1.0, top_p=1e-300),
        SamplingSettings(temperature=1.0, min_p=1.0),
        SamplingSettings(temperature=1.0, top_p=0),
        SamplingSettings(temperature=5e-324),
        SamplingSettings(temperature=np.float32(1e-30), top_k=np.int64(3)),
    ],
)
def test_what_leaves_only_the_most_probable_token(settings: SamplingSettings) -> None:
    for uniform in (0.0, 0.5, 1 - 2**-53):
        assert sample([-3e38, 1.0, 3e38, 2.9e38], settings, Uniform(uniform), []) == 2


@pytest.mark.parametrize("settings", [SamplingSettings(temperature=1.0, top_k=10**9), SamplingSettings(temperature=1)])
def test_settings_that_filter_nothing_reach_the_last_token(settings: SamplingSettings) -> None:
    # Ten equal tokens, whose probabilities do not add up to exactly 1, and one that is impossible.
    assert sample([0.0] * 10 + [-INF], settings, Uniform(1 - 2**-53), []) == 9


@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.9}, {"top_p": 0.999999, "min_p": 1e-9}, {"min_p": 0.01}, {"top_k": 1500, "top_p": 0.9}],
    ids=str,
)
@pytest.mark.parametrize("share", [1.0, 0.5, 0.001])
def test_few_tokens_of_many_are_sorted_as_if_all_were(settings: dict[str, float], share: float) -> None:
    rng = np.random.default_rng(4)
    logits_V = rng.normal(size=5000).round(2).astype(np.float32)  # many are equal
    logits_V[rng.random(5000) > share] = -INF
    ids_N = np.argsort(-logits_V, kind="stable")[: settings.get("top_k")]
    p_N = softmax(logits_V[ids_N].astype(np.float64), 1.3)
    p_N = keep_min_p(keep_top_p(p_N, settings.get("top_p", 1)), settings.get("min_p", 0))
    found = distribution(logits_V, SamplingSettings(temperature=1.3, **settings), [])
    n = min(len(p_N), np.isfinite(logits_V).sum())
    assert found.ids_N[:n].tolist() == ids_N[:n].tolist()
    np.testing.assert_allclose(found.p_N[:n], p_N[:n], rtol=1e-12)
    assert not found.p_N[n:].any()


def test_the_token_that_crosses_top_p_is_kept() -> None:
    logits = np.log([0.5, 0.25, 0.125, 0.125])
    for top_p, n_kept in ((0.25, 1), (0.4999, 1), (0.5001, 2), (0.7499, 2), (0.7501, 3), (0.99, 4), (1.0, 4)):
        settings = SamplingSettings(temperature=1.0, top_p=top_p)
        assert sample(logits, settings, Uniform(1 - 2**-53), []) == n_kept - 1, top_p


def test_temperature_comes_before_top_p() -> None:
    settings = SamplingSettings(temperature=1.0, top_p=0.7)
    logits = np.log([0.8, 0.1, 0.1])
    assert sample(logits, settings, Uniform(0.99), []) == 0
    assert sample(logits, replace(settings, temperature=100.0), Uniform(0.99), []) == 2


def test_the_penalty_counts_a_token_once_and_reaches_greedy_choice() -> None:
    settings = SamplingSettings(repetition_penalty=1.5)
    rng = np.random.default_rng(0)
    assert sample([1.4, 2.0], settings, rng, [1, 1, 1]) == 0
    assert sample([1.0, 2.0], settings, rng, [1, 1, 1]) == 1  # 2 / 1.5 is above 1, 2 / 1.5^3 is not
    assert sample([-2.0, -1.5], settings, rng, {1}) == 0
    assert sample([-2.0, -1.5], settings, rng, np.array([0, 1])) == 1


def test_the_arguments_are_left_as_they_are() -> None:
    logits_V = np.array([3.0, 1.0, -1.0])
    logits_V.flags.writeable = False
    sample(logits_V, SamplingSettings(temperature=1.0, repetition_penalty=2.0), np.random.default_rng(0), [0, 2])


@pytest.mark.parametrize("logits", [[0.0, NAN], [NAN, INF], [INF, 0.0], [-INF, -INF]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_mean_nothing_are_refused(logits: list[float], temperature: float) -> None:
    settings = SamplingSettings(temperature=temperature)
    with refused(InputError, "logit", np.max(logits)):
        sample(logits, settings, np.random.default_rng(0), [])


@pytest.mark.parametrize("seen_ids", [[-1], [0, 2]])
def test_seen_ids_outside_the_vocabulary_are_refused(seen_ids: list[int]) -> None:
    with refused(InputError, "ids", min(seen_ids), max(seen_ids), "0 to 1"):
        sample([0.0, 1.0], SamplingSettings(repetition_penalty=2.0), np.random.default_rng(0), seen_ids)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, 1.1e4, NAN, INF, -INF, "1", None, True, 10**400, 1j]),
        ("top_k", [0, -1, 1.0, "5", True, NAN]),
        ("top_p", [-0.5, 1.001, NAN, INF, None, False]),
        ("min_p", [-0.1, 1.1, NAN, None]),
        ("repetition_penalty", [0.0, -1.0, NAN, INF, None, True]),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, values: list[object]) -> None:
    for value in values:
        with refused(InputError, name, short_repr(value), "whole number" if name == "top_k" else "number"):
            SamplingSettings(**{name: value})
