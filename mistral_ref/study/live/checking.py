"""Checking an exercise: whether a reader's changes do what it asks for, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mistral_ref.errors import checked_choice
from mistral_ref.sampling import log_softmax
from mistral_ref.study.changes import Window
from mistral_ref.study.live.exercises import EXERCISES, Asked, Exercise, Goal
from mistral_ref.study.live.parts import View, departures
from mistral_ref.study.live.typed import token_named
from mistral_ref.study.page_data import Entry


def _exercise(view: View) -> Entry:
    """Return whether an exercise, named by `of`, is done, and what there is to say about it."""
    exercise = EXERCISES[checked_choice("exercise", str(view.of), EXERCISES)]
    if words := _other_question(view, exercise):
        return {"isDone": False, "words": words}
    is_done = _is_reached(exercise.goal, view)
    return {"isDone": is_done, "words": exercise.done if is_done else f"Not yet: {_reached(exercise, view)}."}


def _other_question(view: View, exercise: Exercise) -> str:
    """Return why the reader looks at something else than the exercise asks for; "" if not."""
    if view.text != exercise.text:
        return "This exercise is about another text."
    if view.more:
        return "This exercise is about the text without the tokens that you have added."
    if not view.after.made:
        return "Nothing has been changed yet."
    return "" if exercise.asked.fits(view.after.made) else _other_changes(view, exercise.asked)


def _other_changes(view: View, asked: Asked) -> str:
    """Return why the changes are not those that are asked for."""
    made = view.after.made
    if asked.begun(made):
        return f"Go on: this is {len(made)} of the {asked.n} changes that the exercise asks for."
    if asked.most is not None and len(made) == 1 and isinstance(made[0], Window):
        return f"Not yet: the text has {len(view.after.values.ids)} tokens, and in such a window there is room for all."
    return "These are other changes than those that the exercise asks for."


def _reached(exercise: Exercise, view: View) -> str:
    """Return in words what the changes have reached so far."""
    if exercise.goal.departs is not None:
        return "".join(f"the first wrong step is {name}" for name in departures(view)[:1]) or "no step is wrong"
    return ", ".join(f"“{piece[1:]}” has {100 * _share(view, piece):.3g} %" for piece in exercise.watched)


def _is_reached(goal: Goal, view: View) -> bool:
    if goal.departs is not None:
        return departures(view)[:1] == [goal.departs]
    share = _share(view, goal.token)
    low, high = (_share(view, one) if isinstance(one, str) else one for one in (goal.above, goal.below))
    return (low is None or share > low) and (high is None or share < high)


def _share(view: View, piece: str) -> float:
    """Return the probability of a token after the text, with the changes."""
    values = view.after.values
    return float(np.exp(log_softmax(values.logits[-1]))[token_named(values.model, "token", piece)])


PARTS: Mapping[str, Callable[[View], Any]] = {"exercise": _exercise}
