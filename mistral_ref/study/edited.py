"""Edited models: every pass makes the same edits, also those of `generate` and `chat`.

silent = edited(model, {"layers.2.heads": np.zeros_like})
print(silent.complete("Once upon a time"))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mistral_ref.errors import InputError
from mistral_ref.model import Model
from mistral_ref.ops import AnyPass
from mistral_ref.steps import Steps
from mistral_ref.transformer import Transformer
from mistral_ref.walk import Edit, Edits, checked_edits, inside_attention, make_edits, source_of


@dataclass(frozen=True, eq=False)
class EditedTransformer(Transformer):
    """A transformer whose steps are edited before anybody gets them.

    touched     the names of the steps that are edited
    """

    edits: Sequence[tuple[str, Edit]]
    touched: frozenset[str]

    def forward_steps(
        self, tokens_T: np.ndarray, this_pass: AnyPass, *, last_only: bool = False, observe_attention: bool = False,
        first_layer: int = 0, x_TD: np.ndarray | None = None,
    ) -> Steps:  # fmt: skip
        """Yield every step of one pass with its edits made, and return the logits.

        If an edit changes a step of the last layer, or one after it, these steps have all tokens, also with
        `last_only`: an edit may take the last token's numbers from another one.
        """
        last_layer = self.config.n_layers - 1
        ends = (f"layers.{last_layer}.", "norm", "logits")
        needs_all = last_only and first_layer <= last_layer and any(name.startswith(ends) for name in self.touched)
        steps = super().forward_steps(
            tokens_T, this_pass, last_only=last_only and not needs_all, first_layer=first_layer, x_TD=x_TD,
            observe_attention=observe_attention or inside_attention(self.touched),
        )  # fmt: skip
        step = next(steps)
        while True:
            step.source = source_of(steps)
            make_edits(step, self.edits, this_pass.positions, this_pass.last)
            value = yield step
            try:
                step = steps.send(value)
            except StopIteration as end:
                return end.value[this_pass.last] if needs_all else end.value


def refuse_edits(model: Model) -> None:
    """Raise InputError for an edited model, for functions that make a model anew, without its edits."""
    if isinstance(model.transformer, EditedTransformer):
        raise InputError(f"{model!r} has edits; expected a model without edits, which may get them afterwards")


def edited(model: Model, edits: Edits) -> Model:
    """Return a model, over the same weights and tokenizer, in whose passes these edits are always made.

    edits   as in `Model.forward`. An edit is called in each pass with the value of this pass's tokens: while a text is
            generated, those of a chunk of the prompt, and then of one token. So an edit must not count tokens, unless
            it is a PositionedEdit (walk.py), as those of `changes.apply` are

    A cache that such a model has filled holds edited keys and values. Raises InputError for wrong edits.
    """
    pairs, touched = checked_edits(edits, model.config)
    twin, kind = object.__new__(type(model)), type(model)
    for name, value in vars(model).items():
        if not isinstance(getattr(kind, name, None), cached_property):  # what drafts have left there
            twin.__dict__[name] = value
    own = model.transformer
    if isinstance(own, EditedTransformer):
        pairs, touched = [*own.edits, *pairs], [*own.touched, *touched]
    twin.transformer = EditedTransformer(own.config, own.weights, own.ops, pairs, frozenset(touched))
    return twin
