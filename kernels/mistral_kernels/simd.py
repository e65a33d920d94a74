"""Vectors as Numba values, so that a kernel above reads like its mathematics.

A vector is LANES float32 numbers. Numba is taught the type, and here a few operations; kernels name no machine. Offsets
count elements, and nothing is checked. A product and the sum after it are rounded once where the machine can.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from mistral_kernels.instructions import (
    F32,
    I64,
    LANES,
    VECTOR,
    combined,
    constant,
    exp_of,
    fused,
    load_first,
    load_vector,
    pointer,
    splat_of,
)


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


@intrinsic
def zeros(typing: Any) -> Any:
    """A vector of zeros."""
    return vector(), lambda context, builder, signature, arguments: constant(VECTOR, 0.0)


@intrinsic
def splat(typing: Any, x: Any) -> Any:
    """A vector with x in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splat_of(builder, context.cast(builder, arguments[0], signature.args[0], types.float32), LANES)

    return vector(x), generate


@intrinsic
def load(typing: Any, array: Any, offset: Any) -> Any:
    """The LANES float32 of an array that start at a flat offset."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return load_vector(builder, pointer(context, builder, array, *arguments), F32, LANES)

    return vector(array, types.intp), generate


@intrinsic
def load_part(typing: Any, array: Any, offset: Any, count: Any) -> Any:
    """The first `count` float32 of an array from an offset on, then zeros; nothing beyond them is read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = pointer(context, builder, array, *arguments[:2])
        return load_first(builder, address, F32, LANES, arguments[2])

    return vector(array, types.intp, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Put a vector into a float32 array at a flat offset."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = pointer(context, builder, array, *arguments[:2])
        builder.store(arguments[2], builder.bitcast(address, VECTOR.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


def _of_vectors(n_arguments: int, write: Callable[..., Any]) -> Callable[..., Any]:
    """Return the intrinsic of vectors that `write(builder, ...)` writes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return write(builder, *arguments)

    if n_arguments == 1:
        return intrinsic(lambda typing, a: (vector(a), generate))
    if n_arguments == 2:
        return intrinsic(lambda typing, a, b: (vector(a, b), generate))
    return intrinsic(lambda typing, a, b, c: (vector(a, b, c), generate))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


add = _of_vectors(2, lambda builder, a, b: builder.fadd(a, b))
subtract = _of_vectors(2, lambda builder, a, b: builder.fsub(a, b))
multiply = _of_vectors(2, lambda builder, a, b: builder.fmul(a, b))
divide = _of_vectors(2, lambda builder, a, b: builder.fdiv(a, b))
larger = _of_vectors(2, _larger)
multiply_add = _of_vectors(3, fused)
exp = _of_vectors(1, exp_of)


@intrinsic
def within(typing: Any, a: Any, low: Any, high: Any, other: Any) -> Any:
    """The lanes low, ..., high - 1 of a, and the number `other` in all lanes before and after them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, low, high, other = arguments
        lanes = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
        from_low = builder.icmp_signed(">=", lanes, splat_of(builder, low, LANES))
        below_high = builder.icmp_signed("<", lanes, splat_of(builder, high, LANES))
        return builder.select(builder.and_(from_low, below_high), value, splat_of(builder, other, LANES))

    return vector(vector, types.intp, types.intp, types.float32), generate


@intrinsic
def sum_of(typing: Any, a: Any) -> Any:
    """The sum of a vector's lanes, in pairs."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return combined(builder, arguments[0], builder.fadd)

    return types.float32(a), generate


@intrinsic
def largest_of(typing: Any, a: Any) -> Any:
    """The largest of a vector's lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return combined(builder, arguments[0], lambda low, high: _larger(builder, low, high))

    return types.float32(a), generate
