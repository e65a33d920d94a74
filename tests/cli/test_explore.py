"""mistral-ref explore: it prints the address of its page, and ends when it is told to."""

from __future__ import annotations

import signal
import socket
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support.command import COMMAND, run, start
from support.errors import assert_complains

from mistral_ref.study.live.exercises import EXERCISES


@contextmanager
def started(*arguments: object, command: Sequence[object] = COMMAND) -> Iterator[tuple[Any, str]]:
    """Yield the process of the command, and the address that it prints."""
    process = start(*command, "explore", "--backend", "numpy", *arguments, text=True)
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate(timeout=20)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_it_serves_its_page_until_a_signal(number: signal.Signals, status: int) -> None:
    with started("--no-browser", "--prompt", "Tom had a red ball") as (process, url):
        with urllib.request.urlopen(url, timeout=20) as answer:
            page = answer.read().decode()
        assert r'"piece":"\u2581ball"' in page
        sent_at = time.monotonic()
        process.send_signal(number)
        out, err = process.communicate(timeout=20)
        assert time.monotonic() - sent_at < 2
        assert (process.returncode, err) == (status, "")
        assert "Traceback" not in out


@pytest.mark.slow
def test_the_browser_gets_the_address(tmp_path: Path) -> None:
    browser, asked = tmp_path / "browser", tmp_path / "asked"
    browser.write_text(f'#!/bin/sh\nprintf %s "$1" > {asked}.part\nmv {asked}.part {asked}\n')
    browser.chmod(0o755)
    with started(command=("env", f"BROWSER={browser} %s", *COMMAND)) as (_, url):
        for _ in range(100):
            if asked.exists():
                break
            time.sleep(0.1)
        assert asked.read_text() == url


@pytest.mark.slow
def test_it_begins_with_an_exercise() -> None:
    with started("--no-browser", "--exercise", "token-before") as (_, url), urllib.request.urlopen(url) as answer:
        page = answer.read().decode()
    assert '"exercise":"token-before"' in page
    assert f'"live":{{"text":"{EXERCISES["token-before"].text}"' in page


def test_the_exercises_are_listed() -> None:
    found = run("explore", "--exercise", "list")
    assert (found.returncode, found.stderr) == (0, "")
    words = " ".join(found.stdout.split())
    for name, exercise in EXERCISES.items():
        assert f"{name} Chapter {exercise.chapter}. {exercise.task}" in words


def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = run("explore", "--backend", "numpy", "--no-browser", "--port", port)
    assert (found.returncode, found.stdout) == (2, "")
    assert_complains(found.stderr, "port", port)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--port", "-1"], ("port", -1)),
        (["--model", "nowhere/x"], (Path("nowhere/x"),)),
        (["--exercise", "three-heads"], ("--exercise", "'three-heads'", ", ".join(EXERCISES))),
        (["--exercise", "two-heads", "--model", "nowhere/x"], ("--exercise", "two-heads", "--model")),
        (["--exercise", "two-heads", "--prompt", "Tom"], ("--exercise", "--prompt")),
    ],
)
def test_a_mistake_is_one_line(arguments: Sequence[str], facts: Sequence[object]) -> None:
    found = run("explore", "--backend", "numpy", "--no-browser", *arguments)
    assert (found.returncode, found.stdout) == (2, "")
    assert_complains(found.stderr, *facts)
