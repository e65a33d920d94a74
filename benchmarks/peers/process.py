"""The other end of worker.py: a process with one runtime, asked and timed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import notice

from mistral_ref.errors import InputError


@dataclass(frozen=True)
class Test:
    """n tokens after `depth` others, `step` at a time."""

    name: str
    n: int
    depth: int
    step: int


@dataclass(frozen=True)
class Runner:
    """What is to run: the name of its row, the runtime, what it reads, and its own options."""

    name: str
    runtime: str
    model: Path
    options: Sequence[str]
    n_weights_read: int
    bits_a_weight: float


@dataclass
class Worker:
    """A process with one runtime, and what it has measured: seconds, and plain-read limits, by test."""

    runner: Runner
    process: subprocess.Popen[str]
    about: dict[str, Any]
    first_token: float
    rates: dict[str, list[float]] = field(default_factory=dict)
    limits: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    distance: float = 0.0

    @property
    def name(self) -> str:
        """The name of its row."""
        return self.runner.name

    def ask(self, **request: object) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return _answer(self.name, self.process)

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def _answer(name: str, process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise InputError(f"{name} has ended with status {process.wait()}; what it said stands above")
    return json.loads(line)


def start(runner: Runner, common: Sequence[str]) -> Worker:
    """Start a runtime; return once it has given its first token."""
    name = runner.name
    notice(f"starting {name}")
    script = Path(__file__).with_name("worker.py")
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(script), runner.runtime, str(runner.model), *common, *runner.options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    about = _answer(name, process)["about"]
    return Worker(runner, process, about, time.perf_counter() - began)
