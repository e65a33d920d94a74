"""The changes of steps. A change is plain data: its fields say everything about it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError, checked_float, checked_int, escaped, short_repr
from mistral_ref.reference_ops import attends
from mistral_ref.steps import axis_sizes
from mistral_ref.walk import PositionedEdit, inside_attention, matching_steps

# Which part of a step's value changes: for each axis a number, a slice from the beginning, or two tokens.
Index = tuple[int | slice | list[int], ...]
OF_TOKENS = ("token", "query", "key")
_MOST = 2**31  # tokens, heads and neurons are fewer
LARGEST = 1e30  # as in configurations; float32 holds it


@dataclass(frozen=True)
class Change:
    """What all changes have in common. `str(change)` says in words what it does.

    on      False: it is kept, and not made
    kind    its name in plain data
    """

    on: bool = field(default=True, kw_only=True)
    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if not isinstance(self.on, bool):
            raise InputError(f"on is {short_repr(self.on)}; expected True or False")

    def to_dict(self) -> dict[str, Any]:
        """Return the change as a dict that JSON can hold. Fields that have their default are left out."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}
        return {"kind": self.kind} | {key: list(x) if isinstance(x, tuple) else x for key, x in found.items()}

    def _keep(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)


@dataclass(frozen=True)
class StepChange(Change):
    """A change of a step's value, or of a part of it.

    step    the step's name, or a glob like "layers.*.heads", which means each step that matches
    token   which token's numbers change; of scores and attention weights, which query's. None: those of all tokens,
            also of tokens that come later in a longer pass
    head    which head's; the steps k, v and k_rotated have key/value heads. None: those of all heads
    neuron  which index of the last axis; of scores and attention weights, which key. None: all

    Numbers below 0 count from the end. So token -1 is the last one of the prompt, also in a longer pass. Of scores and
    attention weights only those of keys that the query sees change. So what it does not see cannot reach it.
    """

    step: str
    token: int | None = field(default=None, kw_only=True)
    head: int | None = field(default=None, kw_only=True)
    neuron: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.step, str):
            raise InputError(f"step is {short_repr(self.step)}; expected the name of a step, or a glob")
        for name in ("token", "head", "neuron"):
            if (number := getattr(self, name)) is not None:
                self._keep(name, checked_int(name, number, -_MOST, _MOST))

    def places(self, config: ModelConfig, n_tokens: int) -> dict[str, Index]:
        """Return the names of the steps that change, each with the index of the part that changes.

        n_tokens    the number of tokens in the pass, which begins at position 0

        Raises InputError if there is no such step, or no such token, head or neuron in it.
        """
        return {
            name: self._place(name, axis_sizes(config, name, n_tokens)) for name in matching_steps(self.step, config)
        }

    def _place(self, name: str, sizes: dict[str, int]) -> Index:
        whole = [self._whole(axis, size) for axis, size in sizes.items()]
        place: dict[str, int | slice | list[int]] = dict(zip(sizes, whole, strict=True))
        last = list(sizes)[-1]
        for word, axes in (("token", ("token", "query")), ("head", ("head", "kv_head")), ("neuron", (last,))):
            number, axis = getattr(self, word), next((axis for axis in axes if axis in sizes), None)
            if number is not None and axis is None:
                raise InputError(f"{name} has no axis of {word}s; it has {', '.join(sizes)}")
            if number is not None and axis is not None:
                place[axis] = _resolved(f"{word} of {name}", number, sizes[axis])
        return tuple(place.values())

    def _whole(self, axis: str, size: int) -> slice:
        return slice(None)

    def changed(self, part: np.ndarray, other: np.ndarray) -> np.ndarray | float:
        """Return what a part of a value becomes; `other` is the part from which a change takes numbers, if it does."""
        raise NotImplementedError

    def statement(self, index: Index) -> str:
        """Return the line of Python that changes this part, of the names `value` and `kept`."""
        raise NotImplementedError

    def seen_statements(self, index: Index, window: int | None) -> list[str]:
        """Return the lines of Python that find the `seen` scores of a layer with this window, of `query` and `key`."""
        return [f"seen = attends(query, key, window={window})"]

    @property
    def _words(self) -> str:
        last = "key" if inside_attention([f".{self.step}"]) else "neuron"
        parts = ((last, self.neuron), ("head", self.head), ("token", self.token))
        return " of ".join([*(f"{word} {number}" for word, number in parts if number is not None), escaped(self.step)])


def _resolved(name: str, number: int, size: int) -> int:
    return checked_int(name, number, -size, size - 1) % size


@dataclass(frozen=True)
class ChangedStep(PositionedEdit):
    """The edit that makes a change of one step.

    axes    the step's axes
    index   the part that changes, counted in a pass that begins at position 0
    kept    the step's value in the other pass, or one token's numbers, which stand for those of each; None without
    window  of the layer, for scores and attention weights
    """

    change: StepChange
    axes: tuple[str, ...]
    index: Index
    kept: np.ndarray | None
    window: int | None

    def __call__(self, value: np.ndarray) -> np.ndarray:
        """Return the new value in a pass that begins at position 0."""
        return self.at(value, np.arange(value.shape[1 if "query" in self.axes else 0]), 0)

    def at(self, value: np.ndarray, positions_T: np.ndarray, first_key: int) -> np.ndarray:
        """Return the new value in a pass of tokens at these positions. Tokens that are not in it do not change."""
        here, there = [], []  # for each axis the indices of the part, and of that from which numbers are taken
        for axis, size, part in zip(self.axes, value.shape, self.index, strict=True):
            positions = np.arange(size)
            if axis in OF_TOKENS:
                positions = np.arange(first_key, first_key + size) if axis == "key" else positions_T
            if isinstance(part, list):
                first, second = (_indices(positions, one) for one in part)
                if len(first) != len(second):
                    raise InputError(f"{self.change}: this pass has one of the two tokens; expected both, or none")
                here.append(np.concatenate([first, second]))
                there.append(np.concatenate([second, first]))
            else:
                here.append(_indices(positions, part))
                there.append(here[-1] if self.kept is None else positions[here[-1]] % self.kept.shape[len(there)])
        value, chosen, taken = value.copy(), np.ix_(*here), np.ix_(*there)
        source = value if self.kept is None else self.kept
        with np.errstate(all="ignore"):  # as in the pass itself
            changed = self.change.changed(value[chosen], source[taken])
        if "query" in self.axes:
            keys_S = np.arange(first_key, first_key + value.shape[-1])
            seen_HTS = np.broadcast_to(attends(positions_T[:, np.newaxis], keys_S, self.window), value.shape)
            both = seen_HTS[chosen] & (seen_HTS[taken] if self.kept is None else True)
            changed = np.where(both, changed, value[chosen])
        value[chosen] = changed
        return value


def _indices(positions: np.ndarray, part: int | slice) -> np.ndarray:
    """Return where a number, or the numbers below the end of a slice, are among some positions.

    >>> _indices(np.arange(5, 9), 7), _indices(np.arange(5, 9), slice(None, 7))
    (array([2]), array([0, 1]))
    """
    if isinstance(part, int):
        return np.flatnonzero(positions == part)
    return np.flatnonzero(positions < (np.inf if part.stop is None else part.stop))


def index_text(index: Index) -> str:
    """Return an index as Python writes it between brackets; axes at the end that are whole are left out.

    >>> index_text((slice(None), 3, slice(None))), index_text((slice(None, 7), [1, 4])), index_text((slice(None),))
    (':, 3', ':7, [1, 4]', '...')
    """
    texts = [(f":{i.stop}" if i.stop is not None else ":") if isinstance(i, slice) else str(i) for i in index]
    while texts and texts[-1] == ":":
        texts.pop()
    return ", ".join(texts) or "..."


@dataclass(frozen=True)
class _Arithmetic(StepChange):
    """A change by a number."""

    sign: ClassVar[str]
    words: ClassVar[str]  # what it does, of {place} and {number}

    @property
    def _number(self) -> float:
        raise NotImplementedError

    def changed(self, part: np.ndarray, other: np.ndarray) -> np.ndarray | float:
        """Return the number, or the part multiplied by it, or added to it."""
        if self.sign == "=":
            return self._number
        return part * self._number if self.sign == "*=" else part + self._number

    def statement(self, index: Index) -> str:
        """Return the same in Python."""
        return f"value[{index_text(index)}] {self.sign} {self._number}"

    def __str__(self) -> str:
        return self.words.format(place=self._words, number=f"{self._number:g}")


@dataclass(frozen=True)
class Zero(_Arithmetic):
    """Set numbers to 0."""

    kind, sign, words = "zero", "=", "set {place} to 0"
    _number = 0


@dataclass(frozen=True)
class _WithNumber(_Arithmetic):
    number: float

    def __post_init__(self) -> None:
        super().__post_init__()
        self._keep("number", checked_float("number", self.number, -LARGEST, LARGEST))

    @property
    def _number(self) -> float:
        return self.number


@dataclass(frozen=True)
class Scale(_WithNumber):
    """Multiply by a number."""

    kind, sign, words = "scale", "*=", "multiply {place} by {number}"


@dataclass(frozen=True)
class Set(_WithNumber):
    """Set to a number."""

    kind, sign, words = "set", "=", "set {place} to {number}"


@dataclass(frozen=True)
class Add(_WithNumber):
    """Add a number."""

    kind, sign, words = "add", "+=", "add {number} to {place}"


@dataclass(frozen=True)
class Swap(StepChange):
    """Exchange the numbers of a token with those of another token of the same pass.

    other   the other token
    """

    other: int
    kind: ClassVar[str] = "swap"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token is None:
            raise InputError("token is None; expected the number of a token, which changes places with the other")
        self._keep("other", checked_int("other", self.other, -_MOST, _MOST))

    def _place(self, name: str, sizes: dict[str, int]) -> Index:
        place = super()._place(name, sizes)
        at = next(at for at, axis in enumerate(sizes) if axis in ("token", "query"))
        token, other = place[at], _resolved(f"other token of {name}", self.other, list(sizes.values())[at])
        assert isinstance(token, int)
        return (*place[:at], [token, other], *place[at + 1 :])

    def changed(self, part: np.ndarray, other: np.ndarray) -> np.ndarray | float:
        """Return the part with its two tokens in the other order."""
        return other

    def statement(self, index: Index) -> str:
        """Return the same in Python."""
        return f"value[{index_text(index)}] = value[{index_text(_turned(index))}]"

    def seen_statements(self, index: Index, window: int | None) -> list[str]:
        """Return the same in Python; two queries exchange the scores of keys that both of them see."""
        tokens = index[1]
        assert isinstance(tokens, list)
        return [*super().seen_statements(index, window), f"seen[{tokens}] &= seen[{tokens[::-1]}]"]

    def __str__(self) -> str:
        return f"exchange {self._words} with that of token {self.other}"


def window_of(config: ModelConfig, name: str) -> int | None:
    """Return the window of the layer whose scores or attention weights a step holds; None for any other step."""
    return config.sliding_window[int(name.split(".")[1])] if inside_attention([name]) else None


def _turned(index: Index) -> Index:
    return tuple(part[::-1] if isinstance(part, list) else part for part in index)
