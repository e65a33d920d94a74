"""BrokenModel: a model that computes something wrong on purpose, with one bug or with several."""

from __future__ import annotations

from functools import reduce
from typing import Any

from mistral_ref.cache import KVCache
from mistral_ref.errors import InputError, checked_choice
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.study.broken.bugs import BUGS
from mistral_ref.study.broken.operations import BrokenOps
from mistral_ref.study.edited import refuse_edits

_BOS = 1  # of every tokenizer of the line


class BrokenModel(Model):
    """A model that computes something wrong on purpose. `broken` makes it; its repr and `ops.name` show the bugs."""

    def __init__(self, right: Model, *names: str) -> None:
        bugs = [BUGS[name] for name in names]
        config = reduce(lambda config, bug: bug._config(config), bugs, right.config)
        weights = reduce(lambda weights, bug: bug._weights(weights), bugs, right.weights)
        ops = _joined(BrokenOps, [bug._ops for bug in bugs])(", ".join(names), right)
        super().__init__(
            config,
            weights,
            ops,
            tokenizer=right.tokenizer,
            eos_ids=tuple(right.eos_ids),
            check_memory=right.check_memory,
        )
        self._cache_type = _joined(KVCache, [bug._cache for bug in bugs])
        self._twice_bos = any(bug._twice_bos for bug in bugs)

    def token_ids(self, prompt: Prompt, cache: KVCache | None = None) -> list[int]:
        """Return the token ids of a prompt. With `bos-twice` a text that begins with BOS has it twice."""
        ids = super().token_ids(prompt, cache)
        bos = _BOS if self.tokenizer is None else self.tokenizer.bos_id
        is_one = ids[0] == bos and ids[:2] != [bos, bos] and not (cache is not None and cache.length)
        return [ids[0], *ids] if self._twice_bos and is_one else ids


def _joined(base: type, kinds: list[Any]) -> Any:
    """Return a class that has what each of the classes overrides."""
    own = tuple(dict.fromkeys(kind for kind in kinds if kind is not base))
    return own[0] if len(own) == 1 else type(base.__name__, (*own, base), {})


def broken(model: Model, *bugs: str) -> Model:
    """Return a model with a bug, over the same weights and tokenizer; `bugs` are one key of `BUGS`, or several.

    NumPy computes it. The given model does not change. Raises InputError if there is no such bug, or if the model
    cannot have it.
    """
    if isinstance(model, BrokenModel):
        raise InputError(f"{model!r} has a bug already; expected a model without a bug")
    refuse_edits(model)
    if not bugs:
        raise InputError("no bug is given; expected one or several")
    for bug in bugs:
        checked_choice("bug", bug, BUGS)
        if not BUGS[bug]._fits(model):
            raise InputError(f"this model cannot have the bug '{bug}': it needs {BUGS[bug].needs}")
    return BrokenModel(model, *bugs)
