"""LivePass: one pass, whose values are found when they are asked for, in a bounded part of the memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError, Progress
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.steps import Step, count_values, step_names
from mistral_ref.study.page_data import Entry, lens_entry, pass_entry, rms, rope_entry, step_entry, values_entry
from mistral_ref.trace import Trace
from mistral_ref.walk import Edits, matching_steps

_MOST_KEPT = 2**25  # values of a pass: 128 MiB in float32
_MOST_SENT = 2**22  # values of a step: about 8 MB. Of a step with more a picture is sent
_ALWAYS_KEPT = ("embedding", "*.residual_after_ffn", "layers.0.q", "layers.0.k", "logits")


class LivePass:
    """The pass of some tokens through a model, with edits.

    The pass is taken once, and keeps all steps, or as many kinds of steps as there is room for. When another step is
    asked for, the pass is taken again, and keeps the steps of this kind until a third kind is asked for.

    `progress` is called before each step; what it raises ends the pass. Raises InputError as `Model.steps`.
    """

    def __init__(self, model: Model, prompt: Prompt, edits: Edits, progress: Progress) -> None:
        self.model, self.ids, self._edits = model, model.token_ids(prompt), edits
        self._names = list(step_names(model.config))
        self._entries: list[Entry] = []
        self._kept, self._again = dict[str, Step](), dict[str, Step]()
        self._sizes: dict[str, list[float | None]] = {}
        kept = _kept(model.config, len(self.ids))
        for step in self._walk(progress):
            self._entries.append(step_entry(step))
            if step.name in kept:
                self._kept[step.name] = step

    def _walk(self, progress: Progress) -> Iterator[Step]:
        for done, step in enumerate(self.model.steps(self.ids, edits=self._edits), 1):
            progress(done, len(self._names))
            yield step

    def about(self, title: str) -> Entry:
        """Return what the page says of the pass before any values."""
        q_TK, k_TK = (self._kept[f"layers.0.{kind}"].value[:, 0] for kind in "qk")
        return pass_entry(self.model, title, self.ids, 0) | {
            "steps": self._entries,
            "rope": rope_entry(self.model.config, q_TK[-1], k_TK[0]),
            "cost": None,
        }

    def kept(self) -> Iterator[Step]:
        """Yield the steps whose values are kept, in the order of the pass."""
        yield from self._kept.values()

    def step(self, name: str, progress: Progress) -> Step:
        """Return the step with this name."""
        if name not in self._kept and name not in self._again:
            self._take_again(name.rpartition(".")[2], name, progress)
        return self._kept.get(name) or self._again[name]

    def _take_again(self, kind: str, name: str, progress: Progress) -> None:
        """Take the pass again, and find the sizes of a kind of step. Keep the step `name`, and others if there is room.

        The room is that of the pass itself once more.
        """
        again: dict[str, Step] = {}
        sizes = dict.fromkeys(in_layers(kind, self.model.config))
        room = _MOST_KEPT
        for step in self._walk(progress):
            if step.name in sizes:
                sizes[step.name] = rms(step, self.model.config)
            if step.name == name or (step.name in sizes and step.value.size <= room):
                again[step.name] = step
                room -= step.value.size
        self._again, self._sizes[kind] = again, list(sizes.values())

    def sizes(self, kind: str, progress: Progress) -> list[float | None]:
        """Return the root mean square of a kind of step in every layer; None where a layer has no such step."""
        names = in_layers(kind, self.model.config)
        if kind not in self._sizes and self._kept.keys() >= set(names) & set(self._names):
            steps = [self._kept.get(name) for name in names]
            self._sizes[kind] = [None if step is None else rms(step, self.model.config) for step in steps]
        if kind not in self._sizes:
            self._take_again(kind, "", progress)
        return self._sizes[kind]

    def lens(self) -> Entry:
        """Return the likeliest next tokens after every layer."""
        names = ("embedding", *in_layers("residual_after_ffn", self.model.config))
        return lens_entry(self.model, Trace([self._kept[name] for name in names], self.ids, [""] * len(self.ids)))

    @property
    def logits(self) -> np.ndarray:
        """The logits (T, V)."""
        return self._kept["logits"].value


def sent(step: Step, config: ModelConfig) -> Entry:
    """Return the values of a step as the page gets them."""
    return values_entry(step, config, is_whole=step.value.size <= _MOST_SENT)


def difference(before: Step, after: Step) -> Step:
    """Return a step whose value is `after` less `before`; where both hold the same infinity, it stays.

    Raises InputError if their shapes differ.
    """
    if before.value.shape != after.value.shape:
        raise InputError(
            f"{after.name} has shape {before.value.shape} before and {after.value.shape} after: there is no difference"
        )
    with np.errstate(invalid="ignore"):
        value = np.where(before.value == after.value, 0, after.value - before.value)
    value = np.where(np.isinf(after.value) & (before.value == after.value), after.value, value)
    return Step(after.name, after.kind, value.astype(after.value.dtype), after.key_positions)


def in_layers(kind: str, config: ModelConfig) -> list[str]:
    """Return the names of a kind of step in every layer, also where a layer has no such step."""
    return [f"layers.{layer}.{kind}" for layer in range(config.n_layers)]


def _kept(config: ModelConfig, n_tokens: int) -> set[str]:
    """Return the names of the steps that a pass keeps: attention weights first, then as they come in the pass."""
    kept = set(matching_steps(_ALWAYS_KEPT, config))
    room = _MOST_KEPT - count_values(config, n_tokens, 0, kept)
    of_kind: dict[str, list[str]] = {"attention_weights": []}
    for name in step_names(config):
        of_kind.setdefault(name.rpartition(".")[2], []).append(name)
    for names in of_kind.values():
        more = [name for name in names if name not in kept]
        size = count_values(config, n_tokens, 0, more)
        if size <= room:
            kept.update(more)
            room -= size
    return kept
