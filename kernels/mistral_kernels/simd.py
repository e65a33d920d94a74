"""Vectors as Numba values, so that kernels read like their mathematics.

A vector is LANES float32 numbers. Kernels compute with vectors as with numbers: `g / (1 + exp(-g)) * load(up, i)`. A
number that meets a vector stands in every lane. Offsets count elements, and nothing is checked.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numba
import numpy as np
from numba import types

from mistral_kernels import value
from mistral_kernels.compiling import part
from mistral_kernels.pairs import pair_products
from mistral_kernels.processor import LANES, LINE
from mistral_kernels.stored import rounded_to_bf16, widened
from mistral_kernels.value import ARRAY, F32, I32, U16, Address, FloatVectorType, Value, constant, operation, where

vector = FloatVectorType(LANES)
for _sign in (operator.add, operator.sub, operator.mul, operator.truediv):
    value.operator_of_vectors(_sign, vector)
value.negation_of_vectors(vector)


@part()
def floats(n: int) -> Any:
    """Return an array of n float32 of any content that begins where a cache line does: no vector then lies in two."""
    memory = np.empty(n + LINE // 4, np.float32)
    start = numba.intp(-(memory.ctypes.data // 4) % (LINE // 4))
    return memory[start : start + n]


@operation(types.void, ARRAY, types.intp)
def _ask_for_line(array: Address, offset: Value) -> None:
    (array + offset).prefetch()


@part(borrows=True)
def ask_for(array: Any, start: int, n: int) -> None:
    """Ask for n float32 of an array from a flat offset on, which need not exist, for the second cache."""
    for i in range(start, start + n, LINE // 4):
        _ask_for_line(array, i)


@operation(vector)
def zeros() -> Value:
    """A vector of zeros."""
    return constant(F32, 0.0, LANES)


@operation(vector, types.float32)
def splat(x: Value) -> Value:
    """A vector with x in every lane."""
    return x.spread(LANES)


@operation(vector, ARRAY, types.intp)
def load(array: Address, offset: Value) -> Value:
    """The LANES float32 of an array that start at a flat offset."""
    return (array + offset).load(F32, LANES)


@operation(vector, ARRAY, types.intp, types.intp)
def load_part(array: Address, offset: Value, count: Value) -> Value:
    """The first `count` float32 of an array from an offset on, then zeros; nothing beyond them is read."""
    return (array + offset).load_first(F32, LANES, count)


@operation(types.void, ARRAY, types.intp, vector)
def store(array: Address, offset: Value, value: Value) -> None:
    """Put a vector into a float32 array at a flat offset."""
    (array + offset).store(value)


@operation(types.void, ARRAY, types.intp, vector, types.intp)
def store_part(array: Address, offset: Value, value: Value, count: Value) -> None:
    """Put the first `count` numbers of a vector into a float32 array; nothing beyond them is written."""
    (array + offset).store_first(value, count)


@operation(types.void, ARRAY, types.intp, vector)
def store_rounded(array: Address, offset: Value, value: Value) -> None:
    """Put a vector, rounded to bf16, into an array of pairs, `offset` bf16 from its start."""
    (array.of(U16) + offset).store(rounded_to_bf16(value))


@operation(vector, vector)
def rounded(value: Value) -> Value:
    """A vector rounded to bf16."""
    return widened(rounded_to_bf16(value), "bf16")


@operation(vector, vector, vector, vector)
def multiply_add(a: Value, b: Value, c: Value) -> Value:
    """a * b + c, rounded once where the processor has an instruction for it."""
    return value.fma(a, b, c)


@operation(vector, vector, vector, vector)
def multiply_add_pairs(a: Value, b: Value, c: Value) -> Value:
    """a * b + c for the two bf16 in each lane of a and b; see pairs.pair_products."""
    return pair_products(a, b, c)


@operation(vector, vector)
def exp(x: Value) -> Value:
    """e^x: 2^n e^r with n whole and |r| <= ln(2)/2, e^r by Cephes' polynomial, 1e-7 off at most.

    Below -87.3 it stays at e^-87.3, above 88.3 it may be infinite, and from 89 on it is; NaN stays NaN.
    """
    fma = value.fma
    x = where(x < -87.3, -87.3, x)
    x = where(x > 89.0, 89.0, x)
    shifted = fma(x, 1 / math.log(2), 1.5 * 2**23)  # leaves n in the lowest bits
    n = shifted - 1.5 * 2**23
    r = fma(n, 2.12194440e-4, fma(n, -0.693359375, x))
    polynomial = constant(F32, 1.9875691500e-4, LANES)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        polynomial = fma(polynomial, r, coefficient)
    power = fma(polynomial, r * r, r) + 1.0
    return power * ((shifted.bits_as(I32) + 127) << 23).bits_as(F32)


@operation(vector, vector, vector)
def larger(a: Value, b: Value) -> Value:
    """The larger of each pair of lanes; b where either is NaN."""
    return value.larger(a, b)


@operation(vector, vector, types.intp, types.intp, types.float32)
def within(a: Value, low: Value, high: Value, other: Value) -> Value:
    """The lanes low, ..., high - 1 of a, and the number `other` in all others; bounds are of 32 bits."""
    lanes = constant(I32, range(LANES), LANES)
    return where((lanes >= low.to(I32)) & (lanes < high.to(I32)), a, other)


@operation(types.float32, vector)
def sum_of(a: Value) -> Value:
    """The sum of a vector's lanes, in pairs."""
    return a.combined(operator.add)


@operation(types.float32, vector)
def largest_of(a: Value) -> Value:
    """The largest of a vector's lanes."""
    return a.combined(value.larger)
