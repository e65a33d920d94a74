"""Two passes side by side: how far each step of one lies from the same step of the other, and which departs first.

Distances are in float32 ulps of the step's largest value: max |a - b| / spacing(max |reference|), where spacing(x) is
the gap between x and the next float32. One ulp is one rounding, whatever the scale of the step. What separates two
correct passes in float32 is a few ulps in the first steps and grows from layer to layer, to some hundreds for models
with sharp attention (docs/architecture.md has measured figures); most bugs are a jump to tens of thousands and more.
The default bound lies between. What is as small as rounding escapes it, an epsilon of 1e-6 for 1e-5 in the last norm
for one; a lower bound, or `own`, which takes away what has come together before, finds smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import overload

import numpy as np

from mistral_ref.display import html_table, markdown_table
from mistral_ref.errors import InputError, short_repr
from mistral_ref.steps import Step
from mistral_ref.walk import Walk

DEFAULT_BOUND = 2000.0  # ulps, for what has come together since the embedding
OWN_BOUND = 200.0  # and for what one step adds by itself


@dataclass(frozen=True)
class Difference:
    """How far one step lies from the same step of a reference.

    max_abs         the largest |a - b|; infinite where only one is NaN, or where an infinity meets anything else
    max_rel         the largest |a - b| / max(|a|, |b|), 2 at most if both are finite; small values count as large ones
    ulps            max_abs in float32 ulps of the reference's largest value
    worst           index of the largest difference; None where nothing differs
    first           index of the first element, in the order in which they lie, that differs by more than the bound
    value, expected     the two values at `worst`
    problem         why the values cannot be compared, such as unlike shapes; "" where they can
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
        """Whether an element differs by more than the bound, or none can be compared."""
        return self.first is not None or bool(self.problem)


def difference(
    name: str, value: np.ndarray, reference: np.ndarray, bound: float, *, rounding: float = 0.0
) -> Difference:
    """Return the Difference of a step from its reference; InputError if shapes differ or the bound is none.

    rounding    what each element may differ by besides the bound, as a part of its size: values that were stored in 16
                bits have lost 2^-11 (f16) or 2^-8 (bf16) of it

    >>> d = difference("x", np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.5, 4.0]), bound=1000)
    >>> d.max_abs, d.max_rel, d.ulps, d.worst
    (0.5, 0.2, 1048576.0, (1,))
    """
    if not bound >= 0:
        raise InputError(f"bound is {short_repr(bound)}; expected a number of at least 0")
    if value.shape != reference.shape:
        raise InputError(f"{name} has shape {value.shape} in one and {reference.shape} in the other")
    with np.errstate(invalid="ignore", over="ignore"):  # infinities; NaN with bits that processors warn of
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


def step_difference(step: Step, reference: Step, bound: float) -> Difference:
    """Return the Difference of a step from its reference, scores and attention weights laid side by side by position.

    Two passes may see different keys, as when one has a wrong window: a key that only one of them sees has a score of
    -inf and a weight of 0 in the other.
    """
    value, expected = step.value, reference.value
    if step.name in ("norm", "logits") and 1 in (len(value), len(expected)):  # many engines keep the last token's alone
        value, expected = value[-1:], expected[-1:]
    keys, expected_keys = step.key_positions, reference.key_positions
    if keys is not None and expected_keys is not None and keys != expected_keys:
        if keys.stop != expected_keys.stop:  # the last one is the last query's own
            ends = f"{keys.stop - 1} in one and {expected_keys.stop - 1} in the other"
            raise InputError(f"{step.name} ends at position {ends}; expected passes of the same positions")
        first = min(keys.start, expected_keys.start)
        unseen = 0.0 if step.name.endswith(".attention_weights") else -np.inf

        def laid_out(part: np.ndarray, seen: range) -> np.ndarray:
            return np.pad(part, [(0, 0), (0, 0), (seen.start - first, 0)], constant_values=unseen)

        value, expected = laid_out(value, keys), laid_out(expected, expected_keys)
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

    bound       how many ulps a step may lie from its reference before it counts as departed
    unmatched   names of steps that only one of the two holds
    own         whether both passes went on from the same values at each step, so that each shows what it adds itself
    fixed       with `own`: the steps that could only be looked at, so that what follows them shows their difference too
    rounding    the part of its size by which a value may differ besides, since a file held it in 16 bits
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
        """The differences beyond the bound."""
        return [difference for difference in self if difference.departs]

    @property
    def first(self) -> Difference | None:
        """The first step that departs; None where none does."""
        return next(iter(self.departed), None)

    def furthest_by_layer(self) -> Comparison:
        """Return a shorter one: the first step that departs, and of each layer the step that is furthest."""
        furthest: dict[str, Difference] = {}
        for difference in self:
            place = difference.name.rpartition(".")[0] or difference.name
            if place not in furthest or difference.ulps > furthest[place].ulps:
                furthest[place] = difference
        return replace(self, differences=[d for d in self if d is self.first or d in furthest.values()])

    def verdict(self) -> str:
        """Return in a sentence or two what the comparison came to."""
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
                f"\n{len(self.fixed)} steps could only be looked at, such as {self.fixed[0]}, so those after them show "
                "their differences too; backend='numpy' can be entered everywhere"
            )
        return text

    def rows(self) -> list[list[str]]:
        """Return the rows of a table under HEADINGS."""
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

    def text(self, *, every: bool = True) -> str:
        """Return table and verdict: a row for every step, or for the furthest of each layer."""
        rows = self.rows() if every else self.furthest_by_layer().rows()
        lines = [markdown_table(HEADINGS, rows), self.verdict()]
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
    """Take two walks to their end, side by side, and return how far each step lies from the reference's.

    Nothing is kept but the differences, so that any two models can be compared.

    own     at every step the reference goes on from the other's value, so that each row shows what that step adds by
            itself, and every faulty step is found, not the first alone. Steps that can only be looked at, or that see
            other keys, are left out of the exchange
    bound   in ulps; by default 2000, or 200 with `own`
    progress    called with the number of steps compared so far

    Raises InputError if the two do not yield the same steps, or are of different positions.
    """
    bound = (OWN_BOUND if own else DEFAULT_BOUND) if bound is None else bound
    differences, fixed = [], []
    with walk, reference:
        for ours, theirs in zip_longest(walk, reference):
            if ours is None or theirs is None or ours.name != theirs.name:
                names = [step.name if step else "its end" for step in (ours, theirs)]
                raise InputError(f"one pass is at {names[0]}, the other at {names[1]}; expected the same steps")
            differences.append(step_difference(ours, theirs, bound))
            if own and _can_be_exchanged(ours, theirs):
                theirs.value = ours.value.astype(theirs.value.dtype)
            elif own:
                fixed.append(ours.name)
            if progress:
                progress(len(differences))
    return Comparison(differences, bound, own=own, fixed=tuple(fixed))


def _can_be_exchanged(step: Step, reference: Step) -> bool:
    is_fixed = step.fixed_by is not None or reference.fixed_by is not None
    is_alike = step.value.shape == reference.value.shape and step.key_positions == reference.key_positions
    return is_alike and not is_fixed
