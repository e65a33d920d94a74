"""Session: what the live page can ask of a model. A question names a text, changes, and parts of their passes.

A session holds the newest passes, which a reader may want to see again, and knows nothing else of its readers. So a
page that is loaded again, or a second tab, asks the same questions and gets the same answers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.errors import InputError, MistralRefError, Progress, checked_choice, checked_int, short_repr
from mistral_ref.measure.cost_table import cost_table
from mistral_ref.model import Model
from mistral_ref.sampling import likeliest, log_softmax
from mistral_ref.steps import catalogue_of, step_names
from mistral_ref.study.live.live_pass import LivePass, sent
from mistral_ref.study.page_data import Entry, cost_entry, number

_MOST_PASSES = 4  # that are held
_N_NEXT = 6  # likeliest next tokens, of the pass before and of the pass after


class Question(NamedTuple):
    """What a reader looks at: a text. Two questions that are equal have the same passes."""

    text: str


class Session:
    """What can be asked of one model. Only `tokens` and `merges` may be called while another thread computes.

    title   the name of the model
    """

    def __init__(self, model: Model, title: str) -> None:
        self.model, self.title = model, title
        self.first: Entry = {}  # what the page shows when it is loaded
        self.first_text = ""
        self._passes: OrderedDict[Question, LivePass] = OrderedDict()

    def begin(self, text: str, progress: Progress) -> None:
        """Take the pass that the page shows when it is loaded."""
        self.first, self.first_text = self._pass(Question(text), progress).about(self.title), text

    def live_entry(self) -> Entry:
        """Return what the live page knows of its server."""
        return {"text": self.first_text}

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text; for a model without a tokenizer the text is a list of ids. Raises InputError."""
        if self.model.tokenizer is not None:
            return self.model.token_ids(text)
        words = text.replace(",", " ").split()
        if not all(word.isdecimal() and len(word) < 10 for word in words):
            raise InputError(f"the text is {short_repr(text)}; expected token ids, since this model has no tokenizer")
        return self.model.token_ids(list(map(int, words)))

    def tokens(self, text: str) -> list[Entry]:
        """Return the tokens of a text."""
        return [{"id": token, "piece": self.model.piece(token)} for token in self.ids(text)]

    def merges(self, text: str, index: int) -> Entry:
        """Return how the word was made that the token at this index is a part of.

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
        for part in wanted:
            try:
                name = checked_choice("name", str(part.get("name")), _PARTS)
                shown = checked_choice("shown", str(part.get("shown")), ("before", "after", "difference"))
                answers.append({"value": _PARTS[name](self, question, shown, part.get("of"), progress)})
            except MistralRefError as error:
                answers.append({"error": str(error)})
        return answers

    def _pass(self, question: Question, progress: Progress) -> LivePass:
        if question not in self._passes:
            self._passes[question] = LivePass(self.model, self.ids(question.text), {}, progress)
            if len(self._passes) > _MOST_PASSES:
                self._passes.popitem(last=False)
        self._passes.move_to_end(question)
        return self._passes[question]

    def _about(self, question: Question, shown: str, of: object, progress: Progress) -> Entry:
        return self._pass(question, progress).about(self.title)

    def _values(self, question: Question, shown: str, of: object, progress: Progress) -> Entry:
        """Return the values of the step `of`."""
        found = self._pass(question, progress)
        name = checked_choice("step", str(of), step_names(found.model.config))
        return sent(found.step(name, progress), found.model.config)

    def _sizes(self, question: Question, shown: str, of: object, progress: Progress) -> list[float | None]:
        """Return the size of the kind of step `of` in every layer."""
        found = self._pass(question, progress)
        return found.sizes(checked_choice("kind", str(of), catalogue_of(found.model.config)), progress)

    def _lens(self, question: Question, shown: str, of: object, progress: Progress) -> Entry:
        return self._pass(question, progress).lens()

    def _next(self, question: Question, shown: str, of: object, progress: Progress) -> list[Entry]:
        """Return the likeliest tokens after the token with the index `of`, with their probabilities."""
        found = self._pass(question, progress)
        logprobs_V = log_softmax(found.logits[checked_int("of", of, 0, len(found.ids) - 1)])
        return [
            {"id": int(token), "piece": self.model.piece(int(token)), "p": number(float(np.exp(logprobs_V[token])))}
            for token in likeliest(logprobs_V, min(_N_NEXT, len(logprobs_V)))
        ]

    def _cost(self, question: Question, shown: str, of: object, progress: Progress) -> Entry:
        return cost_entry(cost_table(self.model, self.ids(question.text), progress=progress))


_Part = Callable[[Session, Question, str, object, Progress], Any]
_PARTS: Mapping[str, _Part] = {
    "about": Session._about,
    "values": Session._values,
    "sizes": Session._sizes,
    "lens": Session._lens,
    "next": Session._next,
    "cost": Session._cost,
}
