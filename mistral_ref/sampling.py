"""From the scores of every token to one token: what sampling does, and in which order.

    logits  ->  repetition penalty  ->  temperature  ->  top-k  ->  top-p  ->  min-p  ->  one draw

The order is part of the meaning, because each step changes what the next one sees: a high temperature flattens the
distribution, so that a top-p after it keeps more tokens than a top-p before it. Temperature before top-p is the order
of Mistral's own code (mistral-inference, generate.py) and of Hugging Face's `generate`; llama.cpp and MLX filter at
temperature 1 and apply the temperature last. The same settings may thus mean two distributions in two engines. The
log-probabilities that are reported (`log_softmax`) are the model's own, from before all of it.

Every filter keeps the most probable tokens, only a different number of them; so tokens are sorted once, ties by the
lower id, and a filter returns the beginning of the row that it is given. Probabilities are float64 throughout.

Axes: V the vocabulary in order of ids, N the tokens still in play, most probable first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from mistral_ref.errors import InputError, short_repr

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a token is chosen. The defaults are greedy: always the most probable one.

    temperature         logits are divided by it; 0 takes the largest logit, and no filter matters
    top_k               keep the k most probable tokens; None keeps all
    top_p               keep tokens until their probabilities add up to p; 1 keeps all
    min_p               keep tokens at least m times as probable as the most probable one; 0 keeps all
    repetition_penalty  above 1 it makes tokens seen before less likely, below 1 more likely

    Raises InputError naming the setting, its value and what was expected.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        ranges = {"temperature": (0, 1e4), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (1e-4, 1e4)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
            if not (is_number and low <= value <= high):
                raise InputError(f"{name} is {short_repr(value)}; expected a number from {low:g} to {high:g}")
        k = self.top_k
        if k is not None and (isinstance(k, bool) or not isinstance(k, (int, np.integer)) or k < 1):
            raise InputError(f"top_k is {short_repr(k)}; expected a whole number of at least 1, or None")


def sample(logits_V: ArrayLike, settings: SamplingSettings, rng: Generator, seen_ids: Iterable[int]) -> int:
    """Choose the next token: the steps above, each of them a function below.

    logits_V    the model's scores, (V,); -inf makes a token impossible
    rng         is asked for one number where the temperature is above 0, and for none where it is 0
    seen_ids    the tokens that the repetition penalty applies to, in any order

    Raises InputError if the logits hold NaN or +inf, or are all -inf; or if a seen id is not in [0, V).
    """
    # Overflow is meant: a tiny temperature sends all but the largest logit to -inf, whose probability is the right 0.
    with np.errstate(over="ignore"):
        scores_V = penalize(np.asarray(logits_V, dtype=np.float64), seen_ids, settings.repetition_penalty)
        best = int(np.argmax(scores_V))  # the lowest id of equals; NaN counts as largest
        if not np.isfinite(scores_V[best]):
            raise InputError(f"the model produced {scores_V[best]} as largest logit (token {best}); expected a number")
        if settings.temperature == 0:
            return best
        ids_N = np.argsort(-scores_V, kind="stable")[: settings.top_k]
        p_N = softmax(scores_V[ids_N], settings.temperature)
        p_N = keep_min_p(keep_top_p(p_N, settings.top_p), settings.min_p)
        return int(ids_N[draw(p_N, rng.random())])


def penalize(logits_V: Floats, seen_ids: Iterable[int], penalty: float) -> Floats:
    """Lower the logits of tokens seen before: l / c if l > 0, else l * c, once for each distinct token.

    CTRL (arXiv:1909.05858, section 4.1) divides whatever the sign, which would make a token with l < 0 likelier.

    >>> penalize(np.array([3.0, -3.0, 1.0]), seen_ids=[0, 1, 1], penalty=1.5)
    array([ 2. , -4.5,  1. ])
    """
    if penalty == 1:
        return logits_V
    ids = np.unique(np.fromiter(seen_ids, dtype=np.int64))
    if ids.size and not 0 <= ids[0] <= ids[-1] < len(logits_V):
        raise InputError(f"seen ids run from {ids[0]} to {ids[-1]}; expected 0 to {len(logits_V) - 1}")
    seen, penalized_V = logits_V[ids], logits_V.copy()
    penalized_V[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
    return penalized_V


def softmax(logits_N: Floats, temperature: float = 1.0) -> Floats:
    """Return p_i = exp(l_i / T) / sum_j exp(l_j / T), after subtracting the largest logit so that none overflows.

    >>> softmax(np.log([0.6, 0.3, 0.1]), temperature=0.5).round(3)
    array([0.783, 0.196, 0.022])
    """
    weights_N = np.exp((logits_N - logits_N.max()) / temperature)
    return weights_N / np.sum(weights_N)


def keep_top_p(p_N: Floats, top_p: float) -> Floats:
    """Keep token i if the tokens before it hold at most p: p_0 + ... + p_(i-1) <= p. The one that crosses p is kept.

    Nucleus sampling (arXiv:1904.09751) with the comparison of Mistral's code.

    >>> keep_top_p(np.array([0.5, 0.25, 0.125, 0.125]), top_p=0.6)
    array([0.5 , 0.25])
    """
    before_N = np.append(0.0, np.cumsum(p_N)[:-1])
    # A p of 1 keeps all, even where the sum of the first ones is rounded to more than 1.
    return p_N[before_N <= top_p] if top_p < 1 else p_N


def keep_min_p(p_N: Floats, min_p: float) -> Floats:
    """Keep token i if p_i >= m * max_j p_j (arXiv:2407.01082).

    >>> keep_min_p(np.array([0.5, 0.25, 0.125, 0.125]), min_p=0.5)
    array([0.5 , 0.25])
    """
    return p_N[p_N >= min_p * np.max(p_N)]


def draw(p_N: Floats, uniform: float) -> int:
    """Return the first i with p_0 + ... + p_i > u * sum_j p_j, for u in [0, 1): inverse CDF, renormalized on the way.

    >>> [draw(np.array([0.5, 0.25]), uniform) for uniform in (0.0, 0.6, 0.7)]
    [0, 0, 1]
    """
    cdf_N = np.cumsum(p_N)
    return int(np.searchsorted(cdf_N, uniform * cdf_N[-1], side="right"))


def log_softmax(logits: ArrayLike) -> Floats:
    """Return log p_i = l_i - log sum_j exp(l_j) over the last axis, in float64: the log-probabilities in reports.

    >>> log_softmax([[0.0, 0.0], [1000.0, 1000.0]]).round(4)
    array([[-0.6931, -0.6931],
           [-0.6931, -0.6931]])
    """
    shifted = np.subtract(logits, np.max(logits, axis=-1, keepdims=True), dtype=np.float64)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
