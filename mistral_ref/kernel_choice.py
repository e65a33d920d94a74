"""Which compiled kernel an operation calls. CompiledOps asks before it computes, and when it prepares passes.

A kernel is named by its factory with the arguments. Called, that makes the kernel, once in a process.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import partial
from itertools import product as pairs_of
from typing import Any

import numpy as np

from mistral_kernels import attention, elementwise, limits, panels, sharing
from mistral_kernels.products import Blocks, Codes, Floats
from mistral_kernels.quantized import TOGETHER, matmul_quantized, matvec_quantized
from mistral_ref.block_matrix import BlockMatrix
from mistral_ref.cache import CACHE_DTYPES, DEFAULT_CHUNK
from mistral_ref.config import ModelConfig
from mistral_ref.quantized_matrix import BITS, GROUP_SIZE, QuantizedMatrix
from mistral_ref.rounded_inputs import Bf16Inputs, QuantizedInputs
from mistral_ref.tiled_matrix import TiledMatrix
from mistral_ref.weights import Matrix, Weights, matrices

Kernel = partial[Any]

_NO_SCALE, _NO_UNIT = np.ones((1, 1), np.float32), np.float32(1)
_ROUNDED: tuple[QuantizedInputs, ...] = ("int16", "int8")


def takes_pairs(weight_OI: Matrix, bf16_inputs: Bf16Inputs) -> bool:
    """Return whether a matrix is multiplied by the kernel for pairs of bf16, which rounds the inputs itself."""
    return weight_OI.kind == "bf16" and bf16_inputs == "bfloat16" and weight_OI.shape[1] % 2 == 0


def factor(weight_OI: Matrix, quantized_inputs: QuantizedInputs, bf16_inputs: Bf16Inputs) -> Floats | Codes | Blocks:
    """Return a matrix as kernels take it. It is made once: that would take as long as a small product."""
    how = quantized_inputs, bf16_inputs
    if how not in weight_OI.factors:
        weight_OI.factors[how] = _factor(weight_OI, *how)
    return weight_OI.factors[how]


def _factor(weight_OI: Matrix, quantized_inputs: QuantizedInputs, bf16_inputs: Bf16Inputs) -> Floats | Codes | Blocks:
    if isinstance(weight_OI, QuantizedMatrix):
        how = weight_OI.kind, quantized_inputs, weight_OI.group_size
        return Codes(*how, weight_OI.as_bytes, weight_OI.scale_bytes, weight_OI.unit)
    if isinstance(weight_OI, TiledMatrix):
        how = weight_OI.kind, quantized_inputs, weight_OI.group_size
        return Codes(*how, weight_OI.as_bytes, weight_OI.scale_bytes, _NO_UNIT)
    if isinstance(weight_OI, BlockMatrix):
        return Blocks(weight_OI.kind, quantized_inputs, weight_OI.as_bytes)
    kind = "pairs" if takes_pairs(weight_OI, bf16_inputs) else weight_OI.kind
    return Floats(kind, weight_OI.as_bytes, _NO_SCALE if weight_OI.scale is None else weight_OI.scale)


def write(cache_dtype: np.dtype) -> Kernel:
    """Return the kernel that writes into a store of this dtype."""
    if cache_dtype == np.int8:
        return partial(panels.write_int8)
    return partial(panels.write, "float32" if cache_dtype == np.float32 else "uint16")


def attend(cache_dtype: np.dtype, n_tokens: int, n_heads: int, n_kv_heads: int) -> Kernel:
    """Return the kernel for attention over a store of this dtype.

    A short prompt has that of one token: it would take longer to compile another one than to compute.
    """
    is_few = n_tokens * n_heads <= n_kv_heads * attention.TOGETHER
    kind = {4: "f32", 2: "f16", 1: "int8"}[cache_dtype.itemsize]
    return partial(attention.attention, kind, attention.FEW_ROWS if is_few else attention.MANY_ROWS)


def of_passes(
    config: ModelConfig,
    weights: Weights,
    cache_dtype: str,
    lengths: Collection[int],
    *,
    last_only: bool,
    quantized_inputs: QuantizedInputs,
    bf16_inputs: Bf16Inputs,
) -> list[Kernel]:
    """Return every kernel that passes of these numbers of tokens need.

    last_only   whether only the last token of a pass has logits; in the last layer most products then have one token
    """
    dtype = np.dtype(cache_dtype)
    lengths = {*lengths, 1} if last_only else lengths
    needed = [partial(sharing.serve), partial(elementwise.rms_norm), partial(elementwise.rotate)]
    needed += [partial(elementwise.swiglu), write(dtype)]
    needed += [attend(dtype, length, config.n_heads, config.n_kv_heads) for length in lengths]
    multiplied = [(weights.output, length) for length in ({1} if last_only else lengths)]
    # An expert gets some of a pass's tokens, so it may get one, a few or many.
    some = lengths if config.moe is None else {*lengths, *range(1, min(3, max(lengths)) + 1)}
    multiplied += pairs_of(matrices(weights.layers), some)
    needed += [factor(weight, quantized_inputs, bf16_inputs).kernel(length) for weight, length in multiplied]
    needed += [] if config.moe is None else [partial(elementwise.mix_experts)]
    return _once(needed)


def of_a_model(config: ModelConfig, weights: Weights, *, every_option: bool = False) -> list[Kernel]:
    """Return every kernel that a model can need, with a cache of any dtype, for one token, for a few and for many.

    With quantized weights these are the kernels for inputs of int16 and of int8.

    every_option    also what `quantize`, `quantized_inputs` and `bf16_inputs` lead to, and what `bench` measures with
    """
    is_quantized = any(isinstance(matrix, (QuantizedMatrix, BlockMatrix)) for matrix in matrices(weights))
    roundings: list[tuple[QuantizedInputs, Bf16Inputs]] = [
        (inputs, "float32") for inputs in (_ROUNDED if is_quantized else _ROUNDED[:1])
    ]
    needed: list[Kernel] = []
    if every_option:
        roundings.append(("int16", "bfloat16"))
        for bits, inputs in pairs_of(BITS, _ROUNDED):
            how = f"int{bits}", inputs, GROUP_SIZE
            needed += [partial(matvec_quantized, *how, n_together) for n_together in TOGETHER]
            needed += [partial(matmul_quantized, *how)]
        needed += [partial(limits.plain_read), partial(limits.multiply_add_peak)]
    for (quantized_inputs, bf16_inputs), cache_dtype in pairs_of(roundings, CACHE_DTYPES):
        needed += of_passes(
            config, weights, cache_dtype, {1, 2, 3, DEFAULT_CHUNK},
            last_only=False, quantized_inputs=quantized_inputs, bf16_inputs=bf16_inputs,
        )  # fmt: skip
    return _once(needed)


def _once(kernels: Iterable[Kernel]) -> list[Kernel]:
    return list({(kernel.func, kernel.args): kernel for kernel in kernels}.values())
