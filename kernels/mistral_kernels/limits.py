"""Two kernels that measure the machine's limits: bytes read in a second, and multiply-adds in a second."""

from __future__ import annotations

import numpy as np
from numba import types

from mistral_kernels.arrays import VECTOR_IN, Floats, Kernel
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.processor import LANES
from mistral_kernels.sharing import count_of, shared_out
from mistral_kernels.simd import load, multiply_add, multiply_add_pairs, splat, sum_of, zeros

N_CHAINS = 12  # sums that do not wait for each other: a multiply-add takes 4 cycles or so, and two may start in each


@made_once
def plain_read() -> Kernel:
    """Return a kernel: plain_read(floats, threads) reads an array once, in four streams a thread."""

    @part()
    def read(first: int, last: int, floats: Floats, sums: Floats) -> None:
        quarter = len(floats) // len(sums) // 4 // LANES * LANES
        for t in range(first, last):
            a0, a1, a2, a3 = zeros(), zeros(), zeros(), zeros()
            start = 4 * quarter * t
            for i in range(start, start + quarter, LANES):
                a0 = a0 + load(floats, i)
                a1 = a1 + load(floats, i + quarter)
                a2 = a2 + load(floats, i + 2 * quarter)
                a3 = a3 + load(floats, i + 3 * quarter)
            sums[t] = sum_of((a0 + a1) + (a2 + a3))

    @kernel(types.float32(VECTOR_IN, types.intp))
    def plain_read(floats: Floats, threads: int) -> float:
        sums = np.zeros(count_of(threads), np.float32)
        shared_out(read, len(sums), threads, (floats, sums))
        return sums[0]

    return plain_read


@made_once
def multiply_add_peak(kind: str = "f32") -> Kernel:
    """Return a kernel: multiply_add_peak(n, threads) does n rounds of N_CHAINS vectors on each thread.

    A vector is LANES multiply-adds of float32, or of "pairs" of bf16 twice as many.
    """
    added = multiply_add_pairs if kind == "pairs" else multiply_add

    @part(kind)
    def multiply(first: int, last: int, n: int, sums: Floats) -> None:
        for t in range(first, last):
            x, y = splat(0.999), splat(1e-3 * t)
            a0, a1, a2, a3, a4, a5 = y, y, y, y, y, y
            b0, b1, b2, b3, b4, b5 = x, x, x, x, x, x
            for _ in range(n):
                a0, a1, a2 = added(x, y, a0), added(x, y, a1), added(x, y, a2)
                a3, a4, a5 = added(x, y, a3), added(x, y, a4), added(x, y, a5)
                b0, b1, b2 = added(x, y, b0), added(x, y, b1), added(x, y, b2)
                b3, b4, b5 = added(x, y, b3), added(x, y, b4), added(x, y, b5)
            a0, a1, a2 = a0 + a1, a2 + a3, a4 + a5
            b0, b1, b2 = b0 + b1, b2 + b3, b4 + b5
            sums[t] = sum_of(((a0 + a1) + (a2 + b0)) + (b1 + b2))

    @kernel(types.float32(types.intp, types.intp), kind)
    def multiply_add_peak(n: int, threads: int) -> float:
        sums = np.zeros(count_of(threads), np.float32)
        shared_out(multiply, len(sums), threads, (n, sums))
        return sums[0]

    return multiply_add_peak
