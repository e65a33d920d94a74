"""The words with which a reader chooses a part of a tensor: `head 3`, `token 0:4 dim 7`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from mistral_ref.errors import InputError, short_repr

# Another axis that a word stands for, if the step has no axis of this name.
_OTHER_NAMES = {"head": "kv_head", "token": "query"}

Index = int | slice


def axis_called(text: str, axes: Sequence[str]) -> str:
    """Return the axis that a word means: the axis of this name, or one for which "head" or "token" stands.

    If there is neither, it is the first axis whose name begins with the word.

    >>> axis_called("tok", ("token", "dim")), axis_called("head", ("token", "kv_head", "head_dim"))
    ('token', 'kv_head')
    """
    found = [axis for axis in axes if axis == text] or [axis for axis in axes if axis == _OTHER_NAMES.get(text)]
    found = found or [axis for axis in axes if axis.startswith(text)]
    if not found:
        raise InputError(f"{short_repr(text)} is no axis of this step; it has {', '.join(axes)}")
    return found[0]


def parsed_index(text: str, axis: str, size: int) -> Index:
    """Return the index or slice of an axis that a text means; raise InputError if nothing is there.

    The slice of a range without an end, such as "2:", has no end either, so it also fits a longer axis.

    >>> parsed_index("-1", "head", 8), parsed_index("2:4", "head", 8), parsed_index("-2:", "token", 8)
    (7, slice(2, 4, None), slice(6, None, None))
    """
    match = re.fullmatch(r"(-?\d{1,9})?(:)?(-?\d{1,9})?", text)
    if match is None or not text or (match[2] is None and (match[1] is None) == (match[3] is None)):
        raise InputError(f"{short_repr(text)} is no number or range such as 3, -1 or 0:4")
    if match[2] is None:
        number = int(text)
        if not -size <= number < size:
            raise InputError(f"{axis} {number} does not exist; expected {-size} to {size - 1}")
        return number % size
    start, stop, _ = slice(*(None if part is None else int(part) for part in (match[1], match[3]))).indices(size)
    if start >= stop:
        raise InputError(f"{axis} {text} is empty; {axis} goes from 0 to {size - 1}")
    return slice(start, None if match[3] is None else stop)


def parsed_selection(text: str, axes: Sequence[str], shape: Sequence[int], group: int = 1) -> dict[str, Index]:
    """Return the part that a text chooses: an index or slice for each axis that it names.

    If the step has only key/value heads, `head 5` means the key/value head that query head 5 reads. `group` query heads
    read each key/value head.

    >>> parsed_selection("head 3 token 0:2", ("token", "head", "head_dim"), (5, 8, 32))
    {'head': 3, 'token': slice(0, 2, None)}
    >>> parsed_selection("head 5", ("token", "kv_head", "head_dim"), (5, 2, 32), group=4)
    {'kv_head': 1}
    """
    words = text.split()
    if len(words) % 2:
        raise InputError(f"{short_repr(text)} chooses nothing; expected an axis and a number, such as `head 3`")
    chosen: dict[str, Index] = {}
    for word, number in zip(words[::2], words[1::2], strict=True):
        axis = axis_called(word, axes)
        size = shape[list(axes).index(axis)]
        if (word, axis) == ("head", "kv_head"):
            chosen[axis] = read_by(parsed_index(number, "head", size * group), group)
        else:
            chosen[axis] = parsed_index(number, axis, size)
    return chosen


def read_by(heads: Index, group: int) -> Index:
    """Return the key/value heads that query heads read; `group` query heads read each key/value head.

    >>> read_by(5, 4), read_by(slice(2, 5), 4), read_by(slice(5, None), 4)
    (1, slice(0, 2, None), slice(1, None, None))
    """
    if not isinstance(heads, slice):
        return heads // group
    return slice(heads.start // group, None if heads.stop is None else (heads.stop - 1) // group + 1)


def as_index(chosen: dict[str, Index], axes: Sequence[str]) -> tuple[Index, ...]:
    """Return the same choice as a NumPy index: an index or a slice for every axis."""
    return tuple(chosen.get(axis, slice(None)) for axis in axes)


def in_words(axis: str, index: Index, group: int = 1) -> str:
    """Return an index or slice in words; a key/value head comes with the query heads that read it.

    >>> in_words("token", slice(2, None)), in_words("kv_head", 1, 4)
    ('token 2:', 'kv_head 1 (read by heads 4 to 7)')
    """
    if not isinstance(index, slice):
        readers = f"heads {index * group} to {index * group + group - 1}" if group > 1 else f"head {index}"
        return f"{axis} {index}" + (f" (read by {readers})" if axis == "kv_head" else "")
    stop = "" if index.stop is None else index.stop
    return f"{axis} {index.start}:{stop}"
