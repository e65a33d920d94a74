"""How the inputs of a matrix product are rounded: what can be chosen, and the rounding for quantized matrices.

The compiled kernels multiply matrices of 8 or 4 bits with inputs that are rounded to integers. Each group of inputs has
its own scale. The sums are then sums of integers (mistral_kernels.dots). `rounded` rounds in the same way, so the NumPy
backend computes the same results as the kernels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

QuantizedInputs = Literal["int16", "int8", "float"]  # of quantized matrices; "float": not rounded
Bf16Inputs = Literal["float32", "bfloat16"]  # of bf16 matrices; "float32": not rounded

_LARGEST = {"int16": 32767, "int8": 127}


def rounded(x_TI: np.ndarray, quantized_inputs: QuantizedInputs, group_size: int) -> np.ndarray:
    """Return the inputs (T, I) of a product, rounded for a quantized matrix, in the dtype of `x_TI`.

    In each group of `group_size` neighbouring inputs x becomes scale * q: q is x / scale, rounded to the nearest whole
    number, ties to even. scale is max |x| / 32767 for "int16" and max |x| / 127 for "int8". The scale and q are
    computed in float32. "float" leaves the inputs unchanged.

    >>> rounded(np.array([[1.0, 0.3, -127.0]]), "int8", 32).tolist()
    [[1.0, 0.0, -127.0]]
    """
    if quantized_inputs == "float":
        return x_TI
    n_tokens, n_in = x_TI.shape
    groups = np.zeros((n_tokens, -(-n_in // group_size) * group_size), np.float32)
    groups[:, :n_in] = x_TI
    padded = groups.shape
    groups = groups.reshape(n_tokens, padded[1] // group_size, group_size)
    largest, most = np.float32(_LARGEST[quantized_inputs]), np.abs(groups).max(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        times = largest / most
        q = np.rint(groups * np.where(times < np.inf, times, np.float32(0)))
        values = q.astype(x_TI.dtype) * (most / largest).astype(x_TI.dtype)
    return values.reshape(padded)[:, :n_in]
