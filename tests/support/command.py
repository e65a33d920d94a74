"""The command line, run in this process, which is fast, or in one of its own, as a user's shell does."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

from mistral_ref.cli import main

COMMAND = (sys.executable, "-m", "mistral_ref")


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def run(*arguments: object, stdin: str | bytes = "", columns: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command in this process; standard streams are pipes, as those of a process would be.

    With `columns`, standard output is a terminal of this width, without colours.
    """
    given = stdin if isinstance(stdin, bytes) else stdin.encode()
    streams = {
        name: (_Terminal if name == "stdout" and columns else io.TextIOWrapper)(
            io.BytesIO(data), "utf-8", write_through=True
        )
        for name, data in (("stdin", given), ("stdout", b""), ("stderr", b""))
    }
    terminal = {"COLUMNS": str(columns), "TERM": "dumb", "NO_COLOR": "1"} if columns else {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, terminal))
        for name, stream in streams.items():
            stack.enter_context(mock.patch.object(sys, name, stream))
        try:
            status: object = main(list(map(str, arguments)))
        except SystemExit as end:  # argparse's, after --help or a complaint
            status = end.code
    assert isinstance(status, int)
    printed = (streams[name].buffer.getvalue().decode() for name in ("stdout", "stderr"))  # type: ignore[attr-defined]
    return subprocess.CompletedProcess(arguments, status, *printed)


def run_process(
    *arguments: object, stdin: str = "", env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, input=stdin, capture_output=True, encoding="utf-8", timeout=120, check=False, env=env
    )


# What a process begins with that is started so: the handlers of signals that it has when a terminal starts it. With a
# preexec_fn the process would be forked, and a fork may wait for ever for BLAS in another thread.
_HEEDING = """import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])"""


def start(*command: object, **options: Any) -> subprocess.Popen[Any]:
    """Start a process that signals end, also where the tests themselves ignore them (`nohup`, a background job)."""
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [sys.executable, "-c", _HEEDING, *(str(part) for part in command)]
    return subprocess.Popen(started, **(piped | options))


def heed_signals() -> None:
    """Set the handlers that a process has when a terminal starts it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
