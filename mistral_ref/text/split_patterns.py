r"""The patterns by which byte-level BPE splits a text into words.

A pattern in a file is only compared with these: one of a stranger's could take for ever on a short text. In all of them
a word takes the space before it, and a run of spaces leaves its last one to the word behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import regex

_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"

# Words begin at capitals, and each digit is a word. All files of Mistral's.
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# "'s" and its like are words, and numbers are cut into three digits. Llama 3, from GPT-4.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGITS = r"\p{N}|\P{N}+"
NUMBERS = r"\p{N}+|\P{N}+"
KNOWN = (TEKKEN, LLAMA3, GPT2, DIGITS, NUMBERS)


def split(text: str, patterns: Sequence[str]) -> list[str]:
    r"""Return the words of a text; together they are the text. Each word of a pattern is split by the next pattern.

    >>> split("HelloWorld  it's 1234", [TEKKEN])
    ['Hello', 'World', ' ', ' it', "'s", ' ', '1', '2', '3', '4']
    >>> split("HelloWorld  it's 1234", [DIGITS, GPT2])
    ['HelloWorld', ' ', ' it', "'s", ' ', '1', '2', '3', '4']
    """
    words = [text]
    for pattern in patterns:
        find_all = _compiled(pattern).findall
        words = [part for word in words for part in find_all(word)]
    return words


@cache
def _compiled(pattern: str) -> regex.Pattern[Any]:
    import regex  # noqa: PLC0415  # SentencePiece does not need it, and its import takes as long as that of NumPy

    assert pattern in KNOWN
    return regex.compile(pattern)
