"""The one family of errors, how a found value is shown in a message, and the one type of progress callbacks.

Every message is one line and says which file, which tensor or field, what was found and what was expected. A user who
catches `MistralRefError` has caught everything that this library raises on purpose.
"""

from __future__ import annotations

import operator
import re
import reprlib
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import SupportsIndex

Progress = Callable[[int, int], None]  # called with (done, in all) while something long goes on


class MistralRefError(ValueError):
    """Something given to mistral_ref cannot be used. The message is one line."""


class Field(str):
    """The name of a configuration's field, as a part of a ConfigError."""

    __slots__ = ()


class ConfigError(MistralRefError):
    """A configuration (params.json, config.json or a ModelConfig) is missing something or contradicts itself.

    The message is made of parts. Those that are Fields can be replaced by what a file calls them.

    >>> error = ConfigError(Field("n_layers"), " is 0; expected a whole number from 1")
    >>> str(error.spelled_as({"n_layers": "num_hidden_layers"}))
    'num_hidden_layers is 0; expected a whole number from 1'
    """

    def __init__(self, *parts: str) -> None:
        super().__init__(*parts)
        self.parts = parts

    def __str__(self) -> str:
        return "".join(self.parts)

    @property
    def field(self) -> str | None:
        """The field that is wrong; None where the error is of no field."""
        return next((str(part) for part in self.parts if isinstance(part, Field)), None)

    def spelled_as(self, names: Mapping[str, str]) -> ConfigError:
        """Return the same error with other names for its fields."""
        return ConfigError(*(Field(names.get(part, part)) if isinstance(part, Field) else part for part in self.parts))


class CheckpointError(MistralRefError):
    """A directory of weights cannot be read: a file, an index or a tensor is not what it should be."""


class TokenizerError(MistralRefError):
    """A tokenizer file cannot be read, or does not belong to the model."""


class InputError(MistralRefError):
    """An argument of a call is out of range: token ids, a prompt, an edit, a sampling parameter."""


class CacheError(MistralRefError):
    """A cache is used with a model, a length or an order that it was not made for."""


class MistralRefWarning(UserWarning):
    """Something was assumed or left aside while loading, and the result may depend on it."""


def warn(message: str) -> None:
    """Give a MistralRefWarning that points at the line of the user's that called into this package."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("mistral_ref."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, MistralRefWarning, stacklevel=level)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 4
_repr.maxlevel = 2


def short_repr(value: object) -> str:
    """Return `value` as it appears in a message: its repr, cut to a length that keeps the message on one line.

    >>> short_repr("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    return re.sub(r"\s*\n\s*", " ", _repr.repr(value))  # NumPy shows arrays on several lines


def printable(text: str) -> str:
    r"""Return foreign text, such as another library's message, as part of ours: on one line, escaped, not too long.

    >>> printable("unknown variant `\x1b[2J\n`")
    'unknown variant `\\x1b[2J\\n`'
    """
    kept = text if len(text) <= 200 else f"{text[:197]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in kept)


def checked_int(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an argument as an int if it is a whole number (NumPy's too) in bounds; otherwise raise InputError.

    >>> checked_int("max_tokens", 0, least=1)
    Traceback (most recent call last):
    mistral_ref.errors.InputError: max_tokens is 0; expected a whole number of at least 1
    """
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        number = operator.index(value)
        if least <= number and (most is None or number <= most):
            return number
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise InputError(f"{name} is {short_repr(value)}; expected a whole number {bounds}")
