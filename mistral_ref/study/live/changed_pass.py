"""ChangedPass: the pass of a text with those changes that can be made, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mistral_ref.errors import InputError, Progress
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.study.changes import Applied, Change, ChangeError, Swap, apply, from_dict
from mistral_ref.study.edited import edited
from mistral_ref.study.live.live_pass import LivePass


class ChangedPass(NamedTuple):
    """A pass with changes.

    values      the pass
    applied     the changed model, and the edits of the pass
    made        the changes that are on and could be made
    words       what each change does, in words; "" for what is no change
    problems    why a change cannot be made, by its number
    """

    values: LivePass
    applied: Applied
    made: list[Change]
    words: list[str]
    problems: dict[int, str]

    def goes_on(self, n: int, progress: Progress) -> Iterator[int]:
        """Yield the ids of up to n more tokens, always the likeliest one.

        Where a change needs a whole pass, each token takes a pass of all tokens before it.
        """
        (model, edits), ids = self.applied, list(self.values.ids)
        if not self._needs_whole_passes():
            changed = edited(model, edits) if edits else model
            for done, token in enumerate(changed.generate(ids, max_tokens=n, progress=progress), 1):
                progress(done, n)
                yield token.id
            return
        for done in range(n):
            progress(done, n)
            logits_V = model.forward(ids, edits=edits, last_only=True)[0]
            if np.isnan(logits_V).any():
                raise InputError("the logits hold NaN, so nothing is likeliest")
            ids.append(int(logits_V.argmax()))
            yield ids[-1]
            if ids[-1] in model.eos_ids:
                return

    def _needs_whole_passes(self) -> bool:
        """Return whether a change needs several tokens at once: the two that it swaps."""
        return any(isinstance(change, Swap) for change in self.made)


def unchanged_pass(model: Model, ids: Sequence[int], progress: Progress) -> ChangedPass:
    """Return the pass without changes."""
    return ChangedPass(LivePass(model, ids, [], progress), Applied(model, []), [], [], {})


def changed_pass(
    model: Model, prompt: Prompt, more: Sequence[int], data: Sequence[object], before: ChangedPass, progress: Progress
) -> ChangedPass:
    """Return the pass of a prompt and more tokens, with the changes in `data`, dicts as JSON holds them.

    more        tokens behind the prompt. The changes are those of the prompt's pass, made in this longer one
    before      the pass without changes, whose values are taken if no change is made
    """
    changes, words, problems = dict[int, Change](), [""] * len(data), dict[int, str]()
    for number, one in enumerate(data):
        try:
            changes[number] = from_dict(one)
            words[number] = str(changes[number])
        except InputError as error:
            problems[number] = str(error)
    while True:
        numbers = [number for number, change in changes.items() if change.on]
        made = [changes[number] for number in numbers]
        try:
            applied = apply(model, prompt, made)
            break
        except ChangeError as error:
            number = numbers[error.number]
            problems[number] = error.problem
            del changes[number]
    ids = [*applied.model.token_ids(prompt), *more]
    values = LivePass(applied.model, ids, applied.edits, progress) if made else before.values
    return ChangedPass(values, applied, made, words, problems)
