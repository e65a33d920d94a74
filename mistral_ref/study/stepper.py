"""Stepper: a place in a forward pass that moves both ways, and edits that stay while it does.

A pass is deterministic, so going back is starting again and walking to an earlier step. Nothing is kept but the step
that one stands at, whatever the size of the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np

from mistral_ref.cache import KVCache
from mistral_ref.compare import Comparison, compare_walks
from mistral_ref.errors import InputError, Progress, checked_int, printable, short_repr
from mistral_ref.model import Model, Prompt
from mistral_ref.steps import Step, step_names
from mistral_ref.trace import Trace
from mistral_ref.walk import Edit, Walk

# The steps that make up the residual stream: what it is, and what is added to it.
_STREAM = ("embedding", "attention_out", "residual_after_attention", "ffn_out", "residual_after_ffn")


class NamedEdit(NamedTuple):
    """A change of one step: its name, what it does in words, and the function that does it to a copy of the value."""

    step: str
    description: str
    function: Callable[[np.ndarray], np.ndarray]


class Stepper:
    """A place in the forward pass of some tokens.

    names       of all steps, in order
    index       where in them one stands
    step        the Step there, edits applied
    edits       the changes so far, in the order in which they were made
    rms         name -> root mean square of the residual stream and of what is added to it, on the way here

    With a cache the pass starts after the tokens in it; it never ends, so the cache stays as it is.
    """

    def __init__(self, model: Model, tokens: Prompt, cache: KVCache | None = None) -> None:
        self.model, self.cache = model, cache
        self.tokens = model.token_ids(tokens, cache)
        self.names = list(step_names(model.config))
        self.edits: list[NamedEdit] = []
        self.rms: dict[str, float] = {}
        self._walk: Walk | None = None
        self._taken = 0  # steps that the walk has given
        self.index = 0
        self.step: Step
        self.go(0)

    def go(self, index: int, progress: Progress | None = None) -> Step:
        """Move to a step by its index, forwards or backwards, and return it; `progress(done, total)` counts steps."""
        index = min(max(index, 0), len(self.names) - 1)
        if self._walk is None or index < self._taken - 1:
            self._walk, self._taken = self._new_walk(self.cache), 0
        try:
            while self._taken <= index:
                step = next(self._walk)
                self._taken += 1
                if step.name.rpartition(".")[2] in _STREAM:
                    self.rms[step.name] = step.statistics.rms
                if self._taken == index + 1:
                    self.step, self.index = step, index
                if progress:
                    progress(self._taken, index + 1)
        except BaseException:  # Ctrl-C in the middle of a step: this walk cannot go on, and one stands where one was
            self._walk = None
            raise
        return self.step

    def _new_walk(self, cache: KVCache | None, *, edited: bool = True) -> Walk:
        return self.model.steps(self.tokens, cache, edits=self._all_edits() if edited else {})

    def _all_edits(self) -> dict[str, Edit]:
        edits: dict[str, Edit] = {}
        for name, _, function in self.edits:
            edits[name] = _after(edits.get(name), function)
        return edits

    def find(self, text: str) -> int:
        """Return the index of a step: by its name, "layers.3.q"; by its short name, "q", in the layer where one stands;
        by a layer's number, which means the layer's first step; or by a glob, of which the next match counts.

        Raises InputError if there is none.
        """
        layer, _, _ = self.step.name.rpartition(".")
        for name in (text, f"{layer}.{text}", f"layers.{text}.attention_norm"):
            if name in self.names:
                return self.names.index(name)
        for index in (*range(self.index + 1, len(self.names)), *range(self.index + 1)):
            if fnmatchcase(self.names[index], text) or fnmatchcase(self.names[index], f"layers.*.{text}"):
                return index
        raise InputError(f"no step is called {short_repr(text)}; {self._hint(text)}")

    def _hint(self, text: str) -> str:
        """Return what may have been meant by a name that no step has."""
        last = self.model.config.n_layers - 1
        number = re.fullmatch(r"(?:layers\.)?(\d+)(?:\..*)?", text, re.ASCII | re.DOTALL)
        if number and (len(number[1]) > 9 or int(number[1]) > last):
            return f"there are layers 0 to {last}"
        known = list(dict.fromkeys([*(name.rpartition(".")[2] for name in self.names), *self.names]))
        if nearest := get_close_matches(text[:100], known, n=1):
            return f"did you mean {nearest[0]!r}?"
        return "names are like 'layers.0.q_rotated', 'q', or 'logits'"

    def edit(self, description: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change the value of the step that one stands at, and every time that one comes here again.

        `function` is given a copy of the value, and returns it changed. Raises InputError if the step cannot be edited.
        """
        self.step.value = function(self.step.value.copy())
        self.edits.append(NamedEdit(self.step.name, description, function))

    def undo(self) -> NamedEdit:
        """Take back the last edit and return it; raise InputError if there is none."""
        if not self.edits:
            raise InputError("nothing has been edited")
        undone = self.edits.pop()
        self._walk = None
        try:
            self.go(self.index)
        except BaseException:  # Ctrl-C: the value that one stands at is still the edited one
            self.edits.append(undone)
            raise
        return undone

    def logits(self, *, edited: bool = True) -> np.ndarray:
        """Return the logits (T, V) that the pass comes to, with the edits or without."""
        self._walk = None  # a cache serves one pass at a time
        with self._new_walk(self.cache, edited=edited) as walk:
            return next(step.value for step in walk if step.name == "logits")

    def continuation(self, n: int, *, edited: bool = True) -> Iterator[str]:
        """Yield the text of up to n tokens more, the likeliest each time, with the edits or without.

        Each pass takes the prompt and all tokens so far, with every edit made again, since an edit is of a whole pass.
        What it chose by number it chooses still; a function that does not fit a longer pass ends in InputError, as does
        a Stepper over a cache, whose pass cannot begin earlier.
        """
        n, config = checked_int("n", n, least=1), self.model.config
        if self.cache is not None:
            raise InputError("over a cache a pass cannot begin anew with the edits; walk through all tokens instead")
        tokens, stream = list(self.tokens), self.model.text_stream(self.tokens)
        edits = self._all_edits() if edited else {}
        for _ in range(n):
            if config.max_seq_len is not None and len(tokens) >= config.max_seq_len:
                break
            try:
                logits_V = self.model.forward(tokens, edits=edits, last_only=not edits)[-1]
            except (ValueError, IndexError) as error:  # InputError too, of a value with another shape than the step's
                if not edits:
                    raise
                lengths = f"{len(self.tokens)} tokens and do not fit {len(tokens)}"
                raise InputError(f"the edits were made for {lengths}: {printable(str(error))}") from None
            if np.isnan(logits_V).any():
                raise InputError("the logits hold NaN, so nothing is likeliest")
            tokens.append(int(logits_V.argmax()))
            if tokens[-1] in self.model.eos_ids:
                break
            has_text = stream is not None and tokens[-1] < stream.tokenizer.vocab_size
            yield stream.push(tokens[-1]) if stream and has_text else self.model.piece(tokens[-1])
        if stream and (rest := stream.flush()):
            yield rest

    def trace(self, keep: Sequence[str]) -> Trace:
        """Return a trace of the edited pass."""
        return self.model.trace(self.tokens, keep=keep, cache=self._copy_of_cache(), edits=self._all_edits())

    def compare(self) -> Comparison:
        """Return how far the edited pass departs from the one without edits, step by step."""
        edited, plain = self._new_walk(self._copy_of_cache()), self._new_walk(self._copy_of_cache(), edited=False)
        return compare_walks(edited, plain)

    def _copy_of_cache(self) -> KVCache | None:
        return None if self.cache is None else self.cache.copy()  # a pass that ends counts


def _after(first: Edit | None, then: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Return the edit that makes two, one after the other, each on a copy of the value."""

    def both(value: np.ndarray) -> np.ndarray:
        return then((first(value) if callable(first) else value).copy())

    return both
