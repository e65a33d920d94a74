"""Shell: reads commands from a terminal or a pipe, makes their beginnings whole, helps, completes, and goes on."""

from __future__ import annotations

import cmd
import inspect
import re
import sys
from typing import ClassVar

from mistral_ref.errors import InputError, MistralRefError, checked_int, short_repr


class Shell(cmd.Cmd):
    """Commands are the methods do_...; the first line of a docstring says what one takes, and after ": " what it does.

    In a terminal a mistake is one line, and Ctrl-C ends the command that runs, or drops the line that is being typed.
    Over a pipe either is the end.
    """

    order: ClassVar[tuple[str, ...]] = ("help",)  # of the help text; of several that begin alike the first is meant
    closing_line: ClassVar[str] = ""  # of the help text

    def __init__(self) -> None:
        super().__init__()
        self.is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self.use_rawinput = self.is_terminal

    def say(self, text: str) -> None:
        """Print a text as it is."""
        print(text)

    def place(self) -> str:
        """Return what the prompt shows."""
        return ""

    @property
    def prompt(self) -> str:  # type: ignore[override]
        """What the terminal shows while it waits."""
        return f"({self.place()}) " if self.is_terminal else ""

    def cmdloop(self, intro: str | None = None) -> None:
        """Read and run commands until one says that it was the last."""
        while True:
            try:
                return super().cmdloop(intro)
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                self.say("")  # what was typed stands on the line before

    def precmd(self, line: str) -> str:
        """Show a command that came over a pipe, so that what is printed reads as if it had been typed."""
        if not self.is_terminal and line != "EOF":
            self.say(f"({self.place()}) {line.rstrip()}")
        return line

    def onecmd(self, line: str) -> bool:
        """Run one command."""
        try:
            line = self._whole(line.strip())
            name, argument, _ = self.parseline(line)
            if name in self.order and argument and self._usage(name)[0] == name:
                raise InputError(f"{name} takes nothing, found {short_repr(argument)}")
            return bool(super().onecmd(line))
        except (MistralRefError, KeyboardInterrupt) as error:
            if not self.is_terminal:
                raise
            self.say(str(error) if isinstance(error, MistralRefError) else "\ninterrupted")
            return False

    def _whole(self, line: str) -> str:
        """Return a line with the beginning of a command made whole; the first that begins so, in order of use, wins."""
        match = re.match(r"[a-z]+", line)
        if match is None or match[0] in self.order:
            return line
        return next((name for name in self.order if name.startswith(match[0])), match[0]) + line[match.end() :]

    def _usage(self, name: str) -> tuple[str, str]:
        """Return what a command takes, its name included, and what it does."""
        usage, _, meaning = (getattr(self, f"do_{name}").__doc__ or "").partition("\n")[0].partition(": ")
        return usage, meaning

    def default(self, line: str) -> None:
        """Refuse what is no command."""
        raise InputError(f"{short_repr(line)} is no command; help lists them")

    def completenames(self, text: str, *ignored: object) -> list[str]:
        """Complete the name of a command."""
        return [f"{name} " for name in self.order if name.startswith(text)]

    def do_help(self, arg: str) -> None:
        """help [COMMAND]: the list of commands, or what one does"""
        if arg:
            name = self._whole(arg.strip())
            if name not in self.order:
                raise InputError(f"{short_repr(arg)} is no command; help lists them")
            self.say(str(inspect.getdoc(getattr(self, f"do_{name}"))))
            return
        for name in self.order:
            usage, meaning = self._usage(name)
            self.say(f"  {usage:<28}{meaning}")
        self.say(self.closing_line)

    def do_EOF(self, arg: str) -> bool:  # noqa: N802 (the name that cmd asks for)
        """Leave at the end of the input."""
        if self.is_terminal:
            self.say("")
        return True


def needed(text: str, what: str) -> str:
    """Return an argument; raise InputError if it is empty."""
    if not text.strip():
        raise InputError(f"expected {what}")
    return text.strip()


def count(text: str, default: int = 1) -> int:
    """Return a whole number of at least 1, or the default where nothing was said.

    >>> count(" 5 "), count("")
    (5, 1)
    """
    if not text.strip():
        return default
    number: object = int(text) if re.fullmatch(r"\s*[+-]?\d{1,9}\s*", text, re.ASCII) else text.strip()
    return checked_int("the count", number, least=1)


def number(text: str, what: str) -> tuple[float, str]:
    """Return the number that a line begins with, and the rest of the line."""
    first, _, rest = text.strip().partition(" ")
    try:
        return float(first), rest
    except ValueError:
        raise InputError(f"expected {what}, found {short_repr(first)}") from None
