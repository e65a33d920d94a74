"""Sweeps for the page: every head, token or part is changed by itself, and what that does to two logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mistral_ref.errors import InputError, checked_choice, checked_int, short_repr
from mistral_ref.study.live.parts import View
from mistral_ref.study.live.typed import token_named, typed_ids
from mistral_ref.study.page_data import Entry, number
from mistral_ref.study.patching import ablate, patch

HOW = ("zero", "mean", "patch")


def _sweep(view: View) -> Entry:
    """Return what a sweep of the pass without changes finds.

    of      by: "head", "token" or "step"; how: "zero", "mean" or "patch"; other: the other text, for "patch";
            first, second: the tokens whose logits are compared; at: the token after which they are taken

    The tokens that have been chosen to follow the text follow the other one, too. A mean is that of the text itself, as
    changes make it.

    values      by how much each change moves the first logit above the second
    base        by how much the first is above the second without a change; other: in the other text
    """
    asked = view.of
    if not isinstance(asked, Mapping):
        raise InputError(f"the sweep is {short_repr(asked)}; expected by, how, first, second and at")
    model, ids = view.before.values.model, view.before.values.ids
    first, second = (token_named(model, name, asked.get(name)) for name in ("first", "second"))
    if first == second:
        raise InputError(f"both tokens are {short_repr(model.piece(first))}; expected two different ones")
    at = checked_int("at", asked.get("at"), 0, len(ids) - 1)
    settings: dict[str, Any] = {"by": asked.get("by"), "metric": (first, second), "at": at, "progress": view.progress}
    how = checked_choice("how", str(asked.get("how")), HOW)
    n_typed = len(ids) - len(view.more)
    if how == "patch":
        other_ids = typed_ids(model, "the other text", asked.get("other"))
        if len(other_ids) != n_typed:
            raise InputError(f"the other text has {len(other_ids)} tokens; expected {n_typed}, as many as the text")
        found = patch(model, ids, [*other_ids, *view.more], **settings)
    else:
        found = ablate(model, ids, to=[ids[:n_typed]] if how == "mean" else "zero", **settings)
    return {
        "rows": found.rows,
        "columns": found.columns,
        "values": [[number(float(value)) for value in row] for row in found.change],
        "top": [[found.rows.index(row), found.columns.index(column)] for row, column, _ in found.top()],
        "base": number(found.base),
        "other": None if found.other is None else number(found.other),
        "first": model.piece(first),
        "second": model.piece(second),
    }


PARTS: Mapping[str, Callable[[View], Any]] = {"sweep": _sweep}
