"""The parts of a pass that the page asks for: what is known of its steps, their values, and what comes next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.compare import DEFAULT_BOUND, step_difference
from mistral_ref.errors import Progress, checked_choice, checked_int
from mistral_ref.measure.cost_table import cost_table
from mistral_ref.sampling import likeliest, log_softmax
from mistral_ref.steps import Step, step_names
from mistral_ref.study.changes import python_source
from mistral_ref.study.live.changed_pass import ChangedPass
from mistral_ref.study.live.live_pass import LivePass, difference, in_layers, sent
from mistral_ref.study.page_data import Entry, cost_entry, number, rms

_N_NEXT = 6  # likeliest next tokens, of the pass before and of the pass after
_N_GOES_ON = 16  # tokens of a continuation
SHOWN = ("before", "after", "difference")


class View(NamedTuple):
    """The passes of a text without changes and with them, and what is asked of them.

    text        as it was typed
    more        the tokens that have been chosen to follow it
    before, after   the passes
    shown       which of them is looked at, or their difference
    of          what the part is about: a step, a kind of step, a token
    title       the name of the model
    load        the Python that loads it
    progress    called while something is computed
    """

    text: str
    more: tuple[int, ...]
    before: ChangedPass
    after: ChangedPass
    shown: str
    of: object
    title: str
    load: str
    progress: Progress

    @property
    def looked_at(self) -> ChangedPass:
        """The pass that is looked at; for the difference the pass with changes."""
        return self.before if self.shown == "before" else self.after

    @property
    def values(self) -> LivePass:
        """The values of the pass that is looked at."""
        return self.looked_at.values

    def step(self, name: str) -> Step:
        """Return a step of the pass that is looked at, or the difference."""
        step = self.values.step(name, self.progress)
        return difference(self.before.values.step(name, self.progress), step) if self.shown == "difference" else step


def _about(view: View) -> Entry:
    """Return what is known of the pass before its values, and of its changes."""
    changes = {"words": view.after.words, "problems": view.after.problems}
    return view.values.about(view.title) | {"changes": changes}


def _values(view: View) -> Entry:
    """Return the values of a step; with a difference, how large one is that rounding explains."""
    name = checked_choice("step", str(view.of), step_names(view.values.model.config))
    entry = sent(view.step(name), view.values.model.config)
    if view.shown == "difference":
        before = view.before.values.step(name, view.progress).value
        largest = np.abs(before, where=np.isfinite(before), out=np.zeros_like(before)).max(initial=0)
        entry["rounding"] = DEFAULT_BOUND * float(np.spacing(np.float32(largest)))
    return entry


def departures(view: View) -> list[str]:
    """Return the names of the steps whose difference is more than rounding explains, of those that both passes keep.

    Those that cannot be compared, in a pass of more tokens, are among them.
    """
    before = {step.name: step for step in view.before.values.kept()}
    pairs = [(step, before[step.name]) for step in view.after.values.kept() if step.name in before]
    return [step.name for step, other in pairs if _departs(step, other)]


def _departs(step: Step, other: Step) -> bool:
    return step.value.shape != other.value.shape or step_difference(step, other, DEFAULT_BOUND).departs


def _sizes(view: View) -> list[float | None]:
    """Return the root mean square of a kind of step in every layer."""
    config = view.values.model.config
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in step_names(config) if "." in name)
    kind = checked_choice("kind", str(view.of), kinds)
    if view.shown != "difference":
        return view.values.sizes(kind, view.progress)
    names = set(step_names(config))
    return [rms(view.step(name), config) if name in names else None for name in in_layers(kind, config)]


def _lens(view: View) -> Entry:
    return view.values.lens()


def _next(view: View) -> list[Entry]:
    """Return the likeliest tokens after a token, with their probabilities before the changes and after them."""
    from_end = len(view.values.ids) - checked_int("of", view.of, 0, len(view.values.ids) - 1)
    found = []
    for one in (view.before.values, view.after.values):
        p_V = np.exp(log_softmax(one.logits[-min(from_end, len(one.ids))]))
        found.append((p_V, likeliest(p_V, min(_N_NEXT, len(p_V)))))
    (before_V, first), (after_V, second) = found
    larger_V = np.fmax(before_V, after_V)
    tokens = sorted({*first.tolist(), *second.tolist()}, key=lambda token: (-larger_V[token], token))
    return [
        {
            "id": token,
            "piece": view.values.model.piece(token),
            "before": number(float(before_V[token])),
            "after": number(float(after_V[token])),
        }
        for token in tokens
    ]


def _goes_on(view: View) -> list[str]:
    """Return the pieces of the likeliest continuation."""
    return [view.values.model.piece(token) for token in view.looked_at.goes_on(_N_GOES_ON, view.progress)]


def _text(view: View) -> str:
    """Return the text with the tokens that have been chosen to follow it."""
    model, ids = view.before.values.model, view.before.values.ids
    return model.tokenizer.decode(ids) if model.tokenizer else " ".join(map(str, ids))


def _cost(view: View) -> Entry:
    model, ids = view.before.values.model, view.before.values.ids
    return cost_entry(cost_table(model, ids, progress=view.progress))


def _python(view: View) -> str:
    """Return the Python that makes the changes, and prints the likeliest next tokens."""
    model, ids = view.before.values.model, view.before.values.ids
    prompt = view.text if model.tokenizer else ids[: len(ids) - len(view.more)]
    source = python_source(model, prompt, view.after.made, load=view.load, more=view.more)
    return f"{source}for token in logits[-1].argsort()[:-6:-1]:\n    print(model.piece(token), logits[-1, token])\n"


PARTS: Mapping[str, Callable[[View], Any]] = {
    "about": _about,
    "values": _values,
    "departs": departures,
    "sizes": _sizes,
    "lens": _lens,
    "next": _next,
    "goes_on": _goes_on,
    "text": _text,
    "cost": _cost,
    "python": _python,
}
