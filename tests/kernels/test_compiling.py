"""What is compiled, said and kept where several kernels are made: here tiny ones, in a folder of their own."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from numba import types
from support.errors import assert_says

from mistral_kernels import KernelWarning, compiling


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


def new_factory() -> Callable[[int], Any]:
    """Return a factory of kernels that add a number: one that has made none yet, as in a new process."""

    @compiling.made_once
    def adding(number: int) -> Any:
        @compiling.kernel(types.int64(types.int64), number)
        def adding(x: int) -> int:
            return x + number

        return adding

    return adding


def made(adding: Callable[[int], Any], *numbers: int) -> tuple[int, list[tuple[int, int, str]]]:
    """Return how many kernels had to be compiled to have these, and what was reported."""
    reports: list[tuple[int, int, str]] = []
    n_compiled = compiling.make([partial(adding, n) for n in numbers], lambda *report: reports.append(report))
    return n_compiled, reports


def test_what_is_missing_is_compiled_and_reported_one_by_one(folder: Path) -> None:
    first = new_factory()
    assert made(first, 2) == (1, [(0, 1, "adding_2"), (1, 1, "")])
    assert made(first, 2) == (0, [])
    second = new_factory()
    assert made(second, 1, 2, 3) == (2, [(0, 2, "adding_1"), (1, 2, "adding_3"), (2, 2, "")])
    assert [second(n)(10) for n in (1, 2, 3)] == [11, 12, 13]
    assert made(new_factory(), 3, 2, 1) == (0, [])
    assert len(list(folder.iterdir())) == 3


def test_a_damaged_file_counts_as_missing(folder: Path) -> None:
    made(new_factory(), 1, 2)
    damaged = next(path for path in folder.iterdir() if "adding_2" in path.name)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert made(new_factory(), 1, 2) == (1, [(0, 1, "adding_2"), (1, 1, "")])


def test_what_is_interrupted_goes_on_at_the_next_call() -> None:
    adding = new_factory()

    def interrupt(done: int, total: int, name: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compiling.make([partial(adding, n) for n in (1, 2)], interrupt)
    assert made(adding, 1, 2) == (1, [(0, 1, "adding_2"), (1, 1, "")])


def test_a_kernel_that_nobody_announced_is_named_in_a_warning() -> None:
    adding = new_factory()
    with pytest.warns(KernelWarning) as caught:
        assert adding(5)(1) == 6
    assert_says(str(caught[0].message), "compiling", "adding_5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(new_factory(), 5, 6)
        new_factory()(6)
