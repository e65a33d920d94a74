"""How a reader chooses a part of a tensor in words: `head 3`, `token 0:4 dim 7`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mistral_ref.errors import InputError, shown

# What a reader may say for an axis, where a step has no axis of that very name.
_OTHER_NAMES = {"head": "kv_head", "token": "query"}

Index = int | slice


def axis_called(text: str, axes: Sequence[str]) -> str:
    """Return the axis that a word means: its name, its beginning, or "head" and "token" for what comes closest.

    >>> axis_called("tok", ("token", "dim")), axis_called("head", ("token", "kv_head", "head_dim"))
    ('token', 'kv_head')
    """
    found = [axis for axis in axes if axis == text] or [axis for axis in axes if axis == _OTHER_NAMES.get(text)]
    found = found or [axis for axis in axes if axis.startswith(text)]
    if not found:
        raise InputError(f"{shown(text)} is no axis of this step; it has {', '.join(axes)}")
    return found[0]


def parsed_index(text: str, axis: str, size: int) -> Index:
    """Return an index, or a slice, of an axis; raise InputError if nothing lies there.

    >>> parsed_index("-1", "head", 8), parsed_index("2:4", "head", 8)
    (7, slice(2, 4, None))
    """
    match = re.fullmatch(r"(-?\d{1,9})?(:)?(-?\d{1,9})?", text)
    if match is None or not text or (match[2] is None and (match[1] is None) == (match[3] is None)):
        raise InputError(f"{shown(text)} is no number or range such as 3, -1 or 0:4")
    if match[2] is None:
        number = int(text)
        if not -size <= number < size:
            raise InputError(f"{axis} {number} does not exist; expected {-size} to {size - 1}")
        return number % size
    start, stop, _ = slice(*(None if part is None else int(part) for part in (match[1], match[3]))).indices(size)
    if start >= stop:
        raise InputError(f"{axis} {text} is empty; {axis} goes from 0 to {size - 1}")
    return slice(start, stop)


def parsed_selection(text: str, axes: Sequence[str], shape: Sequence[int]) -> dict[str, Index]:
    """Return the part that words choose, an index or slice for each axis that they name.

    >>> parsed_selection("head 3 token 0:2", ("token", "head", "head_dim"), (5, 8, 32))
    {'head': 3, 'token': slice(0, 2, None)}
    """
    words = text.split()
    if len(words) % 2:
        raise InputError(f"{shown(text)} chooses nothing; expected an axis and a number, such as `head 3`")
    chosen: dict[str, Index] = {}
    for word, number in zip(words[::2], words[1::2], strict=True):
        axis = axis_called(word, axes)
        chosen[axis] = parsed_index(number, axis, shape[list(axes).index(axis)])
    return chosen
