"""Departure: where a dump departs first from the right pass, in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mistral_ref.compare import DEFAULT_BOUND, difference, side_by_side
from mistral_ref.steps import Step
from mistral_ref.study.conform.cases import Text
from mistral_ref.study.conform.hypotheses import Pair, spread

_WORDS = {"token": "token", "query": "token", "key": "key", "head": "head", "kv_head": "key/value head"}
_WORDS |= {"expert": "expert"}


@dataclass(frozen=True)
class Departure:
    """The first step of the first text that departs.

    text        the name of the text
    step        the name of the step
    where       in which tokens, heads and so on it departs, in words
    found, expected     the two values that lie furthest apart
    distance    root mean square of the difference, as a share of the right step's
    """

    text: str
    step: str
    where: str
    found: float
    expected: float
    distance: float


def departure_of(text: Text, pair: Pair) -> Departure:
    """Return where a step of a dump departs."""
    found, expected = side_by_side(pair.found, pair.expected)
    distance = spread(pair.found, pair.expected)
    if found.shape != expected.shape:
        where = f"shape {found.shape}, expected {expected.shape}"
        return Departure(text.name, pair.found.name, where, np.nan, np.nan, distance)
    worst = difference(pair.found.name, found, expected, DEFAULT_BOUND)
    keys = pair.expected.key_positions
    stop = len(text.tokens) if keys is None else keys.stop
    unseen = np.isfinite(found) != np.isfinite(expected)
    if pair.found.name.endswith(".scores") and unseen.any():
        where = _seen_keys(found, expected, stop)
    else:
        with np.errstate(invalid="ignore"):
            far = ~(np.abs(found - expected) <= _allowed(pair, expected))
        where = _places(far & ~(found == expected), pair.expected, stop)
    return Departure(text.name, pair.found.name, where, worst.value, worst.expected, distance)


def _allowed(pair: Pair, expected: np.ndarray) -> float:
    """Return how far an element may lie from the right one: in 16 bits as far as all may on average."""
    finite = np.abs(expected[np.isfinite(expected)])
    if pair.tolerance:
        return pair.tolerance * float(np.sqrt(np.mean(finite**2)))
    return DEFAULT_BOUND * float(np.spacing(np.float32(finite.max(initial=0.0))))


def _seen_keys(found_HTS: np.ndarray, expected_HTS: np.ndarray, stop: int) -> str:
    """Return which keys the first query with wrong keys sees."""
    seen, right = (np.isfinite(scores_HTS).any(axis=0) for scores_HTS in (found_HTS, expected_HTS))
    n_queries, n_keys = seen.shape
    query = int(np.flatnonzero((seen != right).any(axis=1))[0])
    keys, expected = (_listed(np.flatnonzero(one[query]) + stop - n_keys) for one in (seen, right))
    return f"token {stop - n_queries + query} sees keys {keys}; expected {expected}"


def _places(far: np.ndarray, step: Step, stop: int) -> str:
    """Return in words in which places of a step something is far off; "" if it is so everywhere.

    far     whether each value is far off
    stop    one past the position of the last token
    """
    words = []
    is_turned = step.name.endswith(("q_rotated", "k_rotated"))
    for axis, name in enumerate(step.axes):
        word = "pair" if is_turned and name == "head_dim" else _WORDS.get(name, "")
        places = np.flatnonzero(far.any(axis=tuple(other for other in range(far.ndim) if other != axis)))
        size, first = far.shape[axis], stop - far.shape[axis] if word in ("token", "key") else 0
        if word == "pair":
            places, size = np.unique(places // 2), size // 2
        if word and len(places) < size:
            words.append(f"{word}{'' if len(places) == 1 else 's'} {_listed(first + places, first + size)}")
    return ", ".join(words)


def _listed(places: np.ndarray, stop: int | None = None) -> str:
    """Return numbers in words; `stop` is one past the largest that there could be.

    >>> _listed(np.array([3, 4, 5]), 6), _listed(np.array([3, 4, 5]), 9), _listed(np.array([1, 4]), 9)
    ('3 and up', '3 to 5', '1, 4')
    """
    first, last, n = int(places[0]), int(places[-1]), len(places)
    if n == 1:
        return str(first)
    if n == last - first + 1:
        return f"{first} and up" if stop == last + 1 else f"{first} to {last}"
    return ", ".join(map(str, places[:4].tolist())) + (", ..." if n > 4 else "")
