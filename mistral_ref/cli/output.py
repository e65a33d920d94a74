"""All that the commands print: text from outside must not act as a command of the terminal that shows it.

Such text is what a model writes, a path, or a name in a file. Names and paths go through `errors.escaped` where they
become part of a line, so that they stay on it.
"""

from __future__ import annotations

import re
import shutil
import sys
from typing import IO

_UNDERLINED, _NOT_UNDERLINED = "\x1b[4m", "\x1b[24m"
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but the line feed and the tab


def say(text: object = "", *, end: str = "\n", error: bool = False) -> None:
    """Print a text at once, to standard output or to standard error.

    A terminal gets its control characters as escapes. A pipe or a file gets the exact text.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is not None:  # it is None where the program was started without it
        print(fit_for(stream, str(text)), end=end, file=stream, flush=True)


def say_token(text: str, *, is_marked: bool = False) -> None:
    """Print a token's text to standard output; a marked one is underlined, if that is a terminal."""
    if is_marked and sys.stdout is not None and sys.stdout.isatty():
        sys.stdout.write(f"{_UNDERLINED}{fit_for(sys.stdout, text)}{_NOT_UNDERLINED}")
        sys.stdout.flush()
    else:
        say(text, end="")


def show_in_place(text: str) -> None:
    """Show a text in the terminal's last line, in place of the text that was shown so before; "" clears the line."""
    width = shutil.get_terminal_size().columns - 1
    shown = fit_for(sys.stderr, text)[:width]
    sys.stderr.write(f"\r{shown:<{width}}\r{shown}")
    sys.stderr.flush()


def fit_for(stream: IO[str], text: str) -> str:
    r"""Return a text as a stream may get it: for a terminal, control characters other than \n and \t are escaped."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text) if stream.isatty() else text
