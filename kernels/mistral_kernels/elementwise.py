"""The small operations around the products: RMSNorm, RoPE, SwiGLU, and the mixing of experts.

None of them takes long. They are compiled for two reasons. Without that, a token of a small model would spend its time
in NumPy's calls. And a long prompt uses all threads for them.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import types

from mistral_kernels.compiling import FIRST, kernel, made_once, part
from mistral_kernels.instructions import LANES
from mistral_kernels.simd import add, divide, exp, load, load_part, multiply, splat, store, subtract, sum_of, zeros

ROW = types.Array(types.float32, 1, "C", readonly=True)
ROWS_IN = types.Array(types.float32, 2, "C", readonly=True)
ROWS_OUT = types.Array(types.float32, 2, "C")
HEADS_IN = types.Array(types.float32, 3, "C", readonly=True)
HEADS_OUT = types.Array(types.float32, 3, "C")
INDICES = types.Array(types.int64, 1, "C", readonly=True)


@made_once
def rms_norm() -> Any:
    """Return a kernel: rms_norm(x, weight, eps, y, n_threads), y = x / sqrt(mean(x²) + eps) * weight for each row."""

    @part()
    def normalize(x: Any, weight: Any, eps: float, y: Any) -> None:
        n = len(x)
        squares = zeros()
        for i in range(0, n - LANES + 1, LANES):
            squares = add(squares, multiply(load(x, i), load(x, i)))
        rest = load_part(x, n // LANES * LANES, n % LANES)
        mean = sum_of(add(squares, multiply(rest, rest))) / numba.float32(n)
        size = numba.float32(math.sqrt(mean + eps))
        for i in range(n):
            y[i] = x[i] / size * weight[i]

    @kernel(types.void(ROWS_IN, ROW, types.float32, ROWS_OUT, types.intp))
    def rms_norm(x: Any, weight: Any, eps: float, y: Any, n_threads: int) -> None:
        if n_threads == 1:
            for t in range(len(x)):
                normalize(x[t], weight, eps, y[t])
        else:
            for t in numba.prange(len(x)):
                normalize(x[t], weight, eps, y[t])

    return rms_norm


@made_once
def rotate() -> Any:
    """Return a kernel: rotate(x, cos, sin, y, n_threads) turns pairs of neighbours; x and y are (T, heads, K)."""

    @part()
    def turn(x: Any, cos: Any, sin: Any, y: Any) -> None:
        for head in range(len(x)):
            for pair in range(len(cos)):
                x0, x1 = x[head, 2 * pair], x[head, 2 * pair + 1]
                y[head, 2 * pair] = x0 * cos[pair] - x1 * sin[pair]
                y[head, 2 * pair + 1] = x0 * sin[pair] + x1 * cos[pair]

    @kernel(types.void(HEADS_IN, ROWS_IN, ROWS_IN, HEADS_OUT, types.intp))
    def rotate(x: Any, cos: Any, sin: Any, y: Any, n_threads: int) -> None:
        if n_threads == 1:
            for t in range(len(x)):
                turn(x[t], cos[t], sin[t], y[t])
        else:
            for t in numba.prange(len(x)):
                turn(x[t], cos[t], sin[t], y[t])

    return rotate


@made_once
def swiglu() -> Any:
    """Return a kernel: swiglu(gate, up, h, n_threads), h = gate / (1 + e^-gate) * up; arrays of one row."""

    @part()
    def open_gates(gate: Any, up: Any, h: Any, first: int, last: int) -> None:
        one = splat(1.0)
        for i in range(first, last - LANES + 1, LANES):
            g = load(gate, i)
            store(h, i, multiply(divide(g, add(one, exp(subtract(zeros(), g)))), load(up, i)))
        rest = first + (last - first) // LANES * LANES
        for i in range(rest, last):
            h[i] = gate[i] / (numba.float32(1) + numba.float32(math.exp(-gate[i]))) * up[i]

    @kernel(types.void(ROW, ROW, types.Array(types.float32, 1, "C"), types.intp))
    def swiglu(gate: Any, up: Any, h: Any, n_threads: int) -> None:
        n = len(gate)
        if n_threads == 1:
            open_gates(gate, up, h, FIRST, n)
        else:
            n_vectors = n // LANES
            for index in numba.prange(n_threads):
                thread = numba.intp(index)
                last = n_vectors * (thread + 1) // n_threads * LANES
                if thread == n_threads - 1:
                    last = n
                open_gates(gate, up, h, n_vectors * thread // n_threads * LANES, last)

    return swiglu


@made_once
def mix_experts() -> Any:
    """Return a kernel: mix_experts(y, tokens, experts, weights, z), z[t] = sum of weights[t, e] y[n] over its pairs."""

    @kernel(types.void(ROWS_IN, INDICES, INDICES, ROWS_IN, ROWS_OUT), parallel=False)
    def mix_experts(y: Any, tokens: Any, experts: Any, weights: Any, z: Any) -> None:
        z[:] = np.float32(0)
        for n in range(len(y)):
            t, share = tokens[n], weights[tokens[n], experts[n]]
            for i in range(y.shape[1]):
                z[t, i] += share * y[n, i]

    return mix_experts
