"""The changes of steps that take numbers from another pass, of a text or the prompt, by the model without changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mistral_ref.errors import InputError, checked_int, short_repr
from mistral_ref.model import Model
from mistral_ref.study.changes.of_steps import OF_TOKENS, Index, StepChange, index_text


@dataclass(frozen=True)
class OfPass(StepChange):
    """A change to numbers of another pass."""

    def taken_from(self, model: Model, ids: Sequence[int], n_tokens: int) -> tuple[int, ...]:
        """Return the token ids of the other pass.

        ids         those of the prompt
        n_tokens    how many the changed pass has; a changed model may have others than the prompt's

        Raises InputError if numbers cannot be taken from there.
        """
        return tuple(ids)

    def taken(self, value: np.ndarray) -> np.ndarray:
        """Return the numbers to take, of the step's value in the other pass: a token for each, or one for all."""
        return value

    def changed(self, part: np.ndarray, other: np.ndarray) -> np.ndarray | float:
        """Return the part of the other pass."""
        return other


@dataclass(frozen=True)
class Kept(OfPass):
    """A change to the numbers at the same place of another pass, which has as many tokens as the prompt.

    In a longer pass the tokens after these keep their own numbers.
    """

    whose: ClassVar[str]  # the other pass, in a message

    def _place(self, name: str, sizes: dict[str, int]) -> Index:
        if "pair" in sizes:
            raise InputError(
                f"{name} has a row for each expert that a token is sent to, and other passes have other experts; "
                "expected another step, such as ffn_out"
            )
        return super()._place(name, sizes)

    def taken_from(self, model: Model, ids: Sequence[int], n_tokens: int) -> tuple[int, ...]:
        """Return the token ids of the other pass; raise InputError unless they are as many as the changed pass has."""
        other_ids = self._other_ids(model, ids)
        if len(other_ids) != n_tokens:
            raise InputError(f"{self.whose} has {len(other_ids)} tokens; expected {n_tokens}, as many as this pass")
        return tuple(other_ids)

    def _other_ids(self, model: Model, ids: Sequence[int]) -> Sequence[int]:
        return ids

    def _whole(self, axis: str, size: int) -> slice:
        return slice(None, size) if axis in OF_TOKENS else slice(None)

    def statement(self, index: Index) -> str:
        """Return the same in Python."""
        return f"value[{index_text(index)}] = kept[{index_text(index)}]"


@dataclass(frozen=True)
class Patch(Kept):
    """Take the numbers from the same place of another text's pass, by the model without changes: activation patching.

    text    the other text, or its token ids; it has as many tokens as the prompt
    """

    text: str | tuple[int, ...]
    kind, whose = "patch", "the other text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.text, str):
            return
        if not isinstance(self.text, Sequence | np.ndarray):
            raise InputError(f"text is {short_repr(self.text)}; expected a text, or a list of token ids")
        self._keep("text", tuple(checked_int(f"text[{at}]", one, least=0) for at, one in enumerate(self.text)))

    def _other_ids(self, model: Model, ids: Sequence[int]) -> Sequence[int]:
        return model.token_ids(self.text)

    def __str__(self) -> str:
        return f"take {self._words} from the pass of {short_repr(self.text)}"


@dataclass(frozen=True)
class Freeze(Kept):
    """Take the numbers from the pass of the same prompt by the model without changes."""

    kind, whose = "freeze", "the pass without changes"

    def __str__(self) -> str:
        return f"keep {self._words} as it is without changes"


@dataclass(frozen=True)
class Mean(OfPass):
    """Set numbers to their mean over the tokens of the prompt, by the model without changes: mean ablation.

    Tokens that come later in a longer pass get the same mean.
    """

    kind: ClassVar[str] = "mean"

    def _place(self, name: str, sizes: dict[str, int]) -> Index:
        if "token" not in sizes:
            raise InputError(f"{name} has no axis of tokens, so no mean over them; it has {', '.join(sizes)}")
        return super()._place(name, sizes)

    def taken(self, value: np.ndarray) -> np.ndarray:
        """Return the mean over the tokens (1, ...), computed in float64."""
        return value.mean(axis=0, keepdims=True, dtype=np.float64).astype(value.dtype)

    def statement(self, index: Index) -> str:
        """Return the same in Python."""
        return f"value[{index_text(index)}] = kept.mean(axis=0, dtype='float64')[{index_text(index[1:])}]"

    def __str__(self) -> str:
        return f"set {self._words} to the mean over the tokens"
