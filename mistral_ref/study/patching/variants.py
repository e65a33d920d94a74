"""Variants of a text's pass: each has other values at one place of one step, and only what follows it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from mistral_ref.cache import DEFAULT_CHUNK
from mistral_ref.model import Model
from mistral_ref.steps import LORA_A, LORA_B, catalogue_of
from mistral_ref.study.patching.branches import BranchedPass
from mistral_ref.study.patching.places import Place, of_queries, of_tokens, zeros_of_pairs
from mistral_ref.walk import Edit, Walk, inside_attention

TOGETHER = DEFAULT_CHUNK  # as many tokens go through the model together, or those of one variant
# In the last layer only these steps of earlier tokens reach the last one: they lead to keys and values.
_TO_KEYS = ("attention_norm", "k", "v", "k_rotated")


def layer_of(name: str) -> tuple[int, bool]:
    """Return the layer at which a pass begins for another value of a step, and whether the step is this layer's input.

    >>> layer_of("embedding"), layer_of("layers.3.heads"), layer_of("layers.3.residual_after_ffn")
    ((0, True), (3, False), (4, True))
    """
    if name == "embedding":
        return 0, True
    _, layer, short = name.split(".")
    is_end = short == "residual_after_ffn"
    return int(layer) + is_end, is_end


class Variants:
    """A text whose pass is kept so far that passes with other values can begin in its middle.

    logits_V    the logits after its last token
    values      name -> value of the steps that are to change
    computed    how many tokens have gone through how many layers, added up over all passes
    """

    def __init__(self, model: Model, ids: Sequence[int], names: Sequence[str]) -> None:
        self._model, self._n_tokens, self._n_layers = model, len(ids), model.config.n_layers
        inputs = ["embedding", *(f"layers.{layer}.residual_after_ffn" for layer in range(self._n_layers))]
        stored = [f"layers.{layer}.{part}" for layer in range(self._n_layers) for part in ("k_rotated", "v")]
        trace = model.trace(ids, keep=[*inputs, *stored, *names])
        self.values = {name: trace[name] for name in names}
        self._inputs = [trace[name] for name in inputs]
        self._text = {n: (trace[f"layers.{n}.k_rotated"], trace[f"layers.{n}.v"]) for n in range(self._n_layers)}
        self.computed = self._n_tokens * self._n_layers
        last = self._branched([Place(self._n_tokens - 1, None)])
        (self.logits_V,) = self._finish(last, self._n_layers, self._inputs[-1][-1:], [])

    def logits(self, name: str, places: Sequence[Place], new: np.ndarray) -> Iterator[tuple[Place, np.ndarray]]:
        """Yield each place, and the logits (V,) after the last token if the step has the values of `new` there.

        new     like the step's value

        A pass takes several variants. None is needed for a place that cannot reach the last token.
        """
        reaching = [place for place in places if self._reaches(name, place)]
        yield from ((place, self.logits_V) for place in places if place not in reaching)
        for batch in self._batches(reaching):
            yield from zip(batch, self._changed(name, batch, new), strict=True)

    def _reaches(self, name: str, place: Place) -> bool:
        if place.token in (None, self._n_tokens - 1):
            return True
        layer, is_input = layer_of(name)
        short = name.rpartition(".")[2].removesuffix(LORA_A).removesuffix(LORA_B)
        return layer < self._n_layers - (0 if is_input or short in _TO_KEYS else 1)

    def _batches(self, places: Sequence[Place]) -> Iterator[list[Place]]:
        batch: list[Place] = []
        n_in_batch = 0
        for place in places:
            n_tokens = self._n_tokens - (place.token or 0)
            if batch and n_in_batch + n_tokens > TOGETHER:
                yield batch
                batch, n_in_batch = [], 0
            batch.append(place)
            n_in_batch += n_tokens
        if batch:
            yield batch

    def _changed(self, name: str, places: Sequence[Place], new: np.ndarray) -> np.ndarray:
        """Return the logits (P, V) of a pass with a branch for each place."""
        layer, is_input = layer_of(name)
        branched = self._branched(places)
        x_TD = np.concatenate([self._inputs[layer][start:] for start in branched.starts])
        self.computed += len(x_TD) * (self._n_layers - layer)

        axes = catalogue_of(self._model.config)[name.rpartition(".")[2]].axes
        if is_input:
            x_TD = of_tokens(places, branched, new)(x_TD)
            return self._finish(branched, layer, x_TD if layer < self._n_layers else x_TD[branched.last], [])
        if "query" in axes:
            edits = [(name, of_queries(places, new))]
        elif "pair" in axes:
            edits = zeros_of_pairs(name, places, branched)
        else:
            edits = [(name, of_tokens(places, branched, new))]
        return self._finish(branched, layer, x_TD, edits)

    def _branched(self, places: Sequence[Place]) -> BranchedPass:
        starts = [place.token or 0 for place in places]
        return BranchedPass(self._model.config, self._model.ops, self._text, starts, self._n_tokens)

    def _finish(
        self, branched: BranchedPass, layer: int, x_TD: np.ndarray, edits: Sequence[tuple[str, Edit]]
    ) -> np.ndarray:
        """Return the logits (P, V) after each branch's last token, of a pass that begins at a layer with x_TD."""
        transformer, ops = self._model.transformer, self._model.ops
        lengths = {len(x_TD), len(branched.starts), *(self._n_tokens - start for start in branched.starts)}
        ops.prepare(transformer.config, transformer.weights, ops.dtype.name, lengths, last_only=True)
        transformer.weights.check_files()
        none = np.empty(0, np.int64)  # the tokens' ids are needed for the embedding alone
        steps = transformer.forward_steps(
            none, branched, last_only=True, first_layer=layer, x_TD=x_TD,
            observe_attention=inside_attention(name for name, _ in edits),
        )  # fmt: skip
        return Walk(steps, ops, edits, branched).finish()
