"""Which kernel multiplies a matrix with some tokens, and how it is called: one class for each form of matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mistral_kernels.blocks import PACKINGS
from mistral_kernels.matmul import matmul, slab_shape
from mistral_kernels.matvec import FEW, ONE, matvec
from mistral_kernels.packed import matmul_blocks, matvec_blocks
from mistral_kernels.pool import ArrayPool
from mistral_kernels.quantized import TOGETHER, matmul_quantized, matvec_quantized, slab_shapes

TOKENS_AT_ONCE = 512  # the results of one product should stay in the processor's caches


def _chunks(n_tokens: int) -> Iterator[slice]:
    for start in range(0, n_tokens, TOKENS_AT_ONCE):
        yield slice(start, min(start + TOKENS_AT_ONCE, n_tokens))


def _multiply_rounded(
    factor: Codes | Blocks, stored: Sequence[Any], group: int, x_TI: np.ndarray, y_TO: np.ndarray, threads: int,
    pool: ArrayPool,
) -> None:  # fmt: skip
    """Compute y = x Wᵀ by the kernels that round x, a group at a time; `stored` is the matrix as they take it."""
    make = factor.kernel(len(x_TI))
    if make.func in (matvec_quantized, matvec_blocks):
        make()(*stored, x_TI, y_TO, threads)
        return
    for rows in _chunks(len(x_TI)):
        q_shape, scales_shape = slab_shapes(group, *x_TI[rows].shape)
        q, scales_x = pool.empty(q_shape, factor.inputs), pool.empty(scales_shape)
        make()(*stored, x_TI[rows], q, scales_x, y_TO[rows], threads)


class Floats(NamedTuple):
    """A matrix (O, I) of floats.

    kind    "f32", "f16", "bf16", "fp8", or "pairs": bf16, with inputs rounded to bf16, and I even
    data    its numbers, row after row, as bytes
    scales  of fp8 weights, as in matvec.matvec
    """

    kind: str
    data: np.ndarray
    scales: np.ndarray

    def kernel(self, n_tokens: int) -> partial[Any]:
        """Return what makes the kernel for a number of tokens: a factory with its arguments.

        matmul widens each weight once for all tokens. For few tokens it is not worth it to transpose the matrix.
        Widening fp8 takes as long as several products. So for fp8 matmul is faster from fewer tokens on.
        """
        few = 4 if self.kind == "fp8" else 24
        if 0 < n_tokens <= few:
            return partial(matvec, self.kind, ONE if n_tokens == 1 else FEW)
        return partial(matmul, self.kind)

    def multiply(self, x_TI: np.ndarray, y_TO: np.ndarray, threads: int, pool: ArrayPool) -> None:
        """Compute y = x Wᵀ; `threads` is what team.team returns."""
        make = self.kernel(len(x_TI))
        if make.func is matvec:
            make()(self.data, self.scales, x_TI, y_TO, threads)
            return
        for rows in _chunks(len(x_TI)):
            slabs = pool.empty(slab_shape(self.kind, *x_TI[rows].shape))
            make()(self.data, self.scales, x_TI[rows], slabs, y_TO[rows], threads)


class Codes(NamedTuple):
    """A matrix (O, I) of codes in tile order, whose inputs are rounded to integers.

    kind    "int8", "int4", or a type of blocks.PACKINGS
    inputs  "int16" or "int8"
    group   inputs that share a scale
    data, scales, unit      as quantized.matvec_quantized has them
    """

    kind: str
    inputs: str
    group: int
    data: np.ndarray
    scales: np.ndarray
    unit: np.float32

    def kernel(self, n_tokens: int) -> partial[Any]:
        """Return what makes the kernel for a number of tokens: a factory with its arguments.

        To fill a panel takes as long as to multiply the tiles with some tokens.
        """
        how = self.kind, self.inputs, self.group
        if 0 < n_tokens <= max(TOGETHER):
            return partial(matvec_quantized, *how, min(n for n in TOGETHER if n >= n_tokens))
        return partial(matmul_quantized, *how)

    def multiply(self, x_TI: np.ndarray, y_TO: np.ndarray, threads: int, pool: ArrayPool) -> None:
        """Compute y = x Wᵀ; `threads` is what team.team returns."""
        _multiply_rounded(self, (self.data, self.scales, self.unit), self.group, x_TI, y_TO, threads, pool)


class Blocks(NamedTuple):
    """A matrix (O, I) in a packed type of GGUF files, whose inputs are rounded to integers.

    kind    "q2_k" to "q8_0": a type of blocks.PACKINGS
    inputs  "int16" or "int8"
    data    its blocks, row after row, as bytes
    """

    kind: str
    inputs: str
    data: np.ndarray

    def kernel(self, n_tokens: int) -> partial[Any]:
        """Return what makes the kernel for a number of tokens: a factory with its arguments."""
        return partial(matvec_blocks if n_tokens == 1 else matmul_blocks, self.kind, self.inputs)

    def multiply(self, x_TI: np.ndarray, y_TO: np.ndarray, threads: int, pool: ArrayPool) -> None:
        """Compute y = x Wᵀ; `threads` is what team.team returns."""
        _multiply_rounded(self, (self.data,), PACKINGS[self.kind].group, x_TI, y_TO, threads, pool)
