"""Focus: the part of a step's value that a reader of a walk looks at, and what its rows and columns are called."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from mistral_ref.cli.walker.selection import Index, as_index, in_words, parsed_index, parsed_selection
from mistral_ref.study import lens
from mistral_ref.study.stepper import Stepper

# What a reader means by a token or a head: the axes of these names.
_FOCUS_AXES = {"token": ("token", "query"), "head": ("head", "kv_head")}
_LAST_OR_FIRST = {axis for axes in _FOCUS_AXES.values() for axis in axes}  # what is taken where nothing was said


class Selected(NamedTuple):
    """A part of a step's value: the axes that it still has, what was chosen of which, and that in words.

    at      for each axis the numbers, in the whole value, of what is left
    """

    values: np.ndarray
    axes: tuple[str, ...]
    chosen: dict[str, Index]
    at: dict[str, range]
    words: str


class Focus:
    """The part that a reader looks at. It is a part of the value of the step where a Stepper stands.

    looked_at   axis, "token" or "head" -> index or range, as typed: what the reader looks at from now on
    start       position of the pass's first token
    pieces      the pass's tokens, as pieces of text
    group       how many query heads read each key/value head
    """

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, self.model = stepper, stepper.model
        self.looked_at: dict[str, str] = {}
        self.start = 0 if stepper.cache is None else stepper.cache.length
        self.pieces = [self.model.piece(token) for token in stepper.tokens]
        self.group = self.model.config.n_heads // self.model.config.n_kv_heads

    def look_at(self, axis: str, text: str) -> None:
        """Look at a token or head, or a range of them, from now on; raise InputError if there is none."""
        parsed_index(text, axis, len(self.pieces) if axis == "token" else self.model.config.n_heads)
        self.looked_at[axis] = text

    def look_at_everything(self) -> None:
        """Look at all tokens and heads again."""
        self.looked_at.clear()

    def selection(self, text: str, *, is_focused: bool) -> dict[str, Index]:
        """Return what words choose of the present step; with `is_focused`, after what the reader looks at."""
        step = self.stepper.step
        axes, shape = step.axes, step.value.shape
        chosen: dict[str, Index] = {}
        for axis, index in self.looked_at.items() if is_focused else ():
            if any(name in axes for name in _FOCUS_AXES[axis]):
                chosen |= parsed_selection(f"{axis} {index}", axes, shape, self.group)
        return chosen | parsed_selection(text, axes, shape, self.group)

    def readers(self, chosen: dict[str, Index]) -> str:
        """Return which key/value heads were chosen, and by which query heads they are read; "" if none were."""
        return f", that is {in_words('kv_head', chosen['kv_head'], self.group)}" if "kv_head" in chosen else ""

    def selected(self, text: str, most_axes: int, *, always: bool = False) -> Selected:
        """Return the part of the present value that words choose, after what the reader looks at.

        Where more than `most_axes` axes are left, those that nothing was said of are taken one after the other: the
        last token or query, or head 0. With `always` a chosen range is taken as well: its last token or query, or its
        first head.
        """
        step = self.stepper.step
        chosen = self.selection(text, is_focused=True)
        left: dict[str, range] = {}
        for axis, size in zip(step.axes, step.value.shape, strict=True):
            index = chosen.get(axis, slice(None))
            if isinstance(index, slice):
                left[axis] = range(size)[index]
        for axis in sorted(_LAST_OR_FIRST & left.keys(), key=lambda axis: (axis in chosen, step.axes.index(axis))):
            if len(left) > most_axes and (always or axis not in chosen):
                chosen[axis] = left.pop(axis)[0 if axis in _FOCUS_AXES["head"] else -1]
        words = "".join(f"{in_words(axis, index, self.group)}, " for axis, index in chosen.items())
        return Selected(step.value[as_index(chosen, step.axes)], tuple(left), chosen, left, words)

    def pieces_along(self, axis: str) -> list[str]:
        """Return the pieces along an axis of tokens or keys; of keys before this pass only the position is known."""
        keys = self.stepper.step.key_positions
        if axis == "key" and keys is not None:
            return [*(f"@{position}" for position in range(keys.start, self.start)), *self.pieces][-len(keys) :]
        return self.pieces if axis in ("token", "query") else []

    def names_along(self, axis: str) -> list[str]:
        """Return what each index of an axis is called: its piece (with its position where pieces repeat) or number."""
        sizes = dict(zip(self.stepper.step.axes, self.stepper.step.value.shape, strict=True))
        pieces, times = self.pieces_along(axis), Counter(self.pieces_along(axis))
        first = self.start + len(self.pieces) - len(pieces)  # position of the first
        named = [piece if times[piece] == 1 else f"{piece} @{first + at}" for at, piece in enumerate(pieces)]
        return named or [str(number) for number in range(sizes[axis])]

    def visible_keys(self) -> np.ndarray:
        """Return which keys each query of the present scores or weights sees, in the value's shape."""
        step = self.stepper.step
        return np.broadcast_to(lens.visible_keys(step, self.model.config), step.value.shape)
