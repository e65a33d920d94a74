"""Two kernels that measure the machine's limits: bytes read in a second, and multiply-adds in a second."""

from __future__ import annotations

from typing import Any

import numba
from numba import types

from mistral_kernels.compiling import kernel, made_once
from mistral_kernels.instructions import LANES
from mistral_kernels.simd import add, load, multiply_add, multiply_add_pairs, splat, sum_of, zeros

N_CHAINS = 12  # sums that do not wait for each other: a multiply-add takes 4 cycles or so, and two may start in each


@made_once
def plain_read() -> Any:
    """Return a kernel: plain_read(floats, n_threads) reads an array once, in four streams a thread."""

    @kernel(types.float32(types.Array(types.float32, 1, "C", readonly=True), types.intp))
    def plain_read(floats: Any, n_threads: int) -> float:
        quarter = len(floats) // n_threads // 4 // LANES * LANES
        sums = [numba.float32(0.0)] * n_threads
        for t in numba.prange(n_threads):
            a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
            start = 4 * quarter * t
            for i in range(start, start + quarter, LANES):
                a0 = add(a0, load(floats, i))
                a1 = add(a1, load(floats, i + quarter))
                a2 = add(a2, load(floats, i + 2 * quarter))
                a3 = add(a3, load(floats, i + 3 * quarter))
            sums[t] = sum_of(add(add(a0, a1), add(a2, a3)))
        return sums[0]

    return plain_read


@made_once
def multiply_add_peak(kind: str = "f32") -> Any:
    """Return a kernel: multiply_add_peak(n, n_threads) does n rounds of N_CHAINS vectors on each thread.

    A vector is LANES multiply-adds of float32, or of "pairs" of bf16 twice as many.
    """
    added = multiply_add_pairs if kind == "pairs" else multiply_add

    @kernel(types.float32(types.intp, types.intp), kind)
    def multiply_add_peak(n: int, n_threads: int) -> float:
        sums = [numba.float32(0.0)] * n_threads
        for t in numba.prange(n_threads):
            x, y = splat(0.999), splat(1e-3 * t)
            a0, a1, a2, a3, a4, a5 = y, y, y, y, y, y
            b0, b1, b2, b3, b4, b5 = x, x, x, x, x, x
            for _ in range(n):
                a0, a1, a2 = added(x, y, a0), added(x, y, a1), added(x, y, a2)
                a3, a4, a5 = added(x, y, a3), added(x, y, a4), added(x, y, a5)
                b0, b1, b2 = added(x, y, b0), added(x, y, b1), added(x, y, b2)
                b3, b4, b5 = added(x, y, b3), added(x, y, b4), added(x, y, b5)
            a0, a1, a2 = add(a0, a1), add(a2, a3), add(a4, a5)
            b0, b1, b2 = add(b0, b1), add(b2, b3), add(b4, b5)
            sums[t] = sum_of(add(add(add(a0, a1), add(a2, b0)), add(b1, b2)))
        return sums[0]

    return multiply_add_peak
