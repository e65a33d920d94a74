"""Focus: the part of a step's value that the reader of a walk looks at, and the names of its rows and columns."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import numpy as np

from mistral_ref.cli.walker.selection import Index, as_index, in_words, parsed_index, parsed_selection
from mistral_ref.study import lens
from mistral_ref.study.stepper import Stepper

# The axes that "token" and "head" stand for: a step has at most one axis of each.
_FOCUS_AXES = {"token": ("token", "query"), "head": ("head", "kv_head")}
_LAST_OR_FIRST = {axis for axes in _FOCUS_AXES.values() for axis in axes}  # axes of which `selected` may take one index


class Selected(NamedTuple):
    """A part of a step's value.

    values      the numbers of the part
    axes        the axes that the part still has
    chosen      axis -> the index or slice that was chosen
    at          axis -> the indices of the part, counted in the whole value, for each axis in `axes`
    words       `chosen` in words, for a heading
    """

    values: np.ndarray
    axes: tuple[str, ...]
    chosen: dict[str, Index]
    at: dict[str, range]
    words: str


class Focus:
    """The part that the reader looks at. It is a part of the value of the step at which a Stepper stands.

    looked_at   "token" or "head" -> the index or range that the reader typed; it stays until it is changed
    start       the position of the first token of the pass
    pieces      the tokens of the pass, as pieces of text
    group       how many query heads read each key/value head
    """

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, self.model = stepper, stepper.model
        self.looked_at: dict[str, str] = {}
        self.start = 0 if stepper.cache is None else stepper.cache.length
        self.pieces = [self.model.piece(token) for token in stepper.tokens]
        self.group = self.model.config.n_heads // self.model.config.n_kv_heads

    def look_at(self, axis: str, text: str) -> None:
        """Look at a token or head, or a range of them, from now on; raise InputError if it does not exist."""
        parsed_index(text, axis, len(self.pieces) if axis == "token" else self.model.config.n_heads)
        self.looked_at[axis] = text

    def look_at_everything(self) -> None:
        """Look at all tokens and heads again."""
        self.looked_at.clear()

    def selection(self, text: str, *, is_focused: bool) -> dict[str, Index]:
        """Return the part of the present step that a text such as "head 3" chooses: axis -> index or slice.

        With `is_focused`, what the reader looks at is chosen too; where the text names the same axis, the text wins.
        """
        step = self.stepper.step
        axes, shape = step.axes, step.value.shape
        chosen: dict[str, Index] = {}
        for axis, index in self.looked_at.items() if is_focused else ():
            if any(name in axes for name in _FOCUS_AXES[axis]):
                chosen |= parsed_selection(f"{axis} {index}", axes, shape, self.group)
        return chosen | parsed_selection(text, axes, shape, self.group)

    def readers(self, chosen: dict[str, Index]) -> str:
        """Return the chosen key/value heads and the query heads that read them, in words; "" if none are chosen."""
        return f", that is {in_words('kv_head', chosen['kv_head'], self.group)}" if "kv_head" in chosen else ""

    def selected(self, text: str, most_axes: int, *, always: bool = False) -> Selected:
        """Return the part of the present value that the text and the focus choose together.

        The part may have more than `most_axes` axes. Then its token, query and head axes are reduced to one index, one
        axis after the other, until the part has few enough axes. The index is the last token or query, or head 0. An
        axis of which the text or the focus chose a range keeps this range. With `always` such an axis is reduced too,
        after all other axes: to the last token or query of the range, or to its first head.
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
        """Return the pieces along an axis of tokens or keys, else []. A key of an earlier pass is named @position."""
        keys = self.stepper.step.key_positions
        if axis == "key" and keys is not None:
            return [*(f"@{position}" for position in range(keys.start, self.start)), *self.pieces][-len(keys) :]
        return self.pieces if axis in ("token", "query") else []

    def names_along(self, axis: str) -> list[str]:
        """Return a name for each index of an axis: its piece, or its number if it has none.

        A piece that occurs more than once is followed by its position.
        """
        sizes = dict(zip(self.stepper.step.axes, self.stepper.step.value.shape, strict=True))
        pieces, times = self.pieces_along(axis), Counter(self.pieces_along(axis))
        first = self.start + len(self.pieces) - len(pieces)  # position of the first piece
        named = [piece if times[piece] == 1 else f"{piece} @{first + at}" for at, piece in enumerate(pieces)]
        return named or [str(number) for number in range(sizes[axis])]

    def visible_keys(self) -> np.ndarray:
        """Return an array with the shape of the present scores or weights: True where the query sees the key."""
        step = self.stepper.step
        return np.broadcast_to(lens.visible_keys(step, self.model.config), step.value.shape)
