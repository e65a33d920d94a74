"""Changes as dicts and lists, as JSON holds them. What is read may come from anywhere, so everything is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields

from mistral_ref.errors import InputError, checked_choice, did_you_mean, short_repr
from mistral_ref.study.changes.applying import of_change
from mistral_ref.study.changes.of_models import PlantedBug, Theta, Window
from mistral_ref.study.changes.of_passes import Freeze, Mean, Patch
from mistral_ref.study.changes.of_steps import Add, Change, Scale, Set, Swap, Zero

KINDS: dict[str, type[Change]] = {
    kind.kind: kind for kind in (Zero, Scale, Set, Add, Mean, Swap, Patch, Freeze, Window, Theta, PlantedBug)
}


def from_dict(data: object) -> Change:
    """Return the change that `Change.to_dict` has written.

    Raises InputError for an unknown kind, a field that the kind does not have or that is missing, or a wrong value.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"a change is {short_repr(data)}; expected a dict")
    kind = KINDS[checked_choice("kind", data.get("kind", ""), KINDS)]
    known = {field.name: field for field in fields(kind)}
    given = {key: value for key, value in data.items() if key != "kind"}
    for key in given:
        if key not in known:
            hint = did_you_mean(key, known) if isinstance(key, str) else ""
            hint = hint or f"expected one of {', '.join(known)}"
            raise InputError(f"{kind.kind} has no field {short_repr(key)}; {hint}")
    for name, field in known.items():
        if field.default is MISSING and name not in given:
            raise InputError(f"{kind.kind} has no {name}; expected one")
    return kind(**given)


def from_dicts(data: object) -> list[Change]:
    """Return the changes in a list of dicts; raise ChangeError for the first dict that is no change."""
    if isinstance(data, str) or not isinstance(data, Sequence):
        raise InputError(f"changes are {short_repr(data)}; expected a list of dicts")
    changes = []
    for number, one in enumerate(data):
        with of_change(number):
            changes.append(from_dict(one))
    return changes
