"""Vectors as Numba values, so that kernels read like their mathematics.

A vector is LANES float32 numbers. This file teaches Numba the type and a few operations, so that kernels name no
machine. Offsets count elements, and nothing is checked. multiply_add rounds once where the machine has an instruction
for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from mistral_kernels.compiling import part
from mistral_kernels.instructions import (
    F32,
    I16,
    I32,
    LANES,
    LINE,
    VECTOR,
    combined,
    constant,
    exp_of,
    fused,
    load_first,
    load_vector,
    prefetch_line,
    splat_of,
    store_vector,
    widened,
)
from mistral_kernels.pairs import pair_products, rounded_to_bf16


class FloatVectorType(types.Type):
    """n float32 numbers."""

    def __init__(self, n: int) -> None:
        self.n = n
        super().__init__(name=f"float32x{n}")


@register_model(FloatVectorType)
class _FloatVectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: FloatVectorType) -> None:
        super().__init__(manager, frontend_type, ir.VectorType(F32, frontend_type.n))


vector = FloatVectorType(LANES)
ARRAY = None  # as the type of a parameter: any array


def operation(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make an operation of a function that writes its instructions.

    The function takes an LLVM builder, which kernels do not see, and LLVM values of the Numba types `parameters`; of an
    ARRAY the address of its first element. It returns a value of the type `result`, a list of values for a tuple, or
    None for types.void.
    """

    def make(write: Callable[..., Any]) -> Any:
        @functools.wraps(write)  # Numba takes the names of all arguments but the first from there
        def typed(typing: Any, *given: Any) -> Any:
            wanted = [have if want is ARRAY else want for have, want in zip(given, parameters, strict=True)]

            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                values = [
                    context.make_array(have)(context, builder, value).data if want is ARRAY else value
                    for have, want, value in zip(wanted, parameters, values, strict=True)
                ]
                written = write(builder, *values)
                if isinstance(written, list):
                    return context.make_tuple(builder, result, written)
                return context.get_dummy_value() if written is None else written

            return result(*wanted), generate

        return intrinsic(typed)

    return make


@part()
def floats(n: int) -> Any:
    """Return an array of n float32 of any content that begins where a cache line does: no vector then lies in two."""
    memory = np.empty(n + LINE // 4, np.float32)
    start = numba.intp(-(memory.ctypes.data // 4) % (LINE // 4))
    return memory[start : start + n]


@operation(types.void, ARRAY, types.intp)
def _ask_for_line(builder: Any, array: Any, offset: Any) -> None:
    prefetch_line(builder, builder.gep(array, [offset]), 0)


@part(borrows=True)
def ask_for(array: Any, start: int, n: int) -> None:
    """Ask for n float32 of an array from a flat offset on, which need not exist, for the second cache."""
    for i in range(start, start + n, LINE // 4):
        _ask_for_line(array, i)


@operation(vector)
def zeros(builder: Any) -> Any:
    """A vector of zeros."""
    return constant(VECTOR, 0.0)


@operation(vector, types.float32)
def splat(builder: Any, x: Any) -> Any:
    """A vector with x in every lane."""
    return splat_of(builder, x, LANES)


@operation(vector, ARRAY, types.intp)
def load(builder: Any, array: Any, offset: Any) -> Any:
    """The LANES float32 of an array that start at a flat offset."""
    return load_vector(builder, builder.gep(array, [offset]), F32, LANES)


@operation(vector, ARRAY, types.intp, types.intp)
def load_part(builder: Any, array: Any, offset: Any, count: Any) -> Any:
    """The first `count` float32 of an array from an offset on, then zeros; nothing beyond them is read."""
    return load_first(builder, builder.gep(array, [offset]), F32, LANES, count)


@operation(types.void, ARRAY, types.intp, vector)
def store(builder: Any, array: Any, offset: Any, value: Any) -> None:
    """Put a vector into a float32 array at a flat offset."""
    store_vector(builder, builder.gep(array, [offset]), value)


@operation(types.void, ARRAY, types.intp, vector)
def store_rounded(builder: Any, array: Any, offset: Any, value: Any) -> None:
    """Put a vector, rounded to bf16, into an array of pairs, `offset` bf16 from its start."""
    address = builder.gep(builder.bitcast(array, I16.as_pointer()), [offset])
    store_vector(builder, address, rounded_to_bf16(builder, value))


@operation(vector, vector)
def rounded(builder: Any, value: Any) -> Any:
    """A vector rounded to bf16."""
    return widened(builder, rounded_to_bf16(builder, value), "bf16")


@operation(vector, vector, vector)
def add(builder: Any, a: Any, b: Any) -> Any:
    """a + b"""
    return builder.fadd(a, b)


@operation(vector, vector, vector)
def subtract(builder: Any, a: Any, b: Any) -> Any:
    """a - b"""
    return builder.fsub(a, b)


@operation(vector, vector, vector)
def multiply(builder: Any, a: Any, b: Any) -> Any:
    """a * b"""
    return builder.fmul(a, b)


@operation(vector, vector, vector)
def divide(builder: Any, a: Any, b: Any) -> Any:
    """a / b"""
    return builder.fdiv(a, b)


@operation(vector, vector, vector, vector)
def multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c"""
    return fused(builder, a, b, c)


@operation(vector, vector, vector, vector)
def multiply_add_pairs(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c for the two bf16 in each lane of a and b; see pairs.pair_products."""
    return pair_products(builder, a, b, c)


@operation(vector, vector)
def exp(builder: Any, x: Any) -> Any:
    """e^x; see instructions.exp_of."""
    return exp_of(builder, x)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


@operation(vector, vector, vector)
def larger(builder: Any, a: Any, b: Any) -> Any:
    """The larger of each pair of lanes; b where either is NaN."""
    return _larger(builder, a, b)


@operation(vector, vector, types.intp, types.intp, types.float32)
def within(builder: Any, a: Any, low: Any, high: Any, other: Any) -> Any:
    """The lanes low, ..., high - 1 of a, and the number `other` in all others; bounds are of 32 bits."""
    lanes = ir.Constant(ir.VectorType(I32, LANES), list(range(LANES)))
    low, high = (splat_of(builder, builder.trunc(bound, I32), LANES) for bound in (low, high))
    from_low, below_high = builder.icmp_signed(">=", lanes, low), builder.icmp_signed("<", lanes, high)
    return builder.select(builder.and_(from_low, below_high), a, splat_of(builder, other, LANES))


@operation(types.float32, vector)
def sum_of(builder: Any, a: Any) -> Any:
    """The sum of a vector's lanes, in pairs."""
    return combined(builder, a, builder.fadd)


@operation(types.float32, vector)
def largest_of(builder: Any, a: Any) -> Any:
    """The largest of a vector's lanes."""
    return combined(builder, a, lambda low, high: _larger(builder, low, high))
