"""ChatShell: reads messages and commands from a terminal or a pipe, and prints the answers."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from mistral_ref.cli.draft_options import draft_statistics
from mistral_ref.cli.output import say, say_token
from mistral_ref.conversation import Conversation
from mistral_ref.errors import InputError, MistralRefError, did_you_mean, escaped, short_repr
from mistral_ref.generation import Token

_DIM, _PLAIN = "\x1b[2m", "\x1b[22m"
_BLOCK = '"""'
_KEPT_LINES = 1000


class Command(NamedTuple):
    """One command. `usage` is its name and what it takes, `meaning` what it does."""

    usage: str
    meaning: str


COMMANDS = (
    Command("/system [TEXT]", 'show the system prompt, or set another; "" is none'),
    Command("/reset", "forget everything that was said"),
    Command("/undo", "take back the last message and its answer"),
    Command("/regen", "answer the last message again"),
    Command("/save FILE", "write the conversation to a JSON file"),
    Command("/load FILE", "go on with the conversation in such a file"),
    Command("/stats", "how long the last answer took"),
    Command("/tokens", "all that the model has read and said, as tokens"),
    Command("/help", "this list"),
    Command("/quit", "leave"),
)
HELP = "\n".join(f"  {command.usage:15} {command.meaning}" for command in COMMANDS)


class LineReader:
    """Reads messages, from a terminal with line editing and a history, or from a pipe.

    is_terminal     whether somebody types
    """

    def __init__(self, *, keeps_history: bool) -> None:
        self.is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self._readline: Any = None
        self._history = _history_file() if keeps_history else None

    def __enter__(self) -> LineReader:
        if self.is_terminal:
            with suppress(ImportError):
                import readline  # noqa: PLC0415 - Windows has none, and its import changes how input() edits

                self._readline = readline
                readline.set_history_length(_KEPT_LINES)
                if self._history is not None:
                    with suppress(OSError):
                        readline.read_history_file(self._history)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._readline is None or self._history is None:
            return
        with suppress(OSError):  # a folder that cannot be written keeps no history
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))  # what was typed is nobody else's
            self._readline.write_history_file(self._history)

    def line(self, prompt: str) -> str:
        """Return the next line; raise EOFError where the input ends, and InputError if it is not text."""
        try:
            if self.is_terminal:
                return input(prompt if sys.stdout is not None and sys.stdout.isatty() else "")
            line = "" if sys.stdin is None else sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8 text: {error.reason} at {error.start}") from None
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff")

    def message(self) -> str:
        r"""Return the next message: a line, lines that end with \, or everything between two lines of three quotes."""
        text = self.line("> ")
        if text.strip() == _BLOCK:
            lines = []
            with suppress(EOFError):
                while (text := self.line(". ")).strip() != _BLOCK:
                    lines.append(text)
            return "\n".join(lines)
        while text.endswith("\\"):
            try:
                text = f"{text[:-1]}\n{self.line('. ')}"
            except EOFError:
                return text[:-1]
        return text


def _history_file() -> Path:
    """Return the path of the file that keeps typed lines, in the user's folder for the state of programs."""
    default = Path.home() / ".local" / "state" if os.name != "nt" else os.environ.get("LOCALAPPDATA", Path.home())
    return Path(os.environ.get("XDG_STATE_HOME") or default) / "mistral_ref" / "chat_history"


class ChatShell:
    """A conversation in a terminal, or over a pipe.

    In a terminal a mistake is one line, and Ctrl-C stops the answer; the conversation goes on after both. Over a pipe
    both end the program.
    """

    def __init__(
        self,
        conversation: Conversation,
        reader: LineReader,
        *,
        as_json: bool = False,
        stats: bool = False,
        marks: bool = False,
    ) -> None:
        self.conversation, self.reader, self.as_json, self.always_stats = conversation, reader, as_json, stats
        self.marks = marks
        self.last_stats = "no answer yet"
        self._commands: dict[str, Callable[[str], object]] = {
            "/system": self._system,
            "/reset": self._reset,
            "/undo": lambda _: conversation.undo(),
            "/regen": lambda _: self.answer(conversation.again()),
            "/save": self._save,
            "/load": lambda name: conversation.load(_file_name(name)),
            "/stats": lambda _: say(self.last_stats),
            "/tokens": lambda _: say("|".join(map(conversation.model.piece, conversation.cache.tokens))),
            "/help": lambda _: say(HELP),
        }

    def run(self) -> None:
        """Read messages and commands until the input ends, or until /quit."""
        while True:
            try:
                text = self.reader.message()
                if text.strip() == "/quit":
                    return
                self.take(text)
            except EOFError:
                if self.reader.is_terminal:
                    say()
                return
            except KeyboardInterrupt:
                if not self.reader.is_terminal:
                    raise
                say()
            except MistralRefError as error:
                if not self.reader.is_terminal:
                    raise
                say(f"mistral-ref: {error}", error=True)

    def take(self, text: str) -> None:
        """Run a command, or say a message and print the answer. Behind a space "/" begins no command."""
        if not text.startswith("/"):
            if text.strip():
                self.answer(self.conversation.say(text))
            return
        name, _, rest = text.partition(" ")
        if name not in self._commands:
            hint = did_you_mean(name, self._commands)
            raise InputError(f"{short_repr(name)} is no command{f'; {hint}' if hint else ''} (/help lists them)")
        self._commands[name](rest.strip())

    def answer(self, tokens: Generator[Token, None, None]) -> None:
        """Print an answer, and while the model calls tools, ask for what they return and print the next one."""
        while self._print(tokens):
            calls = self.conversation.messages[-1].get("tool_calls", [])
            if not calls:
                return
            try:
                results = [self._ask(call["function"]) for call in calls]
            except (KeyboardInterrupt, EOFError):
                self.conversation.undo()
                raise
            tokens = self.conversation.give_results(results)

    def _ask(self, function: dict[str, str]) -> str:
        """Return what the user says that a function returns."""
        if self.reader.is_terminal:
            say(f"the model calls {function['name']} with {function['arguments']}; what does it return?")
        return self.reader.line("= ")

    def _print(self, tokens: Generator[Token, None, None]) -> bool:
        """Print the tokens of one answer; return whether there is one."""
        started, first_at, count, last = time.perf_counter(), 0.0, 0, None
        printer, is_interrupted = Printer(is_silent=self.as_json, marks=self.marks), False
        try:
            with closing(tokens):
                for last in tokens:
                    first_at = first_at or time.perf_counter()
                    count += 1
                    printer.print(last)
        except KeyboardInterrupt:
            is_interrupted = True
            raise
        finally:
            printer.end(ends_line=not (is_interrupted and self.reader.is_terminal))  # else `run` ends it
        ended = time.perf_counter()
        if last is None or not self.conversation.has_answer:
            say("(no answer)", error=True)
            return False
        rate = f", {(count - 1) / (ended - first_at):.1f} tokens/s" if count > 1 else ""
        self.last_stats = (
            f"first token after {first_at - started:.3f} s, then {count - 1} tokens in {ended - first_at:.3f} s{rate}, "
            f"ended by {last.finish_reason}; {self.conversation.cache.length} tokens in the conversation"
        )
        if drafted := draft_statistics(self.conversation.tokens):
            self.last_stats += f"; {drafted}"
        if last.finish_reason == "length" and self.reader.is_terminal:
            say(f"(cut after {count} tokens; --max-tokens is the maximum)", error=True)
        if self.as_json:
            message = {**self.conversation.messages[-1], "finish_reason": last.finish_reason, "n_tokens": count}
            say(json.dumps(message, ensure_ascii=False))
        if self.always_stats:
            say(self.last_stats, error=True)
        return True

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        say("(everything is forgotten, except the system prompt)", error=True)

    def _save(self, name: str) -> None:
        self.conversation.save(_file_name(name))
        say(f"({escaped(name)}: {len(self.conversation.messages)} messages written)", error=True)

    def _system(self, text: str) -> None:
        if not text:
            say(self.conversation.system or "there is no system prompt")
        else:
            self.conversation.set_system("" if text == '""' else text)


class Printer:
    """Prints an answer. A terminal shows the thinking dim; a pipe gets the text alone. Calls are not printed.

    marks   a terminal underlines accepted tokens of drafts
    """

    def __init__(self, *, is_silent: bool, marks: bool = False) -> None:
        self.is_silent, self.marks = is_silent, marks
        self.is_terminal = sys.stdout is not None and sys.stdout.isatty()
        self._is_dim = False
        self._has_printed = False

    def print(self, token: Token) -> None:
        """Print one token."""
        is_thinking = token.kind == "thinking"
        if self.is_silent or token.kind == "tool_call" or (is_thinking and not self.is_terminal):
            return
        self._dim(is_thinking)
        self._has_printed = self._has_printed or bool(token.text)
        say_token(token.text, is_marked=token.from_draft and self.marks)

    def end(self, *, ends_line: bool = True) -> None:
        """End the answer: what is dim, and its last line."""
        if self._is_dim:
            sys.stdout.write(_PLAIN)
        if self._has_printed and ends_line:
            say()

    def _dim(self, is_dim: bool) -> None:
        if is_dim != self._is_dim:
            self._is_dim = is_dim
            sys.stdout.write(_DIM if is_dim else f"{_PLAIN}\n")  # ours, and so not escaped


def _file_name(name: str) -> str:
    if not name:
        raise InputError("the name of a file is missing")
    return name
