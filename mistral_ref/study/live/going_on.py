"""How a text goes on, token by token: what the next one is drawn from, what is drawn, and what a lookup drafts.

The numbers are those of `Model.generate`: if all tokens behind a text are drawn with the same settings and one seed,
they are those of `generate(text, seed=seed, ...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.drafts import Lookup
from mistral_ref.errors import InputError, checked_int, short_repr
from mistral_ref.sampling import Distribution, SamplingSettings, distribution, draw, log_softmax
from mistral_ref.study.live.parts import View
from mistral_ref.study.page_data import Entry

_N_ROWS = 14  # likeliest tokens that are sent
_N_DRAFTED = 6
_CUTS = ("top_k", "top_p", "min_p")  # in the order in which they cut


class _Draws(NamedTuple):
    """How tokens are drawn: the settings, and the seed of the random numbers, one for each token behind the text."""

    settings: SamplingSettings
    seed: int

    def number(self, at: int) -> float | None:
        """Return the random number of the token at this place behind the text; None if none is needed."""
        if self.settings.temperature == 0:
            return None
        return float(np.random.default_rng(self.seed).random(at + 1)[at])

    def token(self, drawn_from: Distribution, at: int) -> int:
        """Return the token that is drawn at this place behind the text."""
        number = self.number(at)
        return int(drawn_from.ids_N[0 if number is None else draw(drawn_from.p_N, number)])


def _draws(asked: object) -> _Draws:
    names = [one.name for one in fields(SamplingSettings)]
    if not isinstance(asked, Mapping) or asked.keys() != {*names, "seed"}:
        raise InputError(f"the settings are {short_repr(asked)}; expected {', '.join(names)} and seed")
    settings = SamplingSettings(**{name: asked[name] for name in names})
    return _Draws(settings, checked_int("seed", asked["seed"], 0, 2**53))


def _distribution(view: View) -> Entry:
    """Return the likeliest next tokens, what each setting leaves of them, and which one is drawn.

    rows    the likeliest tokens: their probability by the model, by the model with penalty and temperature, and in the
            draw, where it is 0 for what is cut off
    left    how many tokens are left after each setting that cuts, in order
    drawn   the token that is drawn, and the random number that draws it
    """
    draws, model, ids = _draws(view.of), view.values.model, view.values.ids
    settings, logits_V = draws.settings, view.values.logits[-1]
    uncut = replace(settings, temperature=settings.temperature or 1.0, top_k=None, top_p=1.0, min_p=0.0)
    whole, own_V = distribution(logits_V, uncut, ids), np.exp(log_softmax(logits_V))
    left = {}
    for name in _CUTS if settings.temperature > 0 else ():
        uncut = replace(uncut, **{name: getattr(settings, name)})
        left[name] = len(distribution(logits_V, uncut, ids).ids_N)
    drawn_from = distribution(logits_V, settings, ids)
    shown = whole.ids_N[:_N_ROWS]
    token = draws.token(drawn_from, len(view.more))
    return {
        "rows": [
            {"id": one, "piece": model.piece(one), "own": own, "uncut": uncut, "share": share}
            for one, own, uncut, share in zip(
                shown.tolist(),
                own_V[shown].tolist(),
                whole.shares(shown).tolist(),
                drawn_from.shares(shown).tolist(),
                strict=True,
            )
        ],
        "left": left or {"temperature": 1},
        "drawn": _token(view, token)
        | {"number": draws.number(len(view.more)), "share": float(drawn_from.shares(np.array([token]))[0])},
        "hasEnded": ids[-1] in model.eos_ids,
    }


def _draft(view: View) -> Entry:
    """Return what a lookup drafts, and what is drawn at these places: accepted as long as both are equal, and one more.

    One pass gives the logits behind all drafted tokens.
    """
    draws, ids, longest = _draws(view.of), view.values.ids, view.values.model.config.max_seq_len
    n = _N_DRAFTED if longest is None else min(_N_DRAFTED, longest - len(ids) - 1)  # one more is drawn
    drafted = [guess.token for guess in Lookup().guesses(ids, n)]
    drawn: list[int] = []
    if drafted:
        model, edits = view.looked_at.applied
        for logits_V in model.forward([*ids, *drafted], edits=edits)[len(ids) - 1 :]:
            at = len(drawn)
            drawn_from = distribution(logits_V, draws.settings, [*ids, *drawn])
            drawn.append(draws.token(drawn_from, len(view.more) + at))
            if drawn[at:] != drafted[at : at + 1]:
                break
    return {"drafted": [_token(view, one) for one in drafted], "drawn": [_token(view, one) for one in drawn]}


def _token(view: View, token: int) -> Entry:
    return {"id": token, "piece": view.values.model.piece(token)}


PARTS: Mapping[str, Callable[[View], Any]] = {"distribution": _distribution, "draft": _draft}
