"""The command line: it parses the arguments, calls the library, and prints the result.

Results go to standard output. Errors, notices and progress bars go to standard error. Each command is a file in this
folder with two functions: `add_to(commands)` describes the options, and `run(arguments)` runs the command. Options and
helpers that several commands share are in common.py and pass_options.py.
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
from typing import Any, NoReturn

import mistral_ref
from mistral_ref.cli import bench, compare, generate, info, perplexity, quantize, step, trace


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like the errors of the library."""

    def error(self, message: str) -> NoReturn:
        """Print one line that says what is wrong, and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class CommandParser(OneLineParser):
    """A parser of one command. Its options may stand anywhere among its other arguments.

    argparse by itself drops an optional positional argument that follows an option.
    """

    _is_intermixed = False

    def parse_known_args(self, args: Any, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the options first, and then the other arguments. Arguments with "--" are parsed in argparse's own way.

        parse_known_intermixed_args calls this method again, once for the options and once for the other arguments.
        `_is_intermixed` marks these calls.
        """
        if self._is_intermixed or "--" in args:
            return super().parse_known_args(args, namespace)
        self._is_intermixed = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixed = False


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = OneLineParser(
        prog="mistral-ref",
        description="The Mistral transformer, written to be read and stepped through.",
        epilog="Run mistral-ref COMMAND --help to read about one command.",
    )
    parser.add_argument("--version", action="version", version=f"mistral-ref {mistral_ref.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=CommandParser)
    for command in (generate, step, trace, compare, bench, perplexity, quantize, info):
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
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        needs_quotes = not any(word.startswith("-") for word in extra)
        hint = "; put a text of several words in quotes" if needs_quotes else ""
        parser.error(f"unrecognized arguments: {' '.join(extra)}{hint}")
    try:
        with warnings.catch_warnings(), _ended_by_signals():
            warnings.simplefilter("always", mistral_ref.MistralRefWarning)
            warnings.showwarning = _show_notice  # type: ignore[assignment]
            arguments.run(arguments)
            print(end="", flush=True)
    except mistral_ref.MistralRefError as error:
        print(f"mistral-ref: {error}", file=sys.stderr)
        return 2
    except MemoryError:
        print("mistral-ref: not enough memory", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except OSError as error:
        # Standard output is closed or full. Python flushes it at exit, and without this line that would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # a reader such as `head` may stop early: this is no error
            print(f"mistral-ref: {error}", file=sys.stderr)
            return 1
    status: int = arguments.status
    return status


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
    print(f"mistral-ref: note: {message}", file=sys.stderr)
