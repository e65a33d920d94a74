"""Steering vectors: what sets two kinds of texts apart in a step, added to that step of every pass.

The difference of two means is the simplest of them (Turner and others, arXiv:2308.10248; Rimsky and others,
arXiv:2312.06681).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from mistral_ref.errors import InputError, checked_choice, checked_float, short_repr
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt, of_prompt
from mistral_ref.steps import axis_sizes
from mistral_ref.study.edited import edited
from mistral_ref.walk import matching_steps


def steering_vector(
    model: Model,
    step: str,
    texts: Sequence[Prompt],
    others: Sequence[Prompt],
    *,
    over: Literal["last", "mean"] = "last",
) -> np.ndarray:
    """Return the mean of a step's values over some texts, minus the mean over other texts: (D,), or (H, K) for heads.

    step    the name of the step, such as "layers.2.residual_after_ffn"
    over    "last": of each text the value of its last token; "mean": the mean over its tokens, BOS included

    Each text counts as much as any other. The result has the model's dtype; the means are computed in float64. Raises
    InputError.
    """
    checked_choice("over", over, ("last", "mean"))
    _shape(model, step)
    difference = _mean(model, step, texts, over, "texts") - _mean(model, step, others, over, "others")
    return difference.astype(model.ops.dtype)


def _mean(model: Model, step: str, texts: Sequence[Prompt], over: str, argument: str) -> np.ndarray:
    if isinstance(texts, str) or not isinstance(texts, Sequence) or not texts:
        raise InputError(f"{argument} is {short_repr(texts)}; expected a list of texts")
    total = np.zeros(())
    for number, text in enumerate(texts):
        with of_prompt(number):
            value = model.trace(text, keep=step)[step]
        total = total + (value[-1] if over == "last" else value.mean(axis=0, dtype=np.float64))
    return total / len(texts)


def _shape(model: Model, step: str) -> tuple[int, ...]:
    """Return the shape of a step's value for one token; raise InputError if it has no axis of tokens."""
    if matching_steps(step, model.config) != [step]:
        raise InputError(f"{short_repr(step)} means several steps; expected the name of one")
    sizes = axis_sizes(model.config, step, 1)
    if "token" not in sizes:
        raise InputError(f"{step} has no axis of tokens; it has {', '.join(sizes)}")
    return tuple(sizes.values())[1:]


def steered(model: Model, step: str, vector: np.ndarray, scale: float = 1.0) -> Model:
    """Return a model that adds scale times a vector to a step, at every token of every pass.

    step    the name of the step, such as "layers.2.residual_after_ffn"
    vector  as `steering_vector` returns it

    The result generates, chats and traces as the model does; see `edited`. Raises InputError.
    """
    scale, shape = checked_float("scale", scale, -1e30, 1e30), _shape(model, step)
    array = np.asarray(vector)
    if array.shape != shape or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise InputError(f"vector has shape {array.shape} and {array.dtype}; expected finite numbers of shape {shape}")
    added = (scale * array.astype(np.float64)).astype(model.ops.dtype)
    return edited(model, {step: lambda value: value + added})
