"""Sums of products of codes and rounded inputs, as this processor computes them: as exact as NumPy's integers."""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import pytest
from numba import types

from mistral_kernels.dots import INPUTS, LARGEST, code_products, words_of_four
from mistral_kernels.pairs import no_dots, total_of
from mistral_kernels.processor import LANES, sums_of_bytes
from mistral_kernels.value import ARRAY, U8, Address, operation

FOURS = 32  # of codes in each lane: as in the largest group
WAYS = [(bits, inputs, lanes) for bits in (4, 8) for inputs in INPUTS for lanes in (LANES, max(LANES, 8))]


def dots() -> Any:
    """Return a function that puts the sums of all WAYS into rows of bytes."""

    @operation(types.void, ARRAY, types.UniTuple(types.intp, len(WAYS)), types.UniTuple(types.intp, len(WAYS)))
    def run(out: Address, all_codes: Any, all_x: Any) -> None:
        for n, (bits, inputs, lanes) in enumerate(WAYS):
            codes, x = all_codes[n].address(U8), all_x[n].address(INPUTS[inputs])
            sums, n_words = no_dots(lanes, words_of_four(inputs)), words_of_four(inputs)
            for four in range(FOURS):
                words = [
                    (x + (four * n_words + word) * 4 * lanes // n_words).load(INPUTS[inputs], 4 * lanes // n_words)
                    for word in range(n_words)
                ]
                sums = code_products(sums, (codes + four * 4 * lanes).load(U8, 4 * lanes), words, bits)
            (out + n * 4 * WAYS[-1][2]).store(total_of(sums, lanes))

    @numba.njit
    def call(out: np.ndarray, all_codes: tuple[int, ...], all_x: tuple[int, ...]) -> None:
        run(out, all_codes, all_x)

    return call


def words_of(x: np.ndarray, inputs: str) -> np.ndarray:
    """Return inputs (four, lane, 4) as `code_products` takes them: int16 even and odd, that is, 0 and 2, 1 and 3."""
    return np.stack([x[..., 0::2], x[..., 1::2]], axis=1) if inputs == "int16" else x


def test_sums_of_products_are_exact() -> None:
    """Of any numbers, and of the largest codes with the largest inputs of either sign."""
    rng, call = np.random.default_rng(1), dots()
    for sign in (None, 1, -1):
        all_codes, all_x, expected = [], [], []
        for bits, inputs, lanes in WAYS:
            most, shape = int(LARGEST[inputs]), (FOURS, lanes, 4)
            if sign is None:
                codes, x = rng.integers(0, 2**bits, shape), rng.integers(-most, most + 1, shape)
            else:
                codes, x = np.full(shape, 2**bits - 1), np.full(shape, sign * most)
            expected.append((codes * x).sum((0, 2)))
            all_codes.append(codes.astype(np.uint8))
            all_x.append(np.ascontiguousarray(words_of(x.astype(inputs), inputs)))
        out = np.zeros((len(WAYS), 4 * WAYS[-1][2]), np.uint8)
        places = [tuple(array.ctypes.data for array in arrays) for arrays in (all_codes, all_x)]
        call(out.reshape(-1), *places)
        for way, row, sums in zip(WAYS, out, expected, strict=True):
            np.testing.assert_array_equal(row.view(np.int32)[: len(sums)], sums, err_msg=str(way))


@pytest.mark.parametrize(
    ("cpu", "features", "expected"),
    [
        ("generic", "", set()),
        ("generic", "+dotprod", {"dotprod"}),
        ("cortex-a72", "", set()),
        ("cortex-a76", "", {"dotprod"}),
        ("apple-m1", "", {"dotprod"}),
        ("apple-m2", "", {"dotprod", "i8mm"}),
        ("oryon-1", "", {"dotprod", "i8mm"}),
    ],
)
def test_instructions_of_arm_processors_are_known(cpu: str, features: str, expected: set[str]) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
    assert sums_of_bytes(target.create_target_machine(cpu=cpu, features=features)) == expected
