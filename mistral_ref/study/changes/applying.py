"""Apply changes: check each against the model, and return the model and the edits that make them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from mistral_ref.errors import InputError, short_repr
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.steps import catalogue_of
from mistral_ref.study.broken import broken
from mistral_ref.study.changes.of_models import ConfigChange, PlantedBug, with_config
from mistral_ref.study.changes.of_passes import OfPass
from mistral_ref.study.changes.of_steps import Change, ChangedStep, Index, StepChange, window_of
from mistral_ref.trace import Trace
from mistral_ref.walk import Edit


class ChangeError(InputError):
    """One change of several cannot be made, or is no change.

    number      its index among the changes
    problem     what is wrong with it, without the number
    """

    def __init__(self, number: int, problem: str) -> None:
        super().__init__(f"changes[{number}]: {problem}")
        self.number, self.problem = number, problem


@contextmanager
def of_change(number: int) -> Iterator[None]:
    """Let an error say which change it is about."""
    try:
        yield
    except InputError as error:
        raise ChangeError(number, str(error)) from None


class Applied(NamedTuple):
    """A changed model, and the edits for its passes, as `Model.forward` takes them."""

    model: Model
    edits: list[tuple[str, Edit]]


class Planned(NamedTuple):
    """A change of steps that has been checked.

    places      the names of the steps that change, each with the index of the part that changes
    other_ids   the token ids of the pass from which numbers are taken; None if none are
    """

    change: StepChange
    places: dict[str, Index]
    other_ids: tuple[int, ...] | None


@dataclass(frozen=True)
class Plan:
    """Changes that have been checked: the changed model, what was changed in it, and the changes of steps."""

    model: Model
    configs: list[ConfigChange]
    bugs: list[str]
    steps: list[Planned]


def plan(model: Model, prompt: Prompt, changes: Sequence[Change]) -> Plan:
    """Return the changes that are on, checked against the model; raise ChangeError for the first that cannot be made.

    The configuration changes first, then come bugs, then steps, each in the order of the changes.
    """
    for number, change in enumerate(changes):
        if not isinstance(change, Change):
            raise ChangeError(number, f"it is {short_repr(change)}; expected a Change, as from_dict makes it of a dict")
    ids, made = model.token_ids(prompt), [(number, change) for number, change in enumerate(changes) if change.on]
    changed, configs, bugs, steps = model, list[ConfigChange](), list[str](), list[Planned]()
    for number, change in made:
        if isinstance(change, ConfigChange):
            with of_change(number):
                changed = with_config(changed, **change.fields(model.config))
            configs.append(change)
    without_bugs = changed
    for number, change in made:
        if isinstance(change, PlantedBug):
            with of_change(number):
                if change.bug in bugs:
                    raise InputError(f"an earlier change plants the bug {change.bug} already")
                changed = broken(without_bugs, *bugs, change.bug)
            bugs.append(change.bug)
    n_tokens = len(changed.token_ids(prompt))
    for number, change in made:
        if isinstance(change, StepChange):
            with of_change(number):
                places = change.places(changed.config, n_tokens)
                other_ids = change.taken_from(model, ids, n_tokens) if isinstance(change, OfPass) else None
                steps.append(Planned(change, places, other_ids))
    return Plan(changed, configs, bugs, steps)


def apply(model: Model, prompt: Prompt, changes: Sequence[Change]) -> Applied:
    """Return the model and the edits that make these changes in the pass of a prompt.

    The edits count tokens from the prompt's first one on, wherever a pass begins. So they also fit longer texts, passes
    over a cache, and `edited`, which makes a model of them that generates.

    All changes are checked before a pass begins. Then the other texts that they name go through the model without
    changes, and the prompt if something is frozen or set to a mean.

    Raises ChangeError for the first change that cannot be made, and InputError for the prompt.
    """
    found = plan(model, prompt, changes)
    needed = defaultdict[tuple[int, ...] | None, list[str]](list)
    for _, places, other_ids in found.steps:
        needed[other_ids].extend(places)
    kept: dict[tuple[int, ...] | None, Trace] = {}
    for other_ids, names in needed.items():
        if other_ids is not None:
            kept[other_ids] = model.trace(other_ids, keep=names)
    edits: list[tuple[str, Edit]] = []
    catalogue = catalogue_of(model.config)
    for change, places, other_ids in found.steps:
        for name, index in places.items():
            axes, other = catalogue[name.rpartition(".")[2]].axes, None
            if isinstance(change, OfPass):
                other = change.taken(kept[other_ids][name])
            edits.append((name, ChangedStep(change, axes, index, other, window_of(found.model.config, name))))
    return Applied(found.model, edits)
