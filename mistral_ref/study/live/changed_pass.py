"""ChangedPass: the pass of a text with those changes that can be made, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from mistral_ref.errors import InputError, Progress
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.study.changes import Applied, Change, ChangeError, Patch, apply, from_dict
from mistral_ref.study.edited import edited
from mistral_ref.study.live.live_pass import LivePass
from mistral_ref.study.live.typed import typed_ids


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
        """Yield the ids of up to n more tokens, always the likeliest one; no more than the model has positions for."""
        (model, edits), ids = self.applied, self.values.ids
        changed = edited(model, edits) if edits else model
        cache = changed.new_cache(chunk=len(ids))  # a change may need any two tokens in one pass
        tokens = changed.generate(ids, max_tokens=n, cache=cache, progress=progress)
        for done, token in enumerate(tokens, 1):
            progress(done, n)
            yield token.id


def _with_ids(model: Model, change: Change) -> Change:
    """Return a change that is on with the ids of its other text, as a reader types them without a tokenizer."""
    if model.tokenizer is None and change.on and isinstance(change, Patch) and isinstance(change.text, str):
        return replace(change, text=tuple(typed_ids(model, "the other text", change.text)))
    return change


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
            changes[number] = _with_ids(model, from_dict(one))
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
