"""Sweeps for the page: every head, token or part is changed by itself, and what that does to two logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mistral_ref.errors import InputError, checked_choice, checked_int, printable, short_repr
from mistral_ref.model import Model
from mistral_ref.study.live.parts import View
from mistral_ref.study.page_data import Entry, number
from mistral_ref.study.patching import ablate, patch

HOW = ("zero", "mean", "patch")


def _sweep(view: View) -> Entry:
    """Return what a sweep of the pass without changes finds.

    of      by: "head", "token" or "step"; how: "zero", "mean" or "patch"; other: the other text, for "patch";
            first, second: the tokens whose logits are compared; at: the token after which they are taken

    values      by how much each change moves the first logit above the second
    base        by how much the first is above the second without a change; other: in the other text
    """
    asked = view.of
    if not isinstance(asked, Mapping):
        raise InputError(f"the sweep is {short_repr(asked)}; expected by, how, first, second and at")
    model, ids = view.before.values.model, view.before.values.ids
    first, second = (token_named(model, name, asked.get(name)) for name in ("first", "second"))
    if first == second:
        raise InputError(f"both tokens are {short_repr(printable(model.piece(first)))}; expected two different ones")
    at = checked_int("at", asked.get("at"), 0, len(ids) - 1)
    settings: dict[str, Any] = {"by": asked.get("by"), "metric": (first, second), "at": at, "progress": view.progress}
    how = checked_choice("how", str(asked.get("how")), HOW)
    if how == "patch":
        found = patch(model, ids, str(asked.get("other")), **settings)
    else:
        found = ablate(model, ids, to=how, **settings)
    return {
        "rows": found.rows,
        "columns": [printable(name) for name in found.columns],
        "values": [[number(float(value)) for value in row] for row in found.change],
        "top": [[found.rows.index(row), found.columns.index(column)] for row, column, _ in found.top()],
        "base": found.base,
        "other": found.other,
        "first": printable(model.piece(first)),
        "second": printable(model.piece(second)),
    }


def token_named(model: Model, name: str, text: object) -> int:
    """Return the id of the token that a reader has typed: a piece, or a word, whose piece begins with a space.

    For a model without a tokenizer it is the id. Raises InputError if there is no such token.
    """
    text = text.strip() if isinstance(text, str) else ""
    if model.tokenizer is None:
        if text.isdecimal() and len(text) < 10:
            return checked_int(name, int(text), 0, model.config.vocab_size - 1)
        raise InputError(f"{name} is {short_repr(text)}; expected a token id, since this model has no tokenizer")
    spellings = {f"▁{text}": 0, f" {text}": 1, text: 2}
    n_ids = min(model.tokenizer.vocab_size, model.config.vocab_size)
    found = [(spellings[piece], token) for token in range(n_ids) if (piece := model.piece(token)) in spellings]
    if not text or not found:
        raise InputError(f"{name} is {short_repr(text)}; expected one token, such as those that the page lists")
    return min(found)[1]


PARTS: Mapping[str, Callable[[View], Any]] = {"sweep": _sweep}
