"""The small operations around the products: RMSNorm, RoPE, SwiGLU, and the mixing of experts.

None of them takes long. They are compiled for two reasons. Without that, a token of a small model would spend its time
in NumPy's calls. And a long prompt uses all threads for them.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from numba import types

from mistral_kernels.arrays import (
    HEADS_IN,
    HEADS_OUT,
    INDICES,
    MATRIX_IN,
    MATRIX_OUT,
    VECTOR_IN,
    VECTOR_OUT,
    Floats,
    Integers,
    Kernel,
)
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.processor import LANES
from mistral_kernels.sharing import shared_out
from mistral_kernels.simd import exp, load, load_part, store, store_part, sum_of, zeros


def plain_rms_norm(x: Floats, weight: Floats, eps: float, y: Floats) -> None:
    """y = x / sqrt(mean(x²) + eps) * weight for each row of x and y (T, D); weight is (D,)."""
    for t in range(len(x)):
        mean = sum(x_i * x_i for x_i in x[t]) / len(x[t])
        for i in range(len(x[t])):
            y[t, i] = x[t, i] / math.sqrt(mean + eps) * weight[i]


@made_once
def rms_norm() -> Kernel:
    """Return a kernel: rms_norm(x, weight, eps, y, threads) does what plain_rms_norm does."""

    @part(borrows=True)
    def normalize(x: Floats, weight: Floats, eps: float, y: Floats) -> None:
        n = len(x)
        squares = zeros()
        for i in range(0, n - LANES + 1, LANES):
            squares = squares + load(x, i) * load(x, i)
        rest = load_part(x, n // LANES * LANES, n % LANES)
        mean = sum_of(squares + rest * rest) / numba.float32(n)
        size = numba.float32(math.sqrt(mean + eps))
        for i in range(n):
            y[i] = x[i] / size * weight[i]

    @part(borrows=True)
    def normalize_rows(first: int, last: int, x: Floats, weight: Floats, eps: float, y: Floats) -> None:
        for t in range(first, last):
            normalize(x[t], weight, eps, y[t])

    @kernel(types.void(MATRIX_IN, VECTOR_IN, types.float32, MATRIX_OUT, types.intp))
    def rms_norm(x: Floats, weight: Floats, eps: float, y: Floats, threads: int) -> None:
        shared_out(normalize_rows, len(x), threads, (x, weight, eps, y))

    return rms_norm


@made_once
def rotate() -> Kernel:
    """Return a kernel: rotate(x, cos, sin, y, threads) turns pairs of neighbours; x and y are (T, heads, K)."""

    @part(borrows=True)
    def turn(x: Floats, cos: Floats, sin: Floats, y: Floats) -> None:
        for head in range(len(x)):
            for pair in range(len(cos)):
                x0, x1 = x[head, 2 * pair], x[head, 2 * pair + 1]
                y[head, 2 * pair] = x0 * cos[pair] - x1 * sin[pair]
                y[head, 2 * pair + 1] = x0 * sin[pair] + x1 * cos[pair]

    @part(borrows=True)
    def turn_rows(first: int, last: int, x: Floats, cos: Floats, sin: Floats, y: Floats) -> None:
        for t in range(first, last):
            turn(x[t], cos[t], sin[t], y[t])

    @kernel(types.void(HEADS_IN, MATRIX_IN, MATRIX_IN, HEADS_OUT, types.intp))
    def rotate(x: Floats, cos: Floats, sin: Floats, y: Floats, threads: int) -> None:
        shared_out(turn_rows, len(x), threads, (x, cos, sin, y))

    return rotate


def plain_swiglu(gate: Floats, up: Floats, h: Floats) -> None:
    """h = gate / (1 + e^-gate) * up; arrays of one row."""
    for i in range(len(gate)):
        h[i] = gate[i] / (1 + math.exp(-gate[i])) * up[i]


@made_once
def swiglu() -> Kernel:
    """Return a kernel: swiglu(gate, up, h, threads) does what plain_swiglu does."""

    @part(borrows=True)
    def open_gates(first: int, last: int, gate: Floats, up: Floats, h: Floats) -> None:
        """Compute the vectors first, ..., last - 1. The last of all may be a part of one."""
        n = len(gate)
        whole = min(last, n // LANES)
        for i in range(first * LANES, whole * LANES, LANES):
            g = load(gate, i)
            store(h, i, g / (1 + exp(-g)) * load(up, i))
        for i in range(whole * LANES, min(last * LANES, n), LANES):
            g = load_part(gate, i, n - i)
            store_part(h, i, g / (1 + exp(-g)) * load_part(up, i, n - i), n - i)

    @kernel(types.void(VECTOR_IN, VECTOR_IN, VECTOR_OUT, types.intp))
    def swiglu(gate: Floats, up: Floats, h: Floats, threads: int) -> None:
        shared_out(open_gates, (len(gate) + LANES - 1) // LANES, threads, (gate, up, h))

    return swiglu


@made_once
def mix_experts() -> Kernel:
    """Return a kernel: mix_experts(y, tokens, experts, weights, z), z[t] = sum of weights[t, e] y[n] over its pairs."""

    @kernel(types.void(MATRIX_IN, INDICES, INDICES, MATRIX_IN, MATRIX_OUT))
    def mix_experts(y: Floats, tokens: Integers, experts: Integers, weights: Floats, z: Floats) -> None:
        z[:] = np.float32(0)
        for n in range(len(y)):
            t, share = tokens[n], weights[tokens[n], experts[n]]
            for i in range(y.shape[1]):
                z[t, i] += share * y[n, i]

    return mix_experts
