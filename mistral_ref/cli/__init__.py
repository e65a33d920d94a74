"""The command line: it parses the arguments, calls the library, and prints the result.

Results go to standard output. Errors, notices and progress bars go to standard error. Each command is a file in this
folder with two functions: `add_to(commands)` describes the options, and `run(arguments)` runs the command. Options and
helpers that several commands share are in common.py and pass_options.py. parsers.py and width.py lay out errors, help
and tables. All that the commands print goes through output.py.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import mistral_ref
from mistral_ref.cli import (
    bench,
    chat,
    compare,
    conform,
    doctor,
    download,
    explore,
    generate,
    info,
    perplexity,
    quantize,
    step,
    trace,
    warm,
)
from mistral_ref.cli.output import say
from mistral_ref.cli.parsers import CommandParser, OneLineParser
from mistral_ref.errors import did_you_mean, escaped, short_repr

_COMMANDS = {
    "generate": generate,
    "chat": chat,
    "step": step,
    "trace": trace,
    "explore": explore,
    "compare": compare,
    "conform": conform,
    "bench": bench,
    "perplexity": perplexity,
    "quantize": quantize,
    "download": download,
    "warm": warm,
    "info": info,
    "doctor": doctor,
}


def build_parser() -> OneLineParser:
    """Return the parser of all commands."""
    parser = OneLineParser(
        prog="mistral-ref",
        description="The Mistral transformer, written to be read and stepped through.",
        epilog="Run mistral-ref COMMAND --help to read about one command.",
    )
    parser.add_argument("--version", action="version", version=f"mistral-ref {mistral_ref.__version__}")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", prog=parser.prog, parser_class=CommandParser
    )
    for command in _COMMANDS.values():
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    It is 0, or another status that the command has set; 1 if memory or the output is full; 2 for a user's mistake; 130
    for Ctrl-C. SIGTERM and SIGHUP raise SystemExit.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the terminal cannot show becomes a question mark
    parser = build_parser()
    parser.set_defaults(run=lambda _: parser.print_help(), status=0)  # a command may set another status
    words = sys.argv[1:] if argv is None else argv
    name = next((word for word in words if not word.startswith("-")), None)
    if name is not None and name not in _COMMANDS:
        hint = did_you_mean(name, _COMMANDS) or f"expected one of {', '.join(_COMMANDS)}"
        parser.error(f"{short_repr(name)} is no command; {hint}")
    arguments = argparse.Namespace(status=0)
    try:
        arguments = parser.parse_args(words)  # --broken list prints while the arguments are parsed
        with warnings.catch_warnings(), _ended_by_signals():
            warnings.simplefilter("always", mistral_ref.MistralRefWarning)
            warnings.showwarning = _show_notice  # type: ignore[assignment]
            arguments.run(arguments)
            say(end="")
    except mistral_ref.MistralRefError as error:
        say(f"mistral-ref: {error}", error=True)
        return 2
    except MemoryError:
        say("mistral-ref: not enough memory", error=True)
        return 1
    except KeyboardInterrupt:
        say(error=True)
        return 130
    except OSError as error:
        # Standard output is closed or full. Python flushes it at exit, and without this line that would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # a reader such as `head` may stop early: this is no error
            say(f"mistral-ref: {escaped(_problem(error))}", error=True)
            return 1
    status: int = arguments.status
    return status


def _problem(error: OSError) -> str:
    """Return what an error of the system says. Numba needs a working directory, and the user may have removed it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the working directory has been removed; expected a start in another one"
    return str(error) if error.filename else f"standard output: {error.strerror or error}"


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as Ctrl-C does, by an exception, so that no half-written file is left.

    A signal that is ignored stays so, for example SIGHUP after `nohup`.
    """

    def end(number: int, _: object) -> NoReturn:
        raise SystemExit(128 + number)

    ours = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    ours = [number for number in ours if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        ours = []
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def _show_notice(message: Warning | str, category: type[Warning], *_: object) -> None:
    say(f"mistral-ref: note: {escaped(str(message))}", error=True)
