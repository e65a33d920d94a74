"""Places of a step's value, and the edits that give each branch of a pass other values at its own place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mistral_ref.study.patching.branches import BranchedPass

ArrayEdit = Callable[[np.ndarray], np.ndarray]


class Place(NamedTuple):
    """A part of a step's value: the numbers of one token and one head. None: those of all.

    A branch begins at its place's token, so that token is the branch's first; or its only one, in the last layer, where
    most steps have only the last token of each branch.
    """

    token: int | None
    head: int | None

    @property
    def rows(self) -> slice:
        """Which tokens of the branch change."""
        return slice(None) if self.token is None else slice(0, 1)

    @property
    def heads(self) -> slice:
        """Which heads change."""
        return slice(None) if self.head is None else slice(self.head, self.head + 1)


def of_tokens(places: Sequence[Place], branched: BranchedPass, new: np.ndarray) -> ArrayEdit:
    """Return the edit for a step (T, ...): each branch gets the numbers of `new` at its place."""

    def change(value: np.ndarray) -> np.ndarray:
        value = value.copy()
        for place, part in zip(places, _parts(value, branched), strict=True):
            index = (place.rows, place.heads)[: value.ndim - 1]
            part[index] = new[len(new) - len(part) :][index]
        return value

    return change


def of_queries(places: Sequence[Place], new: np.ndarray) -> ArrayEdit:
    """Return the edit for scores or attention weights (H, T, S): each branch gets the numbers of `new` at its place.

    Attention is computed for one branch after the other, so the edit is called once for each.
    """
    left = iter(places)

    def change(value: np.ndarray) -> np.ndarray:
        place, value = next(left), value.copy()
        _, n_queries, n_keys = value.shape  # the last ones of the text
        index = (place.heads, place.rows)
        value[index] = new[:, new.shape[1] - n_queries :, new.shape[2] - n_keys :][index]
        return value

    return change


def zeros_of_pairs(name: str, places: Sequence[Place], branched: BranchedPass) -> list[tuple[str, ArrayEdit]]:
    """Return the edits that set a step of experts (N, ...) to zero, in the rows of each branch's place.

    Which rows these are follows from the experts that the branch's tokens are sent to, so that step is looked at too.
    """
    sent: dict[str, np.ndarray] = {}

    def look(weights_TE: np.ndarray) -> np.ndarray:
        is_changed_T = np.zeros(len(weights_TE), bool)
        for place, part in zip(places, _parts(is_changed_T, branched), strict=True):
            part[place.rows] = True
        sent["is_changed_N"] = is_changed_T[np.nonzero(weights_TE)[0]]
        return weights_TE

    def change(value: np.ndarray) -> np.ndarray:
        return np.where(sent["is_changed_N"][:, np.newaxis], value.dtype.type(0), value)

    return [(f"{name.rpartition('.')[0]}.expert_weights", look), (name, change)]


def _parts(value: np.ndarray, branched: BranchedPass) -> list[np.ndarray]:
    """Return the rows of each branch, as views."""
    if len(value) == len(branched.positions):
        return [value[rows] for rows in branched.rows]
    return [value[number : number + 1] for number in range(len(branched.rows))]
