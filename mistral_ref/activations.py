"""What the inputs of a product are rounded to: an option of the operations.

Products with matrices of 8 or 4 bits round their inputs too, with a scale of their own for each group, so that what is
summed up are integers (mistral_kernels.dots). `rounded` does the same, for the NumPy backend to compute what the
kernels do.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from mistral_ref.errors import InputError, short_repr

Activations = Literal["int16", "int8", "bfloat16", "float"]

_LARGEST = {"int16": 32767, "int8": 127}


def checked_activations(activations: str) -> Activations:
    """Return what inputs are rounded to if that is known; raise InputError if not."""
    if activations not in get_args(Activations):
        raise InputError(
            f"activations is {short_repr(activations)}; expected one of {', '.join(get_args(Activations))}"
        )
    return activations  # type: ignore[return-value]


def rounded(x_TI: np.ndarray, activations: Activations, group_size: int) -> np.ndarray:
    """Return inputs as products with quantized matrices take them: rounded in float32, in the dtype they came in.

    In each group of neighbours x becomes scale q: q = x / scale to the nearest whole number, ties to even, where
    scale = max |x| / 32767, or 127 for "int8". With "float" they stay as they are.

    >>> rounded(np.array([[1.0, 0.3, -127.0]]), "int8", 32).tolist()
    [[1.0, 0.0, -127.0]]
    """
    if activations == "float":
        return x_TI
    n_tokens, n_in = x_TI.shape
    groups = np.zeros((n_tokens, -(-n_in // group_size) * group_size), np.float32)
    groups[:, :n_in] = x_TI
    padded = groups.shape
    groups = groups.reshape(n_tokens, padded[1] // group_size, group_size)
    largest, most = np.float32(_LARGEST[activations]), np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        times = largest / most
        q = np.rint(groups * np.where(times < np.inf, times, np.float32(0)))
        values = q.astype(x_TI.dtype) * (most / largest).astype(x_TI.dtype)
    return values.reshape(padded)[:, :n_in]
