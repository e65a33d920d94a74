"""Walk: a forward pass, taken step by step, to look at steps and to change them. Edits change steps without a loop."""

from __future__ import annotations

import linecache
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from types import GeneratorType, TracebackType

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError, short_repr
from mistral_ref.ops import AnyPass, Ops, Rows
from mistral_ref.steps import Step, Steps, step_names

Edit = np.ndarray | Callable[[np.ndarray], np.ndarray]
Edits = Mapping[str, Edit] | Sequence[tuple[str, Edit]]  # names of steps, or globs, and what is done to their values

_PACKAGE_PARENT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Walk(Iterator[Step]):
    """A forward pass that waits at every step. `model.steps(...)` makes it; iterate over it.

        for step in model.steps("Hello"):
            if step.name == "layers.2.ffn_out":
                step.value = np.zeros_like(step.value)

    Values are read-only and stay valid after the walk has gone on. To change the pass, assign to `step.value` before
    you take the next step. `edits` are pairs of a name or glob and a value or function; all that match a step are
    applied, in their order, before you get it. If you leave a walk before its end, its cache stays as it was.
    """

    def __init__(self, steps: Steps, ops: Ops, edits: Sequence[tuple[str, Edit]], this_pass: AnyPass) -> None:
        self._steps = steps
        self._ops = ops
        self._edits = edits
        self._pass = this_pass
        self._current: Step | None = None
        self._logits: np.ndarray | None = None

    def __next__(self) -> Step:
        try:
            with self._ops.running():
                if self._current is None:
                    step = next(self._steps)
                else:
                    self._current.is_past = True
                    step = self._steps.send(self._current.value)
        except StopIteration as end:
            if end.value is not None:
                self._logits = end.value
            raise StopIteration from None
        step.value.flags.writeable = False
        step.source = step.source or source_of(self._steps)
        if self._edits:
            make_edits(step, self._edits, self._pass.positions, self._pass.last)
        self._current = step
        return step

    @property
    def logits(self) -> np.ndarray:
        """The logits (T, V), the result of the pass. Raises InputError before every step has been taken."""
        if self._logits is None:
            raise InputError("this walk has not reached its end, so it has no logits; take every step first")
        return self._logits

    def finish(self) -> np.ndarray:
        """Take all steps that are left and return the logits (T, V)."""
        for _ in self:
            pass
        return self.logits

    def close(self) -> None:
        """End the walk here. If steps are left, the cache stays as it was."""
        self._steps.close()

    def __enter__(self) -> Walk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class PositionedEdit:
    """An edit that counts tokens, so that it has to know where those of a pass stand: over a cache, not from 0 on."""

    def __call__(self, value: np.ndarray) -> np.ndarray:
        """Return the new value in a pass that begins at position 0."""
        raise NotImplementedError

    def at(self, value: np.ndarray, positions_T: np.ndarray, first_key: int) -> np.ndarray:
        """Return the new value in a pass of tokens at these positions; the first key of scores is at `first_key`."""
        raise NotImplementedError


def make_edits(step: Step, edits: Iterable[tuple[str, Edit]], positions_T: np.ndarray, last: Rows) -> None:
    """Give a step the value that edits make of it; only those whose name or glob matches count.

    positions_T     the positions of the pass's tokens; a step of the last layer may have only those in `last`
    """
    for pattern, edit in edits:
        if not fnmatchcase(step.name, pattern):
            continue
        if not isinstance(edit, PositionedEdit):
            step.value = edit(step.value) if callable(edit) else edit
        elif step.key_positions is not None:  # scores of one sequence, also in a pass of several
            first, stop = step.key_positions.start, step.key_positions.stop
            step.value = edit.at(step.value, np.arange(stop - step.value.shape[1], stop), first)
        else:
            is_whole = "pair" in step.axes or len(step.value) == len(positions_T)
            step.value = edit.at(step.value, positions_T if is_whole else positions_T[last], 0)


def source_of(steps: object) -> str:
    """Return "file:line" of the `yield` at which the innermost generator waits."""
    while isinstance(steps, GeneratorType) and isinstance(steps.gi_yieldfrom, GeneratorType):
        steps = steps.gi_yieldfrom
    frame = steps.gi_frame if isinstance(steps, GeneratorType) else None
    return f"{_relative(frame.f_code.co_filename)}:{frame.f_lineno}" if frame else ""


@cache
def _relative(file: str) -> str:
    return os.path.relpath(file, _PACKAGE_PARENT)


def source_lines(source: str, before: int = 0, after: int = 0) -> list[tuple[int, str]]:
    """Return numbers and texts of the lines of code around a step's `source`; [] if it is "" or the file is missing."""
    file, _, line = source.rpartition(":")
    numbers = range(max(int(line) - before, 1), int(line) + after + 1) if file else ()
    lines = ((number, linecache.getline(os.path.join(_PACKAGE_PARENT, file), number)) for number in numbers)
    return [(number, text.rstrip()) for number, text in lines if text]


def matching_steps(patterns: str | Iterable[str], config: ModelConfig) -> list[str]:
    """Return the names of the steps that match a pattern, or one of several patterns, in the order of the pass.

    A pattern is a name or a glob like "layers.*.ffn_out". Raises InputError if a pattern matches no step.
    """
    if not isinstance(patterns, Iterable):
        raise InputError(f"{short_repr(patterns)} names no steps; expected names or globs like 'layers.*.ffn_out'")
    names, chosen = list(step_names(config)), set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = [name for name in names if fnmatchcase(name, str(pattern))]
        if not matches:
            raise InputError(
                f"no step is called {short_repr(pattern)}; expected a name like 'layers.0.q_rotated' or 'logits'"
            )
        chosen.update(matches)
    return [name for name in names if name in chosen]


def inside_attention(names: Iterable[str]) -> bool:
    """Return whether a name is that of scores or attention_weights. These steps exist only if attention is observed."""
    return any(name.endswith((".scores", ".attention_weights")) for name in names)


def checked_edits(edits: Edits | None, config: ModelConfig) -> tuple[list[tuple[str, Edit]], list[str]]:
    """Return edits as a list of pairs, and the names of the steps that they change.

    Raises InputError for something else than edits, or if a name matches no step.
    """
    pairs = edits.items() if isinstance(edits, Mapping) else () if edits is None else edits
    try:
        checked = [(pattern, edit) for pattern, edit in pairs]
    except (TypeError, ValueError):
        expected = "a mapping from names of steps to values or functions, or a list of such pairs"
        raise InputError(f"edits is {short_repr(edits)}; expected {expected}") from None
    return checked, matching_steps([pattern for pattern, _ in checked], config)
