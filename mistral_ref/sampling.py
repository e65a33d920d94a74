"""Choose one token from the logits of all tokens. This is the order:

    logits  ->  repetition penalty  ->  temperature  ->  top-k  ->  top-p  ->  min-p  ->  one draw

The order changes the result, because each operation works on the result of the one before. For example, a high
temperature flattens the distribution. A top-p after it then keeps more tokens than a top-p before it.

Mistral's own code (mistral-inference, generate.py) and Hugging Face's `generate` apply the temperature before top-p.
llama.cpp and MLX filter at temperature 1 and apply the temperature last. So the same settings may give different
distributions in two engines. The reported log-probabilities (`log_softmax`) are those of the model's logits, before
all these operations.

Every filter keeps the most probable tokens. The filters differ only in how many they keep. So the tokens are sorted
once, equal ones by the lower id, and each filter returns the beginning of its input. Tokens that no filter could leave
need not be sorted. All probabilities are float64.

Axes: V the vocabulary in order of ids, N the tokens that are left, most probable first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray

from mistral_ref.errors import InputError, checked_float, checked_int

Floats = NDArray[np.float64]

_FEW = 1000  # tokens; filters mostly leave fewer


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """How a token is chosen. The defaults are greedy: they always choose the most probable token.

    temperature         logits are divided by it; 0 takes the largest logit, and the filters change nothing
    top_k               keep the k most probable tokens; None keeps all
    top_p               keep tokens until their probabilities add up to p; 1 keeps all
    min_p               keep the tokens that are at least m times as probable as the most probable one; 0 keeps all
    repetition_penalty  above 1 it makes tokens that occurred before less likely, below 1 more likely

    Raises InputError. The message names the setting, its value and the expected values.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        ranges = {"temperature": (0, 1e4), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (1e-4, 1e4)}
        for name, (low, high) in ranges.items():
            checked_float(name, getattr(self, name), low, high)
        if self.top_k is not None:
            checked_int("top_k", self.top_k, least=1)

    @property
    def without_effect(self) -> list[str]:
        """Names of the settings that are given, but change nothing because the temperature is 0."""
        names = ("top_k", "top_p", "min_p") if self.temperature == 0 else ()
        return [name for name in names if getattr(self, name) != getattr(type(self), name)]


class Distribution(NamedTuple):
    """What a token is drawn from: the ids (N,) that are left, most probable first, and how probable they are.

    The probabilities need not add up to 1.
    """

    ids_N: np.ndarray
    p_N: Floats

    def draw(self, rng: Generator) -> int:
        """Return one of the ids; `rng` gives one number."""
        return int(self.ids_N[draw(self.p_N, rng.random())])

    def shares(self, ids: np.ndarray) -> Floats:
        """Return the probabilities of these ids, as parts of 1.

        >>> Distribution(np.array([5, 3]), np.array([0.75, 0.5])).shares(np.array([3, 4, 5]))
        array([0.4, 0. , 0.6])
        """
        shares_V = np.zeros(max(self.ids_N.max(), ids.max()) + 1)
        shares_V[self.ids_N] = self.p_N / np.sum(self.p_N)
        return shares_V[ids]


def sample(logits_V: ArrayLike, settings: SamplingSettings, rng: Generator, seen_ids: Iterable[int]) -> int:
    """Return the id of the next token, as `distribution` says.

    rng         gives one number if the temperature is above 0, and no number if it is 0
    """
    drawn_from = distribution(logits_V, settings, seen_ids)
    return int(drawn_from.ids_N[0]) if settings.temperature == 0 else drawn_from.draw(rng)


def choose_drafted(drafted: int, q: Distribution, p: Distribution, rng: Generator) -> int:
    """Return the drafted token, which was drawn from q, or another one, so that the result is distributed as p.

    The drafted token x is accepted with the probability min(1, p(x) / q(x)). Otherwise a token is drawn from what p has
    more than q: max(p - q, 0) (Leviathan, Kalman and Matias 2023, arXiv:2211.17192).
    """
    (p_x,), (q_x,) = (one.shares(np.array([drafted])) for one in (p, q))
    if rng.random() < p_x / q_x:
        return drafted
    more_N = np.maximum(p.shares(p.ids_N) - q.shares(p.ids_N), 0)
    return Distribution(p.ids_N, more_N if more_N.any() else p.p_N).draw(rng)  # rounding may leave nothing


def distribution(logits_V: ArrayLike, settings: SamplingSettings, seen_ids: Iterable[int]) -> Distribution:
    """Return what the next token is drawn from; at temperature 0 one id is left. Each operation is a function below.

    logits_V    the model's logits, (V,); -inf makes a token impossible
    seen_ids    the ids that the repetition penalty applies to, in any order

    Raises InputError if the logits hold NaN or +inf, if all are -inf, or if a seen id is not in [0, V).
    """
    # Overflow is right here: a tiny temperature makes every logit except the largest -inf, and its probability 0.
    with np.errstate(over="ignore"):
        scores_V = penalize(np.asarray(logits_V, dtype=np.float64), seen_ids, settings.repetition_penalty)
        best = int(np.argmax(scores_V))  # the lowest id of equal logits; NaN counts as the largest
        if not np.isfinite(scores_V[best]):
            raise InputError(f"the largest logit is {scores_V[best]} (token {best}); expected a finite number")
        if settings.temperature == 0:
            return Distribution(np.array([best]), np.ones(1))
        return _most_probable(scores_V, settings)


def _most_probable(scores_V: Floats, settings: SamplingSettings) -> Distribution:
    """Return what the filters leave. Mostly that is a few tokens, so first a few are sorted, and all only if need be.

    A filter that ends among the first tokens leaves none of the others, which are less probable.
    """
    if settings.top_k is not None and settings.top_k < len(scores_V):
        ids_N = likeliest(scores_V, settings.top_k)
        p_N = _filtered(softmax(scores_V[ids_N], settings.temperature), settings)
        return Distribution(ids_N[: len(p_N)], p_N)
    p_V = softmax(scores_V, settings.temperature)
    most = int(np.count_nonzero(p_V))
    for n in (min(_FEW, most), most) if settings.top_p < 1 or settings.min_p > 0 else (most,):
        ids_N = likeliest(scores_V, n)
        p_N = _filtered(p_V[ids_N], settings)
        if len(p_N) < n:
            break
    return Distribution(ids_N[: len(p_N)], p_N)


def _filtered(p_N: Floats, settings: SamplingSettings) -> Floats:
    return keep_min_p(keep_top_p(p_N, settings.top_p), settings.min_p)


def penalize(logits_V: Floats, seen_ids: Iterable[int], penalty: float) -> Floats:
    """Return the logits (V,); the logit l of a token seen before becomes l / c if l > 0, else l * c. c is the penalty.

    A token that occurs several times is penalized once. CTRL (arXiv:1909.05858, section 4.1) divides negative logits
    too, but this would make a token with l < 0 likelier. Raises InputError if an id is not in [0, V).

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
    """Return p_i = exp(l_i / T) / sum_j exp(l_j / T), (N,). The largest logit is subtracted first to avoid overflow.

    >>> softmax(np.log([0.6, 0.3, 0.1]), temperature=0.5).round(3)
    array([0.783, 0.196, 0.022])
    """
    weights_N = np.exp((logits_N - logits_N.max()) / temperature)
    return weights_N / np.sum(weights_N)


def keep_top_p(p_N: Floats, top_p: float) -> Floats:
    """Keep token i if the tokens before it add up to at most p: p_0 + ... + p_(i-1) <= p.

    So the token with which the sum exceeds p is kept. This is nucleus sampling (arXiv:1904.09751) with the comparison
    of Mistral's code.

    >>> keep_top_p(np.array([0.5, 0.25, 0.125, 0.125]), top_p=0.6)
    array([0.5 , 0.25])
    """
    before_N = np.append(0.0, np.cumsum(p_N)[:-1])
    # A p of 1 keeps all tokens, even if the sum of the first ones is rounded to more than 1.
    return p_N[before_N <= top_p] if top_p < 1 else p_N


def keep_min_p(p_N: Floats, min_p: float) -> Floats:
    """Keep token i if p_i >= m * max_j p_j (arXiv:2407.01082).

    >>> keep_min_p(np.array([0.5, 0.25, 0.125, 0.125]), min_p=0.5)
    array([0.5 , 0.25])
    """
    return p_N[p_N >= min_p * np.max(p_N)]


def draw(p_N: Floats, uniform: float) -> int:
    """Return the first i with p_0 + ... + p_i > u * sum_j p_j, for u in [0, 1).

    This is the inverse of the cumulative distribution function. The probabilities need not add up to 1.

    >>> [draw(np.array([0.5, 0.25]), uniform) for uniform in (0.0, 0.6, 0.7)]
    [0, 0, 1]
    """
    cdf_N = np.cumsum(p_N)
    return int(np.searchsorted(cdf_N, uniform * cdf_N[-1], side="right"))


def likeliest(logprobs_V: np.ndarray, n: int) -> np.ndarray:
    """Return the ids (n,) of the n most probable tokens, the most probable first, equal ones by the lower id.

    >>> likeliest(np.log([0.1, 0.3, 0.3, 0.2, 0.1]), 3).tolist()
    [1, 2, 3]
    """
    ids = np.arange(len(logprobs_V))
    if n < len(ids):
        nth = np.partition(logprobs_V, -n)[-n]  # so that only a few tokens need be sorted
        ids = np.flatnonzero(~(logprobs_V < nth))  # NaN is among them
    return ids[_largest_first(logprobs_V[ids])[:n]]


def _largest_first(values: np.ndarray) -> np.ndarray:
    """Return what np.argsort(-values, kind="stable") returns, five times as fast unless most values are equal.

    >>> _largest_first(np.array([1.0, 3.0, 1.0, 2.0, 3.0])).tolist()
    [1, 4, 3, 0, 2]
    """
    order = np.argsort(-values)
    in_order = values[order]
    is_new = np.append(True, in_order[1:] != in_order[:-1])
    tied = ~(is_new & np.append(is_new[1:], True))
    places = order[tied]
    order[tied] = places[np.lexsort((places, np.cumsum(is_new)[tied]))]
    return order


def log_softmax(logits: ArrayLike) -> Floats:
    """Return log p_i = l_i - log sum_j exp(l_j) over the last axis, in float64. Reported log-probabilities are these.

    >>> log_softmax([[0.0, 0.0], [1000.0, 1000.0]]).round(4)
    array([[-0.6931, -0.6931],
           [-0.6931, -0.6931]])
    """
    shifted = np.subtract(logits, np.max(logits, axis=-1, keepdims=True), dtype=np.float64)
    shifted -= np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return shifted
