"""Passes of a model as it is and with planted bugs, and whether one of them explains what another engine computed.

Two measures of distance are used. In float32 a step departs as in `compare`: if a value lies more than 2,000 ulps away.
In 16 bits the rounding of every step is magnified by peaked attention, and no fixed bound is right. So the same pass is
computed a few times more, with every value of every step moved at random by as much as 16 bits round it. A step departs
if its root mean square distance is more than three times what these passes show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np

from mistral_ref.compare import DEFAULT_BOUND, side_by_side, step_difference
from mistral_ref.model import Model
from mistral_ref.steps import Step
from mistral_ref.study.broken import broken, possible_bugs
from mistral_ref.study.conform.cases import Text
from mistral_ref.trace import Trace
from mistral_ref.walk import Edit

Bugs = tuple[str, ...]  # the names of the bugs of a pass; () is the right one
RIGHT: Bugs = ()
_DRAWS = 3
_TIMES = 3.0  # how many times the distance of these draws is still rounding


class Precision(NamedTuple):
    """The numbers that an engine computes with.

    rounding    the largest relative error of a number; 0: as small as in float32
    """

    name: str
    rounding: float


FLOAT32, F16, BF16 = Precision("float32", 0.0), Precision("f16", 2.0**-11), Precision("bf16", 2.0**-8)


class Evidence(NamedTuple):
    """What another engine computed of a text."""

    text: Text
    dump: Trace


class Pair(NamedTuple):
    """A step of a dump, and the same step of one of our passes with as many tokens.

    tolerance   how far the root mean square of their difference may be, as a share of that of our step; 0: float32
    """

    found: Step
    expected: Step
    tolerance: float

    @property
    def departs(self) -> bool:
        """Whether the two are further apart than rounding explains."""
        if not self.tolerance:
            return step_difference(self.found, self.expected, DEFAULT_BOUND).departs
        return not spread(self.found, self.expected) <= self.tolerance


def spread(found: Step, expected: Step) -> float:
    """Return the root mean square of the difference as a share of the expected one; infinite if shapes differ.

    It is also infinite if other values are finite, for example if a query sees other keys.
    """
    a, b = side_by_side(found, expected)
    if a.shape != b.shape:
        return np.inf
    seen = np.isfinite(b)
    if not np.array_equal(seen, np.isfinite(a)):
        return np.inf
    a, b = a[seen].astype(np.float64), b[seen].astype(np.float64)
    distance, size = (float(np.sqrt(np.mean(part * part))) if part.size else 0.0 for part in (a - b, b))
    return distance / size if size else distance


def run(model: Model, text: Text, edits: Mapping[str, Edit] | None = None) -> Trace:
    """Return the pass of a text that is to be checked, with all its steps."""
    if not text.n_first:
        return model.trace(text.tokens, edits=edits)
    first = model.token_ids(text.tokens[: text.n_first])
    cache = model.new_cache(chunk=len(first))
    model.forward(first, cache, edits=edits)
    return model.trace(text.tokens[text.n_first :], cache=cache, edits=edits)


class Hypotheses:
    """The passes of a model, right and with each bug; each is computed when it is asked for, and kept.

    model   the oracle
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._passes: dict[tuple[Bugs, Text], Trace] = {}
        self._noise: dict[tuple[Bugs, Text, Precision], dict[str, float]] = {}

    @cached_property
    def bugs(self) -> list[str]:
        """The bugs that the model can have."""
        return possible_bugs(self.model)

    def trace(self, bugs: Bugs, text: Text) -> Trace:
        """Return the pass of a text with these bugs."""
        if (bugs, text) not in self._passes:
            self._passes[bugs, text] = run(self._with(bugs), text)
        return self._passes[bugs, text]

    def noise(self, bugs: Bugs, text: Text, precision: Precision) -> dict[str, float]:
        """Return by the name of each step how far rounding moves it: the largest `spread` of a few draws."""
        key = bugs, text, precision
        if key not in self._noise:
            exact = self.trace(bugs, text)
            largest = dict.fromkeys(exact, 0.0)
            for seed in range(_DRAWS):
                moved = run(self._with(bugs), text, {"*": _rounding(seed, precision.rounding)})
                for name, step in moved.steps.items():
                    largest[name] = max(largest[name], spread(step, exact.steps[name]))
            self._noise[key] = largest
        return self._noise[key]

    def pairs(self, bugs: Bugs, evidence: Evidence, precision: Precision) -> Iterator[Pair]:
        """Yield the steps that a dump and one of our passes share, in the order of the pass.

        If one of the two has more tokens, its last ones are compared: a dump may hold both passes of a text. A dump
        with a token more than a whole text has departs.
        """
        ours = self.trace(bugs, evidence.text)
        noise = self.noise(bugs, evidence.text, precision) if precision.rounding else {}
        n_tokens = min(ours.n_tokens, evidence.dump.n_tokens)
        if not evidence.text.n_first and evidence.dump.n_tokens > len(evidence.text.tokens):
            n_tokens = max(ours.n_tokens, evidence.dump.n_tokens)
        for name, step in evidence.dump.steps.items():
            if name in ours.steps:
                found, expected = last_tokens(step, n_tokens), last_tokens(ours.steps[name], n_tokens)
                expected = _ending_as(expected, found)
                yield Pair(found, expected, _TIMES * noise[name] + step.rounding if noise else 0.0)

    def explains(self, bugs: Bugs, evidence: Sequence[Evidence], precision: Precision = FLOAT32) -> bool:
        """Return whether a pass with these bugs is what was found, up to the rounding of a precision."""
        return not any(pair.departs for one in evidence for pair in self.pairs(bugs, one, precision))

    def distance(self, bugs: Bugs, evidence: Sequence[Evidence]) -> float:
        """Return how far the last shared steps of all texts lie from those with these bugs, as `spread` does."""
        last = [list(self.pairs(bugs, one, FLOAT32))[-1] for one in evidence]
        return float(np.sqrt(np.mean([spread(pair.found, pair.expected) ** 2 for pair in last])))

    def visible(self, texts: Sequence[Text]) -> list[str]:
        """Return the bugs that change the logits of one of these texts."""
        rights = [Evidence(text, logits_of(self.trace(RIGHT, text))) for text in texts]
        return [bug for bug in self.bugs if not self.explains((bug,), rights)]

    def causes(self, evidence: Sequence[Evidence], precision: Precision) -> list[Bugs]:
        """Return what explains dumps that the right pass does not: single bugs, or else pairs of bugs.

        In 16 bits a cause is named only if it is much nearer than the right pass, and pairs are not looked for: with
        as much rounding as that, some pair would often come near.
        """
        visible = self.visible([one.text for one in evidence])
        singles: list[Bugs] = [(bug,) for bug in visible if self.explains((bug,), evidence, precision)]
        if precision.rounding:
            distances = {bugs: self.distance(bugs, evidence) for bugs in singles}
            nearest = min(distances.values(), default=0.0)
            far = self.distance(RIGHT, evidence)
            return [bugs for bugs, found in distances.items() if found < 2 * nearest and 2 * found < far]
        pairs: Iterator[Bugs] = combinations(visible, 2)
        return singles or [bugs for bugs in pairs if self.explains(bugs, evidence)]

    def nearer_by_far(self, evidence: Sequence[Evidence]) -> list[Bugs]:
        """Return the bug that comes eight times nearer to dumps than the right pass, if there is one, up to f16.

        Rounding cannot be so much like a bug. A bug that rounds, as `norm-cast` does, is not explained exactly: a
        number between two others may go the other way.
        """
        singles: list[Bugs] = [(bug,) for bug in self.visible([one.text for one in evidence])]
        distances = {bugs: self.distance(bugs, evidence) for bugs in singles}
        nearest = min(singles, key=distances.__getitem__, default=RIGHT)
        is_by_far = 8 * self.distance(nearest, evidence) < self.distance(RIGHT, evidence)
        return [nearest] if is_by_far and self.explains(nearest, evidence, F16) else []

    def separates(self, causes: Sequence[Bugs], texts: Sequence[Text]) -> str:
        """Return the name of a text whose logits differ between all of these causes; "" if there is none."""

        def is_apart(text: Text) -> bool:
            logits = [Evidence(text, logits_of(self.trace(bugs, text))) for bugs in causes]
            pairs = combinations(zip(causes, logits, strict=True), 2)
            return not any(self.explains(first, [second]) for (first, _), (_, second) in pairs)

        return next((text.name for text in texts if is_apart(text)), "")

    def _with(self, bugs: Bugs) -> Model:
        return broken(self.model, *bugs) if bugs else self.model


def logits_of(trace: Trace) -> Trace:
    """Return a trace that holds the logits alone."""
    return Trace([trace.steps["logits"]], trace.tokens, trace.pieces, start=trace.start)


def _rounding(seed: int, rounding: float) -> Edit:
    """Return an edit that moves each value at random by at most this share of its size."""
    random = np.random.default_rng(seed)
    return lambda value: value * (1 + rounding * random.uniform(-1, 1, value.shape))


def last_tokens(step: Step, n_tokens: int) -> Step:
    """Return a step with its last tokens only, if it has more."""
    axis = next((axis for axis, name in enumerate(step.axes) if name in ("token", "query")), None)
    if axis is None or step.value.shape[axis] <= n_tokens:
        return step
    more = step.value.shape[axis] - n_tokens
    return _replaced(step, np.moveaxis(np.moveaxis(step.value, axis, 0)[more:], 0, axis), step.key_positions)


def _ending_as(step: Step, other: Step) -> Step:
    """Return a step whose last key has the position that it has in another pass."""
    keys, others = step.key_positions, other.key_positions
    if keys is None or others is None or keys.stop == others.stop:
        return step
    later = others.stop - keys.stop
    return _replaced(step, step.value, range(keys.start + later, keys.stop + later))


def _replaced(step: Step, value: np.ndarray, keys: range | None) -> Step:
    new = Step(step.name, step.kind, value, keys)
    new.rounding = step.rounding
    return new
