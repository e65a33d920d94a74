"""mistral-ref warm, and what every command shows while kernels are compiled."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
from support.command import COMMAND, run
from support.errors import assert_complains, assert_says

from mistral_kernels import compiling
from mistral_ref.cli.common import progress_bar, show_compiling
from mistral_ref.kernel_choice import Kernel

NAMES = ["attention_f32_4", "matvec_bf16_8_1", ""]


def two_are_missing(kernels: list[Kernel], on_compile: Callable[[int, int, str], object]) -> int:
    for done, name in enumerate(NAMES):
        on_compile(done, 2, name)
    return 2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def terminal(columns: int = 70) -> Iterator[Terminal]:
    """Make standard error a terminal."""
    screen, environment = Terminal(), {"COLUMNS": str(columns), "TERM": "xterm"}
    with mock.patch.object(sys, "stderr", screen), mock.patch.dict(os.environ, environment):
        yield screen


def test_warm_says_what_it_compiles_and_how_much_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "make", two_are_missing)
    done = run("warm")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert_says(done.stdout.strip(), "2 kernels", "14 were there")
    first, second = done.stderr.splitlines()
    assert_says(first, "1 of 2", NAMES[0])
    assert_says(second, "2 of 2", NAMES[1])


def test_warm_all_compiles_more(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(compiling, "make", lambda kernels, on_compile: asked.append(len(kernels)) or 1)
    assert [run("warm", *options).returncode for options in ((), ("--all",))] == [0, 0]
    assert asked[0] + 10 < asked[1]


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run("warm", "--model", tmp_path / "nowhere")
    assert done.returncode == 2
    assert_complains(done.stderr, tmp_path / "nowhere")


def screens(text: str) -> list[str]:
    """Return what the terminal's line showed, one text after the other."""
    return [shown.rstrip() for shown in text.split("\r")[2::2]]


def test_a_terminal_shows_one_line_which_changes_and_then_is_gone() -> None:
    with terminal() as screen:
        two_are_missing([], show_compiling)
    first, second, last = screens(screen.getvalue())
    assert_says(first, "compiling", "once", "1 of 2", NAMES[0])
    assert_says(second, "2 of 2", NAMES[1])
    assert last == ""
    assert "\n" not in screen.getvalue()
    assert max(map(len, screen.getvalue().split("\r"))) < 70


def test_a_narrow_terminal_keeps_it_on_one_line() -> None:
    with terminal(columns=30) as screen:
        two_are_missing([], show_compiling)
    assert [len(shown) for shown in screens(screen.getvalue())] == [29, 29, 0]


def test_where_there_is_a_progress_bar_kernels_are_named_beside_it() -> None:
    with terminal(columns=150) as screen, progress_bar("scoring", is_long=True) as bar:
        bar(0, 10)
        show_compiling(1, 2, NAMES[1])
        deadline = time.monotonic() + 20
        while NAMES[1] not in screen.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)  # a bar is drawn ten times a second
        bar(5, 10)
    shown = screen.getvalue()
    assert NAMES[1] in shown
    assert shown.rindex("scoring") > shown.index(NAMES[1])


def test_without_a_terminal_one_line_says_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    two_are_missing([], show_compiling)
    assert_complains(capsys.readouterr().err, "compiling", "2 kernels", "once")


@pytest.mark.slow
def test_a_first_run_says_that_it_compiles_and_a_second_one_says_nothing(tmp_path: Path) -> None:
    command = [*COMMAND, "generate", "--temperature", "0", "--max-tokens", "8", "Once upon a time"]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        for _ in range(2)
    )
    assert_complains(first.stderr, "compiling", f"{len(list(tmp_path.iterdir()))} kernels", "once")
    assert (second.stdout, second.stderr) == (first.stdout, "")
    assert second.stdout.startswith("Once upon a time")
