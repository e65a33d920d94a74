"""Parsers of the command line: errors are one line that suggests what was meant, and help fits the terminal."""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from mistral_ref.cli.width import wrapped
from mistral_ref.errors import did_you_mean, escaped

_WORD = re.compile(r"""(?:"[^"]*"|'[^']*'|[^\s"'])+""")  # of a shell
_OPTIONS = argparse.Action([], "options", nargs="?", metavar="OPTIONS")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps descriptions and examples as they are written, unless the terminal is too narrow for them."""

    def add_usage(self, usage: Any, actions: Any, groups: Any, prefix: str | None = None) -> None:
        """Name the arguments only: the options are listed below."""
        super().add_usage(usage, [_OPTIONS, *(action for action in actions if not action.option_strings)], [], prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fit = wrapped_examples if text.startswith("examples:") else wrapped
        return textwrap.indent(fit(text, width), indent)


def wrapped_examples(text: str, width: int) -> str:
    r"""Return lines of a shell in at most `width` columns, if their words allow it; a shell still reads them.

    >>> print(wrapped_examples("generate --seed 5 'Once upon a time'", 30))
    generate --seed 5 \
        'Once upon a time'
    """
    lines: list[str] = []
    for line in text.splitlines():
        if len(line) <= width or line.lstrip().startswith("#"):
            lines += textwrap.wrap(line, width, subsequent_indent="  # ") or [""]
            continue
        lines.append(line[: len(line) - len(line.lstrip())])
        for number, word in enumerate(_WORD.findall(line)):
            if number and len(f"{lines[-1]} {word} \\") > width:
                lines[-1] += " \\"
                lines.append(" " * 4 + word)
            else:
                lines[-1] += f" {word}" if number else word
    return "\n".join(lines)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, like the errors of the library."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter} | options)

    def error(self, message: str) -> NoReturn:
        """Print one line that says what is wrong, and exit with status 2."""
        self.exit(2, f"{self.prog}: {escaped(message)} (see {self.prog} --help)\n")


class CommandParser(OneLineParser):
    """A parser of one command. Its options may stand anywhere among its other arguments.

    argparse by itself drops an optional positional argument that follows an option.
    """

    _is_intermixed = False

    def parse_known_args(self, args: Any, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse the options first, and then the other arguments. Words that are neither end the program with an error.

        Arguments with "--" among them are parsed in argparse's own way.

        parse_known_intermixed_args calls this method again, once for the options and once for the other arguments.
        `_is_intermixed` marks these calls.
        """
        if self._is_intermixed:
            return super().parse_known_args(args, namespace)
        self._is_intermixed = True
        try:
            parse = super().parse_known_args if "--" in args else self.parse_known_intermixed_args
            arguments, unknown = parse(args, namespace)
        finally:
            self._is_intermixed = False
        if unknown:
            self._refuse(unknown)
        return arguments, []

    def _refuse(self, words: Sequence[str]) -> NoReturn:
        """Exit with the error that says which words are no option or argument, and what may have been meant."""
        takes_model = "--model" in self._option_string_actions and not self._get_positional_actions()
        hint = f"expected --model {words[0]}" if takes_model else "put a text of several words in quotes"
        if options := [word for word in words if word.startswith("-")]:
            words, hint = options, did_you_mean(options[0].partition("=")[0], self._option_string_actions)
        self.error(f"unrecognized arguments: {' '.join(words)}{hint and '; '}{hint}")
