"""The command line: parse, call the library, print. Text goes to standard output, everything else to standard error.

Each command is a file here with two functions: `add_to(commands)` describes its options, `run(arguments)` does it.
Options and helpers that several commands share are in common.py and pass_options.py.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import mistral_ref
from mistral_ref.cli import bench, compare, generate, info, perplexity, quantize, step, trace


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like those of the library."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class CommandParser(OneLineParser):
    """A parser of one command, whose options may stand anywhere among its other arguments.

    By itself argparse takes an argument that may be left out for left out as soon as an option comes before it.
    """

    _is_intermixed = False

    def parse_known_args(self, args: Any, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse options first and the rest after, except where "--" says that what follows is no option.

        Called again, by what does so, for each of the two.
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
        epilog="mistral-ref COMMAND --help tells more of each command.",
    )
    parser.add_argument("--version", action="version", version=f"mistral-ref {mistral_ref.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", parser_class=CommandParser)
    for command in (generate, step, trace, compare, bench, perplexity, quantize, info):
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or what it says; 2 for a user's mistake, 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    parser = build_parser()
    parser.set_defaults(run=lambda _: parser.print_help(), status=0)  # a command may set another
    arguments, extra = parser.parse_known_args(argv)
    if extra:
        needs_quotes = not any(word.startswith("-") for word in extra)
        hint = "; a text of several words stands in quotes" if needs_quotes else ""
        parser.error(f"unrecognized arguments: {' '.join(extra)}{hint}")
    try:
        with warnings.catch_warnings():
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
        # Standard output is closed or full. Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # whoever read it has seen enough, as `head` does
            print(f"mistral-ref: {error}", file=sys.stderr)
            return 1
    status: int = arguments.status
    return status


def _show_notice(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(f"mistral-ref: note: {message}", file=sys.stderr)
