"""Make Markdown of docstrings, for the API reference.

In the source they are laid out to be read as plain text: prose, names in a column with what they mean beside them,
indented code, doctests. Here each becomes what Markdown has for it.
"""

from __future__ import annotations

import ast
import html
import re
import textwrap
from typing import Any

import griffe

_ITEM = re.compile(r"(?P<name>\S+(?: \S+)*) {2,}(?P<text>\S.*)")
_NAMES = re.compile(r"[\w.*]+(?:, [\w.*]+)*")
_CODE_SPAN = re.compile(r"(`[^`]*`)")
_SPECIAL = re.compile(r"([\\*_\[\]#|])")


class MarkdownDocstrings(griffe.Extension):
    """Change every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Replace the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
    r"""Return a docstring as Markdown.

    >>> print(as_markdown("Return x*y.\n\nx    the first,\n     a number\n\n    y = 1"))
    Return x\*y.
    <BLANKLINE>
    `x`
    :   the first, a number
    <BLANKLINE>
    ```python
    y = 1
    ```
    """
    blocks = re.split(r"\n(?:[ \t]*\n)+", textwrap.dedent(docstring).strip("\n"))
    merged: list[str] = []
    for block in blocks:  # code with blank lines in it is one block
        if merged and _is_indented(block) and _is_indented(merged[-1]):
            merged[-1] += f"\n\n{block}"
        else:
            merged.append(block)
    return "\n\n".join(map(_block, merged))


def _is_indented(block: str) -> bool:
    return all(line.startswith("    ") for line in block.splitlines() if line)


def _block(block: str) -> str:
    if block.startswith(">>>"):
        return f"```pycon\n{block}\n```"
    if _is_indented(block):
        code = textwrap.dedent(block)
        return f"```{'python' if _is_python(code) else 'text'}\n{code}\n```"
    parts: list[str] = []  # of lines: a definition list for items, paragraphs for others
    for line in block.splitlines():
        item = _ITEM.fullmatch(line)
        if item:
            parts.append(f"{_names(item['name'])}\n:   {_escaped(item['text'])}")
        elif not parts or (not line.startswith(" ") and "\n:   " in parts[-1]) or line.startswith("- "):
            parts.append(_escaped(line))
        elif "\n:   " in parts[-1]:
            parts[-1] += f" {_escaped(line.strip())}"
        else:
            parts[-1] += f"\n{_escaped(line)}"
    return "\n\n".join(parts)


def _is_python(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def _names(text: str) -> str:
    if _NAMES.fullmatch(text):
        return ", ".join(f"`{name}`" for name in text.split(", "))
    return _escaped(text)


def _escaped(text: str) -> str:
    r"""Return prose with no character in it that Markdown takes for more than it is; code between backticks stays.

    >>> print(_escaped("`x*y` is not x*y < <s>"))
    `x*y` is not x\*y &lt; &lt;s&gt;
    """
    parts = _CODE_SPAN.split(text)
    return "".join(
        part if part.startswith("`") else _SPECIAL.sub(r"\\\1", html.escape(part, quote=False)) for part in parts
    )
