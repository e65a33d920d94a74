"""Compare two passes: how far does each step lie from the same step of the other pass, and which step departs first?

A distance is measured in float32 ulps of the largest value of the step: max |a - b| / spacing(max |reference|).
spacing(x) is the gap between x and the next float32. One ulp is about one rounding, whether the values of the step are
large or small.

Two correct passes in float32 differ by a few ulps in the first steps. The distance grows from layer to layer, to some
hundreds of ulps in models with sharp attention (docs/architecture.md has measured figures). Most bugs make it jump to
tens of thousands of ulps or more. The default bound lies between the two.

Some bugs are as small as rounding: for example an epsilon of 1e-6 in place of 1e-5 in the last norm. The default bound
misses them. Two settings find smaller bugs: a lower bound, and `own`. With `own` each step starts from the same values
in both passes, so no distance comes from earlier steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import overload

import numpy as np

from mistral_ref.display import html_table, markdown_table
from mistral_ref.errors import InputError, short_repr
from mistral_ref.steps import LORA_A, LORA_B, Step
from mistral_ref.walk import Walk

DEFAULT_BOUND = 2000.0  # ulps, for the distance that all steps since the embedding have made together
OWN_BOUND = 200.0  # ulps, for the distance that one step adds


@dataclass(frozen=True)
class Difference:
    """How far one step lies from the same step of a reference.

    name            the step's name
    max_abs         the largest |a - b|; infinite if only one of the two is NaN, or if an infinity meets another value
    max_rel         the largest |a - b| / max(|a|, |b|); at most 2 if both are finite, whether they are large or small
    ulps            max_abs in float32 ulps of the reference's largest value
    worst           index of the largest difference; None if nothing differs
    first           index of the first element in memory order that differs by more than the bound; None if none does
    value, expected     the step's value and the reference's value at `worst`
    problem         why the values cannot be compared, for example different shapes; "" if they can be compared
    """

    name: str
    max_abs: float
    max_rel: float
    ulps: float
    worst: tuple[int, ...] | None
    first: tuple[int, ...] | None
    value: float
    expected: float
    problem: str = ""

    @property
    def departs(self) -> bool:
        """Whether an element differs by more than the bound, or the values cannot be compared."""
        return self.first is not None or bool(self.problem)


def difference(
    name: str, value: np.ndarray, reference: np.ndarray, bound: float, *, rounding: float = 0.0
) -> Difference:
    """Return the Difference of a step from its reference. Raises InputError if the shapes differ or the bound is < 0.

    bound       how many ulps an element may differ by
    rounding    how much more an element may differ by, as a share of its size: a value that was stored in 16 bits has
                lost up to 2^-11 (f16) or 2^-8 (bf16) of its size

    >>> d = difference("x", np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.5, 4.0]), bound=1000)
    >>> d.max_abs, d.max_rel, d.ulps, d.worst
    (0.5, 0.2, 1048576.0, (1,))
    """
    if not isinstance(bound, Real) or not bound >= 0:
        raise InputError(f"bound is {short_repr(bound)}; expected a number of at least 0")
    if value.shape != reference.shape:
        raise InputError(f"{name} has shape {value.shape} in one pass and {reference.shape} in the other")
    with np.errstate(invalid="ignore", over="ignore"):  # infinite values, and NaNs whose bits cause warnings
        ours, theirs = value.astype(np.float64), reference.astype(np.float64)
        distance = np.abs(ours - theirs)
    distance[(ours == theirs) | (np.isnan(ours) & np.isnan(theirs))] = 0.0
    distance[np.isnan(distance)] = np.inf
    if not distance.any():
        same = float(theirs.flat[0]) if theirs.size else np.nan
        return Difference(name, 0.0, 0.0, 0.0, None, None, same, same)
    at = int(distance.argmax())
    max_abs = float(distance.flat[at])
    with np.errstate(invalid="ignore"):
        relative = distance / np.maximum(np.abs(ours), np.abs(theirs))
    relative = np.where(distance == 0, 0.0, np.where(np.isfinite(distance), relative, np.inf))
    finite = np.abs(theirs[np.isfinite(theirs)])
    spacing = float(np.spacing(np.float32(min(finite.max(initial=0.0), 2.0**127))))  # 2^-149 to 2^104
    allowed = bound * spacing + rounding * np.abs(np.where(np.isfinite(theirs), theirs, 0.0))
    beyond = distance > allowed
    return Difference(
        name,
        max_abs,
        float(relative.max()),
        max_abs / spacing,
        _index(at, distance.shape),
        _index(int(beyond.argmax()), distance.shape) if beyond.any() else None,
        float(ours.flat[at]),
        float(theirs.flat[at]),
    )


def side_by_side(step: Step, reference: Step) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of two steps, laid out alike: keys matched by position, and the last token if one has no other.

    Two passes may see different keys, for example if one has a wrong window. A key that only one pass sees gets a
    score of -inf and a weight of 0 in the other pass. Shapes may still differ. Raises InputError if the last keys are
    at different positions.
    """
    value, expected = step.value, reference.value
    if step.name in ("norm", "logits") and 1 in (len(value), len(expected)):  # many engines keep only the last token
        value, expected = value[-1:], expected[-1:]
    keys, expected_keys = step.key_positions, reference.key_positions
    if keys is None or expected_keys is None or keys == expected_keys:
        return value, expected
    if keys.stop != expected_keys.stop:  # the last key belongs to the last query's own token
        ends = f"{keys.stop - 1} in one pass and {expected_keys.stop - 1} in the other"
        raise InputError(f"{step.name} ends at position {ends}; expected passes over the same positions")
    first = min(keys.start, expected_keys.start)
    unseen = 0.0 if step.name.endswith(".attention_weights") else -np.inf

    def laid_out(part: np.ndarray, seen: range) -> np.ndarray:
        return np.pad(part, [(0, 0), (0, 0), (seen.start - first, 0)], constant_values=unseen)

    return laid_out(value, keys), laid_out(expected, expected_keys)


def step_difference(step: Step, reference: Step, bound: float) -> Difference:
    """Return the Difference of a step from its reference. `side_by_side` matches their keys, and raises InputError."""
    value, expected = side_by_side(step, reference)
    if value.shape != expected.shape:
        order = ", the same axes in another order?" if sorted(value.shape) == sorted(expected.shape) else ""
        problem = f"shape {value.shape}, expected {expected.shape}{order}"
        return Difference(step.name, np.inf, np.inf, np.inf, None, None, np.nan, np.nan, problem)
    return difference(step.name, value, expected, bound, rounding=step.rounding + reference.rounding)


def _index(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(flat, shape))


@dataclass(frozen=True)
class Comparison(Sequence[Difference]):
    """The differences of all steps that two passes share, in the order of the pass.

    differences     one Difference for each shared step
    bound       a step departs if it lies more ulps than this from its reference
    unmatched   names of the steps that only one of the two passes holds
    own         whether both passes went on from the same values after each step; if so, each Difference holds only
                what its step adds
    fixed       with `own`: names of the steps that see different keys, so that their values could not be exchanged;
                the steps after such a step show its difference too
    rounding    how much more a value may differ by, as a share of its size, because a file stored it in 16 bits
    """

    differences: list[Difference]
    bound: float
    unmatched: Sequence[str] = ()
    own: bool = False
    fixed: Sequence[str] = ()
    rounding: float = 0.0

    @overload
    def __getitem__(self, index: int) -> Difference: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Difference]: ...
    def __getitem__(self, index: int | slice) -> Difference | Sequence[Difference]:
        return self.differences[index]

    def __len__(self) -> int:
        return len(self.differences)

    @property
    def departed(self) -> list[Difference]:
        """The differences of the steps that depart."""
        return [difference for difference in self if difference.departs]

    @property
    def first(self) -> Difference | None:
        """The difference of the first step that departs; None if no step departs."""
        return next(iter(self.departed), None)

    def furthest_by_layer(self) -> Comparison:
        """Return a shorter Comparison: the first step that departs, and the furthest step of each layer."""
        furthest: dict[str, Difference] = {}
        for difference in self:
            place = difference.name.rpartition(".")[0] or difference.name
            if place not in furthest or difference.ulps > furthest[place].ulps:
                furthest[place] = difference
        return replace(self, differences=[d for d in self if d is self.first or d in furthest.values()])

    def verdict(self) -> str:
        """Return the result of the comparison in one or two sentences."""
        n_steps = f"all {len(self)} steps" if len(self) > 1 else f"the one step, {self[0].name},"
        bound = f"{self.bound:g} ulps"
        bound += f" and the rounding to 16 bits, {self.rounding:.2g} of each value" if self.rounding else ""
        largest, first = max(self, key=lambda difference: difference.ulps), self.first
        if largest.ulps == 0:
            text = f"{n_steps} {'are' if len(self) > 1 else 'is'} equal"
        elif first is None:
            agree = "agree" if len(self) > 1 else "agrees"
            text = f"{n_steps} {agree} within {bound}; the furthest is {largest.name}, {largest.ulps:.3g} ulps"
        else:
            text = f"{len(self.departed)} of {len(self)} steps depart by more than {bound}; the first is {first.name}"
            text += (
                f": {first.problem}"
                if first.problem
                else (
                    f", from {list(first.first or ())} on: {first.ulps:.3g} ulps at {list(first.worst or ())}, "
                    f"{first.value:.6g} where {first.expected:.6g} was expected"
                )
            )
        if self.fixed:
            text += (
                f"\n{len(self.fixed)} steps see different keys, such as {self.fixed[0]}, and were not exchanged, so "
                "the steps after them show their differences too"
            )
        return text

    def rows(self) -> list[list[str]]:
        """Return one row of texts for each difference; HEADINGS are the headings of the columns."""
        return [
            [
                ("* " if difference.departs else "  ") + difference.name,
                f"{difference.max_abs:.3g}",
                f"{difference.max_rel:.3g}",
                f"{difference.ulps:.4g}",
                difference.problem or ("" if difference.worst is None else str(list(difference.worst))),
                "" if difference.first is None else str(list(difference.first)),
            ]
            for difference in self
        ]

    def __str__(self) -> str:
        return self.text()

    def text(self, *, every: bool = True, width: int | None = None) -> str:
        """Return the table and the verdict: a row for every step, or (`every=False`) as in `furthest_by_layer`.

        If the table needs more than `width` columns, it becomes a list.
        """
        rows = self.rows() if every else self.furthest_by_layer().rows()
        lines = [markdown_table(HEADINGS, rows, width), self.verdict()]
        if self.unmatched:
            few = ", ".join(self.unmatched[:3]) + (", ..." if len(self.unmatched) > 3 else "")
            lines.append(f"{len(self.unmatched)} more are in one of the two alone: {few}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html_table(HEADINGS, self.rows(), caption=self.verdict())


HEADINGS = ["step (* departs)", "max abs", "max rel", "ulps", "worst at", "first at"]


def compare_walks(
    walk: Walk,
    reference: Walk,
    *,
    bound: float | None = None,
    own: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Comparison:
    """Take two walks to their ends, side by side; return a Comparison of each step with the reference's step.

    Only the differences are kept, not the values of the steps, so they take little memory for models of any size.

    bound   in ulps; the default is 2000, or 200 with `own`
    own     at every step the reference takes over the value of `walk` and goes on from it. Each row then shows the
            distance that this one step adds, so every faulty step is found, not only the first. Steps that see
            different keys are not exchanged
    progress    called with the number of steps compared so far

    Steps of an adapter that only one of the walks has are `unmatched`. Raises InputError if the two walks do not yield
    the same steps otherwise, or if they cover different positions.
    """
    bound = (OWN_BOUND if own else DEFAULT_BOUND) if bound is None else bound
    differences, fixed = [], []
    unmatched: list[str] = []
    with walk, reference:
        for ours, theirs in _side_by_side(walk, reference, unmatched):
            differences.append(step_difference(ours, theirs, bound))
            if own and (ours.value.shape, ours.key_positions) == (theirs.value.shape, theirs.key_positions):
                theirs.value = ours.value.astype(theirs.value.dtype)
            elif own:
                fixed.append(ours.name)
            if progress:
                progress(len(differences))
    return Comparison(differences, bound, tuple(unmatched), own=own, fixed=tuple(fixed))


def _side_by_side(walk: Walk, reference: Walk, unmatched: list[str]) -> Iterator[tuple[Step, Step]]:
    """Yield the steps of two walks in pairs; add the names of an adapter's steps that only one has to `unmatched`."""
    ours, theirs = next(walk, None), next(reference, None)
    while ours is not None or theirs is not None:
        if ours is not None and theirs is not None and ours.name == theirs.name:
            yield ours, theirs
            ours, theirs = next(walk, None), next(reference, None)
        elif ours is not None and ours.name.endswith((LORA_A, LORA_B)):
            unmatched.append(ours.name)
            ours = next(walk, None)
        elif theirs is not None and theirs.name.endswith((LORA_A, LORA_B)):
            unmatched.append(theirs.name)
            theirs = next(reference, None)
        else:
            names = [step.name if step else "its end" for step in (ours, theirs)]
            raise InputError(f"one pass is at {names[0]}, the other at {names[1]}; expected the same steps")
