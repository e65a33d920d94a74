"""Session: what the live page can ask of a model. A question names a text, changes, and parts of their passes.

A session holds the newest passes, which a reader may want to see again, and knows nothing else of its readers. So a
page that is loaded again, or a second tab, asks the same questions and gets the same answers.
"""

from __future__ import annotations

import json
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mistral_ref.errors import (
    InputError,
    MistralRefError,
    MistralRefWarning,
    Progress,
    checked_choice,
    checked_int,
    short_repr,
)
from mistral_ref.model import Model
from mistral_ref.study.broken import BUGS, BrokenModel, possible_bugs
from mistral_ref.study.live import checking, going_on, parts, sweeping
from mistral_ref.study.live.changed_pass import ChangedPass, changed_pass, unchanged_pass
from mistral_ref.study.live.exercises import EXERCISES
from mistral_ref.study.live.parts import SHOWN, View
from mistral_ref.study.live.typed import typed_ids
from mistral_ref.study.page_data import Entry

_MOST_PASSES = 4  # that are held
_MOST_CHANGES = 200
_PARTS = {**parts.PARTS, **going_on.PARTS, **sweeping.PARTS, **checking.PARTS}


class Question(NamedTuple):
    """What a reader looks at. Two questions that are equal have the same passes.

    changes     as a JSON list
    more        tokens that have been chosen to follow the text
    """

    text: str
    changes: str = "[]"
    more: tuple[int, ...] = ()


def question_of(text: str, changes: object, more: object = ()) -> Question:
    """Return the question that the page asks; raise InputError for what is no list, or for too many changes."""
    if not isinstance(changes, list) or len(changes) > _MOST_CHANGES:
        raise InputError(f"changes are {short_repr(changes)}; expected a list of at most {_MOST_CHANGES}")
    if not isinstance(more, Sequence) or isinstance(more, str):
        raise InputError(f"more is {short_repr(more)}; expected a list of token ids")
    return Question(text, json.dumps(changes), tuple(checked_int("more", token, 0, 2**31) for token in more))


class Session:
    """What can be asked of one model.

    While one thread is in `answer`, others may call `ids`, `tokens`, `merges` and `live_entry`, and read what `begin`
    has left.

    title   the name of the model
    load    the Python that loads it
    exercises   whether the page offers the course's exercises, which are made for the demonstration model
    exercise    the name of the exercise with which it begins
    """

    def __init__(
        self, model: Model, title: str, load: str = "mistral_ref.load()", *,
        exercises: bool = False, exercise: str | None = None,
    ) -> None:  # fmt: skip
        self.model, self.title, self.load, self.exercises, self.exercise = model, title, load, exercises, exercise
        self.first: Entry = {}  # what the page shows when it is loaded
        self.first_text, self.first_seconds = "", 0.0
        self._passes: OrderedDict[Question, ChangedPass] = OrderedDict()

    def begin(self, text: str, progress: Progress) -> None:
        """Take the pass that the page shows when it is loaded."""
        begun = time.monotonic()
        (about,) = self.answer(Question(text), [{"name": "about", "shown": "before"}], progress)
        if "error" in about:
            raise InputError(about["error"])
        self.first, self.first_text, self.first_seconds = about["value"], text, time.monotonic() - begun

    def live_entry(self) -> Entry:
        """Return what the live page knows of its server: its first text, how long that took, bugs and exercises."""
        bugs = [] if isinstance(self.model, BrokenModel) else possible_bugs(self.model)
        sentences = {name: BUGS[name].sentence for name in bugs}
        begin = {"text": self.first_text, "seconds": self.first_seconds}
        shown = ("chapter", "text", "task", "hint")
        exercises = {name: {one: getattr(exercise, one) for one in shown} for name, exercise in EXERCISES.items()}
        exercises = exercises if self.exercises else {}
        return begin | {"bugs": sentences, "exercises": exercises, "exercise": self.exercise}

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text; for a model without a tokenizer the text is a list of ids. Raises InputError."""
        return typed_ids(self.model, "the text", text)

    def tokens(self, text: str) -> list[Entry]:
        """Return the tokens of a text."""
        return [{"id": token, "piece": self.model.piece(token)} for token in self.ids(text)]

    def merges(self, text: str, index: int) -> Entry:
        """Return how the word of the token at this index was made.

        `states` are its parts before each merge and at the end. There is none for a token that is no text, or if
        merging does not lead to the tokens; `why` says so.
        """
        ids, tokenizer = self.ids(text), self.model.tokenizer
        index = checked_int("index", index, 0, len(ids) - 1)
        word = "" if tokenizer is None or ids[index] >= tokenizer.vocab_size else tokenizer.word_of(ids, index)
        if tokenizer is None or not word:
            return {"states": [], "why": "stands for itself: no text is merged to it"}
        try:
            return {"states": list(tokenizer.merges(word)), "why": ""}
        except InputError as error:
            return {"states": [], "why": str(error)}

    def answer(self, question: Question, wanted: Sequence[Entry], progress: Progress) -> list[Entry]:
        """Return the parts of the passes that are wanted, each as {"name", "of", "shown"}, in this order.

        shown   "before" or "after" the changes, or the "difference"

        Each answer is {"value": ...}, or {"error": in words} for a part that cannot be had. Whatever `progress` raises
        ends the answer.
        """
        answers = []
        with np.errstate(all="ignore"), warnings.catch_warnings():  # the reader asked for it, and the page shows it
            warnings.simplefilter("ignore", MistralRefWarning)
            for part in wanted:
                try:
                    answers.append({"value": self._part(question, part, progress)})
                except MistralRefError as error:
                    answers.append({"error": str(error)})
        return answers

    def _part(self, question: Question, part: Entry, progress: Progress) -> object:
        name = checked_choice("name", str(part.get("name")), _PARTS)
        shown = checked_choice("shown", str(part.get("shown")), SHOWN)
        ids = self.ids(question.text)
        before = self._held(
            question._replace(changes="[]"), lambda: unchanged_pass(self.model, [*ids, *question.more], progress)
        )
        changes = json.loads(question.changes)
        after = before
        if changes:
            after = self._held(
                question, lambda: changed_pass(self.model, ids, question.more, changes, before, progress)
            )
        view = View(question.text, question.more, before, after, shown, part.get("of"), self.title, self.load, progress)
        return _PARTS[name](view)

    def _held(self, question: Question, take: Callable[[], ChangedPass]) -> ChangedPass:
        if question not in self._passes:
            self._passes[question] = take()
            if len(self._passes) > _MOST_PASSES:
                self._passes.popitem(last=False)
        self._passes.move_to_end(question)
        return self._passes[question]
