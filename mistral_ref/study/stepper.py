"""Stepper: a place in a forward pass. It moves forwards and backwards, and keeps the edits made on the way.

A pass is deterministic. So to go back, the Stepper starts the pass again and walks to the earlier step. It keeps only
the step at which it stands, so it needs little memory even for a large model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import NamedTuple

import numpy as np

from mistral_ref.cache import KVCache
from mistral_ref.compare import Comparison, compare_walks
from mistral_ref.errors import InputError, Progress, checked_int, did_you_mean, printable, short_repr
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.steps import Step, step_names
from mistral_ref.trace import Trace
from mistral_ref.walk import Edit, Walk

# The steps of the residual stream, and the steps that are added to it.
_STREAM = ("embedding", "attention_out", "residual_after_attention", "ffn_out", "residual_after_ffn")


class NamedEdit(NamedTuple):
    """A change of one step: its name, a description in words, and a function that changes a copy of its value."""

    step: str
    description: str
    function: Callable[[np.ndarray], np.ndarray]


class Stepper:
    """A place in the forward pass of some tokens.

    names       the names of all steps, in the order of the pass
    index       the index, in `names`, of the step at which the Stepper stands
    step        this step, with the edits applied
    edits       the changes so far, in the order in which they were made
    rms         step name -> root mean square of its value; it holds the steps of the residual stream and the steps that
                are added to it, as far as the walk has come

    With a cache the pass starts after the tokens in it. The pass is never finished, so the cache does not change.
    """

    def __init__(self, model: Model, tokens: Prompt, cache: KVCache | None = None) -> None:
        self.model, self.cache = model, cache
        self.tokens = model.token_ids(tokens, cache)
        self.names = list(step_names(model.config))
        self.edits: list[NamedEdit] = []
        self.rms: dict[str, float] = {}
        self._walk: Walk | None = None
        self._taken = 0  # how many steps the walk has yielded
        self.index = 0
        self.step: Step
        self.go(0)

    def go(self, index: int, progress: Progress | None = None) -> Step:
        """Move to the step with this index, forwards or backwards, and return it; `progress` counts (done, in all)."""
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
        except BaseException:  # such as Ctrl-C: this walk cannot go on, so the Stepper stays at its old step
            self._walk = None
            raise
        return self.step

    def _new_walk(self, cache: KVCache | None, *, edited: bool = True) -> Walk:
        return self.model.steps(self.tokens, cache, edits=self._all_edits() if edited else ())

    def _all_edits(self) -> list[tuple[str, Edit]]:
        return [(edit.step, partial(_of_copy, edit.function)) for edit in self.edits]

    def find(self, text: str) -> int:
        """Return the index of the step that a text means.

        The text is one of these: a step's name ("layers.3.q"); the short name of a step in the present layer ("q"); the
        number of a layer ("3"), which means its first step; a glob ("*.heads"), which means the next step that matches.

        Raises InputError if the text means no step.
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
        """Return a hint for a user who has typed a name that no step has."""
        last = self.model.config.n_layers - 1
        number = re.fullmatch(r"(?:layers\.)?(\d+)(?:\..*)?", text, re.ASCII | re.DOTALL)
        if number and (len(number[1]) > 9 or int(number[1]) > last):
            return f"there are layers 0 to {last}"
        known = list(dict.fromkeys([*(name.rpartition(".")[2] for name in self.names), *self.names]))
        return did_you_mean(text, known) or "names are like 'layers.0.q_rotated', 'q', or 'logits'"

    def edit(self, description: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change the value of the present step, now and each time the Stepper comes here again.

        `function` takes a copy of the value and returns the changed value. Raises InputError if the step cannot be
        edited.
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
        except BaseException:  # Ctrl-C: the present value is still the edited one
            self.edits.append(undone)
            raise
        return undone

    def logits(self, *, edited: bool = True) -> np.ndarray:
        """Return the logits (T, V) of the pass, with the edits or without them."""
        self._walk = None  # a cache serves one pass at a time, so the old one ends
        with self._new_walk(self.cache, edited=edited) as walk:
            return next(step.value for step in walk if step.name == "logits")

    def continuation(self, n: int, *, edited: bool = True) -> Iterator[str]:
        """Yield the text of up to n more tokens, always the likeliest one, with the edits or without them.

        An edit changes a whole pass. So for each token a new pass goes over the prompt and all tokens so far, and makes
        every edit again. An edit of token 2 stays an edit of token 2.

        Raises InputError if an edit's function does not fit a longer pass. Raises InputError also over a cache, since
        the pass would have to begin before the tokens in it.
        """
        n, config = checked_int("n", n, least=1), self.model.config
        if self.cache is not None:
            raise InputError("over a cache a pass cannot begin anew with the edits; walk through all tokens instead")
        tokens, stream = list(self.tokens), self.model.text_stream(self.tokens)
        edits = self._all_edits() if edited else []
        for _ in range(n):
            if config.max_seq_len is not None and len(tokens) >= config.max_seq_len:
                break
            try:
                logits_V = self.model.forward(tokens, edits=edits, last_only=not edits)[-1]
            except (ValueError, IndexError) as error:  # InputError too: a wrong shape
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
        """Return for each step how far the edited pass departs from the pass without edits."""
        edited, plain = self._new_walk(self._copy_of_cache()), self._new_walk(self._copy_of_cache(), edited=False)
        return compare_walks(edited, plain)

    def _copy_of_cache(self) -> KVCache | None:
        return None if self.cache is None else self.cache.copy()  # a finished pass would change the cache


def _of_copy(function: Callable[[np.ndarray], np.ndarray], value: np.ndarray) -> np.ndarray:
    return function(value.copy())
