"""The arithmetic that kernels are written in, against NumPy: each operator on vectors and on numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from support.kernels import normal

from mistral_kernels import value
from mistral_kernels.processor import LANES
from mistral_kernels.simd import load, store
from mistral_kernels.value import ARRAY, F32, I8, I16, I32, U8, U16, U32, Address, Value

DTYPES = {"int8": I8, "int16": I16, "int32": I32, "uint8": U8, "uint16": U16, "uint32": U32, "float32": F32}
N = 8
ROOM = 4 * N  # bytes of a result, at most


def computed(functions: list[Callable[[Value, Value], Value]], a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """Return what functions of Values make of two arrays of N numbers. All are compiled together."""
    names: list[str] = []

    @value.operation(types.void, ARRAY, ARRAY, ARRAY)
    def run(out: Address, a: Address, b: Address) -> None:
        for n, write in enumerate(functions):
            result = write(a.load(a.dtype, N), b.load(b.dtype, N))
            names.append(next(name for name, dtype in DTYPES.items() if dtype is result.dtype))
            (out + ROOM * n).store(result)

    @numba.njit
    def call(out: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        run(out, a, b)

    out = np.zeros((len(functions), ROOM), np.uint8)
    call(out.reshape(-1), a, b)
    return [row.view(name) for row, name in zip(out, names, strict=True)]


def assert_same(
    functions: list[Callable[[Any, Any], Any]], expected: list[np.ndarray], a: np.ndarray, b: np.ndarray
) -> None:
    for found, numbers in zip(computed(functions, a, b), expected, strict=True):
        assert found.dtype == numbers.dtype
        np.testing.assert_array_equal(found[: len(numbers)], numbers)


def integers(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return numbers of every sign and size."""
    random, limits = np.random.RandomState(0), np.iinfo(dtype)
    a, b = (random.randint(limits.min, int(limits.max) + 1, N, np.int64).astype(dtype) for _ in range(2))
    a[:3] = limits.min, limits.max, b[2]
    return a, b


ON_INTEGERS: list[Callable[[Any, Any], Any]] = [
    operator.add, operator.sub, operator.mul, operator.and_, operator.or_,
    lambda a, b: a + 3, lambda a, b: 3 - a, lambda a, b: a >> 2, lambda a, b: a << 3, lambda a, b: -a,
]  # fmt: skip


each_dtype = pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32"])


@each_dtype
def test_integers_are_those_of_numpy(dtype: str) -> None:
    """What grows beyond its bits loses the highest ones, and >> keeps the sign of what has one."""
    a, b = integers(dtype)
    with np.errstate(over="ignore"):
        assert_same(ON_INTEGERS, [compute(a, b) for compute in ON_INTEGERS], a, b)


@each_dtype
def test_integers_are_compared_as_those_of_numpy(dtype: str) -> None:
    a, b = integers(dtype)
    signs = [operator.lt, operator.gt, operator.ge]
    functions = [lambda a, b, sign=sign: value.where(sign(a, b), a, b) for sign in signs]
    functions.append(lambda a, b: value.where(a.equals(b), a, 7))
    expected = [np.where(sign(a, b), a, b) for sign in signs]
    assert_same(functions, [*expected, np.where(a == b, a, a.dtype.type(7))], a, b)


@each_dtype
def test_numbers_become_those_of_another_dtype(dtype: str) -> None:
    a, b = integers(dtype)
    functions = [lambda a, b, to=to: a.to(to) for to in DTYPES.values()]
    assert_same(functions, [a.astype(to) for to in DTYPES], a, b)


def test_bits_are_read_as_other_numbers() -> None:
    a, b = integers("uint32")
    functions = [lambda a, b: a.bits_as(U8), lambda a, b: a.bits_as(I16), lambda a, b: a.bits_as(F32).bits_as(U32)]
    assert_same(functions, [a.view(np.uint8), a.view(np.int16), a], a, b)


def test_floats_are_those_of_numpy() -> None:
    a, b = normal(0, 2, N)
    a[:3], b[3] = (np.nan, np.inf, 0), np.nan
    functions = [operator.add, operator.sub, operator.mul, operator.truediv, lambda a, b: 1 / a, lambda a, b: -a]
    with np.errstate(all="ignore"):
        expected = [compute(a, b) for compute in functions]
    functions += [value.larger, lambda a, b: value.where(a.is_nan(), 5.0, a)]
    assert_same(functions, [*expected, np.where(a > b, a, b), np.where(np.isnan(a), np.float32(5), a)], a, b)


def test_lanes_are_chosen_and_combined() -> None:
    a, b = normal(0, 2, N)
    order = [0, 9, 2, 15, 4, 8, 7, 7]
    functions = [
        lambda a, b: a.chosen(order, b), lambda a, b: a.combined(value.larger).spread(N), lambda a, b: a * b.lane(3),
    ]  # fmt: skip
    assert_same(functions, [np.concatenate([a, b])[order], np.full(N, a.max()), a * b[3]], a, b)


def test_a_loop_keeps_its_sums() -> None:
    a, b = integers("int32")

    def added(a: Value, b: Value) -> Value:
        return value.loop(2, value.constant(value.I64, 11), 3, [a], lambda k, sums: [sums[0] + b * k.to(I32)])[0]

    with np.errstate(over="ignore"):
        assert_same([added], [a + b * np.int32(2 + 5 + 8)], a, b)


@numba.njit
def in_numba(a: np.ndarray, b: np.ndarray, out: np.ndarray) -> None:
    for i in range(0, len(a), LANES):
        x, y = load(a, i), load(b, i)
        store(out, i, (1 - x) / (2.0 * y) + -x * 3 - y)


def test_kernels_write_operators_between_vectors_and_numbers() -> None:
    a, b = normal(0, 2, 4 * LANES)
    out = np.zeros_like(a)
    in_numba(a, b, out)
    np.testing.assert_array_equal(out, (1 - a) / (np.float32(2) * b) + -a * 3 - b)
