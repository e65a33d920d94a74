"""Shell: reads commands from a terminal or a pipe, completes their names, prints help, and runs them."""

from __future__ import annotations

import cmd
import re
import sys
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

from mistral_ref.cli.output import say
from mistral_ref.errors import InputError, MistralRefError, checked_int, short_repr


class Command(NamedTuple):
    """One command of a shell. Its help is no docstring, because `python -OO` leaves docstrings out.

    usage       its name, and what it takes
    meaning     what it does, in one line
    more        what else there is to say, for `help COMMAND`
    """

    usage: str
    meaning: str
    more: str = ""

    @property
    def name(self) -> str:
        """The first word of the usage."""
        return self.usage.partition(" ")[0]


class Shell(cmd.Cmd):
    """A shell whose commands are the methods do_NAME.

    In a terminal a mistake prints one line, and the next command is read. Ctrl-C ends the running command, or drops the
    line that is being typed. If commands come from a pipe, a mistake or Ctrl-C ends the program.

    commands        by name, in the order of the help text; the beginning of a name means the first that fits
    closing_line    the last line of the help text
    """

    commands: ClassVar[Mapping[str, Command]] = {}
    closing_line: ClassVar[str] = ""

    def __init__(self) -> None:
        super().__init__()
        self.is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self.use_rawinput = self.is_terminal

    def say(self, text: str) -> None:
        """Print a text."""
        say(text)

    def place(self) -> str:
        """Return the name of the place where the walk stands; the prompt shows it."""
        return ""

    @property
    def prompt(self) -> str:  # type: ignore[override]
        """The text that the terminal shows while it waits for a command; "" over a pipe."""
        return f"({self.place()}) " if self.is_terminal else ""

    def cmdloop(self, intro: str | None = None) -> None:
        """Read and run commands until one of them ends the walk."""
        while True:
            try:
                return super().cmdloop(intro)
            except KeyboardInterrupt:
                if not self.is_terminal:
                    raise
                self.say("")  # begins a new line, since the cursor is behind what was typed

    def precmd(self, line: str) -> str:
        """Print a command that came over a pipe, so that the output looks as if the command had been typed."""
        line = line.removeprefix("\ufeff")  # a pipe from a file may begin with a byte order mark
        if not self.is_terminal and line != "EOF":
            self.say(f"({self.place()}) {line.rstrip()}")
        return line

    def onecmd(self, line: str) -> bool:
        """Run one command."""
        try:
            line = self._whole(line.strip())
            name, argument, _ = self.parseline(line)
            if name and argument and name in self.commands and self.commands[name].usage == name:
                raise InputError(f"{name} takes nothing, found {short_repr(argument)}")
            return bool(super().onecmd(line))
        except (MistralRefError, KeyboardInterrupt) as error:
            if not self.is_terminal:
                raise
            self.say(str(error) if isinstance(error, MistralRefError) else "\ninterrupted")
            return False

    def _whole(self, line: str) -> str:
        """Return a line with the full name of its command; a beginning means the first in `commands` that fits."""
        match = re.match(r"[a-z]+", line)
        if match is None or match[0] in self.commands:
            return line
        return next((name for name in self.commands if name.startswith(match[0])), match[0]) + line[match.end() :]

    def default(self, line: str) -> None:
        """Raise InputError for a line that is no command."""
        raise InputError(f"{short_repr(line)} is no command; help lists them")

    def completenames(self, text: str, *ignored: object) -> list[str]:
        """Complete the name of a command."""
        return [f"{name} " for name in self.commands if name.startswith(text)]

    def do_help(self, arg: str) -> None:
        """Print a line for each command, or what one command does."""
        if arg:
            name = self._whole(arg.strip())
            if name not in self.commands:
                raise InputError(f"{short_repr(arg)} is no command; help lists them")
            command = self.commands[name]
            self.say(f"{command.usage}: {command.meaning}" + (f"\n\n{command.more}" if command.more else ""))
            return
        for command in self.commands.values():
            self.say(f"  {command.usage:<28}{command.meaning}")
        self.say(self.closing_line)

    def do_EOF(self, arg: str) -> bool:  # noqa: N802 (the name that cmd asks for)
        """End the walk at the end of the input."""
        if self.is_terminal:
            self.say("")
        return True


def needed(text: str, what: str) -> str:
    """Return an argument; raise InputError if it is empty."""
    if not text.strip():
        raise InputError(f"expected {what}")
    return text.strip()


def count(text: str, default: int = 1) -> int:
    """Return the whole number of at least 1 that was typed, or the default if nothing was typed.

    >>> count(" 5 "), count("")
    (5, 1)
    """
    if not text.strip():
        return default
    number: object = int(text) if re.fullmatch(r"\s*[+-]?\d{1,9}\s*", text, re.ASCII) else text.strip()
    return checked_int("the count", number, least=1)


def number(text: str, what: str) -> tuple[float, str]:
    """Return the number at the beginning of a text, and the rest of the text; raise InputError without a number."""
    first, _, rest = text.strip().partition(" ")
    try:
        return float(first), rest
    except ValueError:
        raise InputError(f"expected {what}, found {short_repr(first)}") from None
