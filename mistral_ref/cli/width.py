"""Text that fits the terminal: how wide it is, and lines that are broken between words."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap

_FIRST_COLUMN = re.compile(r" *\S.*?  +(?=\S)")  # with the blanks after it
_LEAST = 16  # columns that a second column needs


def terminal_width() -> int | None:
    """Return how many columns a line of standard output may have; None if it goes to a file or a pipe."""
    if sys.stdout is None or not sys.stdout.isatty():
        return None
    return shutil.get_terminal_size().columns


def fitted(text: str) -> str:
    """Return lines, each of which is broken where the terminal ends. Without a terminal they do not change."""
    width = terminal_width()
    return "\n".join(wrapped(line, width) for line in text.split("\n"))


def wrapped(text: str, width: int | None) -> str:
    r"""Return a text in lines of at most `width` columns. It does not change if its lines fit, or without a width.

    Lines of the same indentation are one paragraph. A line of two columns, such as those of a list of names and
    meanings, goes on below its second column.

    >>> print(wrapped("There are two:\n  pp   a prompt, many tokens\n       at a time\n  tg   generation", 24))
    There are two:
      pp   a prompt, many
           tokens at a time
      tg   generation
    """
    if width is None or all(len(line) <= width for line in text.splitlines()):
        return text
    paragraphs: list[tuple[str, int]] = []  # a text, and the indentation of its second line
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        columns = _FIRST_COLUMN.match(line)
        if line and paragraphs and paragraphs[-1][0] and indent == paragraphs[-1][1] and not columns:
            paragraphs[-1] = f"{paragraphs[-1][0]} {line.lstrip()}", indent
        else:
            paragraphs.append((line, columns.end() if columns else indent))
    return "\n".join(_filled(line, indent, width) for line, indent in paragraphs)


def _filled(line: str, indent: int, width: int) -> str:
    if width - indent < _LEAST:
        line, indent = re.sub(r"(?<=\S)  +", "  ", line), 6
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_on_hyphens=False)
