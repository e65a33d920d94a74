"""The errors and warnings of this library, helpers for their messages, and the type of progress callbacks.

Every message is one line. It names the file, the tensor or field, the value that was found and the value that was
expected. Paths are never shortened. All errors that this library raises on purpose are MistralRefErrors.
"""

from __future__ import annotations

import difflib
import operator
import re
import reprlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from numbers import Real
from typing import SupportsIndex, TypeVar

_Choice = TypeVar("_Choice")
_OURS = "mistral_ref.", "mistral_kernels."
Progress = Callable[[int, int], None]  # called with (amount done, total amount) during long work
OnCompile = Callable[[int, int, str], object]  # the same for kernels, with the name of the next kernel


class MistralRefError(ValueError):
    r"""Something given to mistral_ref cannot be used. The message is one line, safe to print.

    The message is the arguments joined. What cannot be printed is escaped, for example a line break in a path.

    >>> str(InputError("a\nb: no such directory"))
    'a\\nb: no such directory'
    """

    def __str__(self) -> str:
        return escaped("".join(map(str, self.args)))


class Field(str):
    """The name of a field of a configuration, as one part of a ConfigError's message."""

    __slots__ = ()


class ConfigError(MistralRefError):
    """A configuration (params.json, config.json or a ModelConfig) is incomplete, wrong or contradicts itself.

    The message is the parts joined. A part that is a Field can be replaced by the name that a file uses for it.

    >>> error = ConfigError(Field("n_layers"), " is 0; expected a whole number from 1")
    >>> str(error.spelled_as({"n_layers": "num_hidden_layers"}))
    'num_hidden_layers is 0; expected a whole number from 1'
    """

    def __init__(self, *parts: str) -> None:
        super().__init__(*parts)
        self.parts = parts

    @property
    def field(self) -> str | None:
        """The name of the wrong field; None if the error is not about a field."""
        return next((str(part) for part in self.parts if isinstance(part, Field)), None)

    def spelled_as(self, names: Mapping[str, str]) -> ConfigError:
        """Return the same error; each field gets the name that `names` holds for it."""
        return ConfigError(*(Field(names.get(part, part)) if isinstance(part, Field) else part for part in self.parts))


class CheckpointError(MistralRefError):
    """The weights of a model cannot be read or written: a file, an index or a tensor is missing or wrong."""


class TokenizerError(MistralRefError):
    """A tokenizer file cannot be read, or does not belong to the model."""


class UnknownTokenizerError(TokenizerError):
    """A tokenizer file is of a kind, or asks for something, that this library does not have."""


class InputError(MistralRefError):
    """An argument of a call cannot be used: token ids, a prompt, an edit, a sampling setting."""


class CacheError(MistralRefError):
    """A cache does not fit its use: another model made it, it is full, or another pass has used it."""


class MistralRefWarning(UserWarning):
    """The library assumed or ignored something, and the result may depend on it."""


def warn(message: str, category: type[Warning] = MistralRefWarning) -> None:
    """Give a warning that points at the line of the user's code that called this package.

    What cannot be printed is escaped, as in errors.
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(escaped(message), category, stacklevel=level)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 4
_repr.maxlevel = 2


def short_repr(value: object) -> str:
    """Return the repr of a value for a message, on one line and cut to a short length.

    >>> short_repr("a" * 100)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    return re.sub(r"\s*\n\s*", " ", _repr.repr(value))  # NumPy shows arrays on several lines


def escaped(text: str) -> str:
    r"""Return a text in which every character can be printed: others become escapes, line breaks too.

    >>> escaped("\x1b[2J\n")
    '\\x1b[2J\\n'
    """
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def printable(text: str) -> str:
    r"""Return text from outside, for example another library's message, made safe for a message of ours.

    It is escaped as by `escaped`. At most 200 characters are kept.

    >>> printable("unknown variant `\x1b[2J\n`")
    'unknown variant `\\x1b[2J\\n`'
    """
    return escaped(text if len(text) <= 200 else f"{text[:197]}...")


def size(n_bytes: int) -> str:
    """Return a number of bytes in words, in the largest unit in which it is at least 1.

    >>> size(7_241_732_096 * 2)
    '13.49 GiB'
    >>> size(12)
    '12 bytes'
    """
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes >= 2**exponent:
            return f"{n_bytes / 2**exponent:.2f} {unit}"
    return f"{n_bytes} bytes"


def did_you_mean(text: str, names: Iterable[str]) -> str:
    """Return a question about the name that is most like a mistyped one; "" if none is like it.

    >>> did_you_mean("genrate", ["generate", "trace"]), did_you_mean("x", ["generate"])
    ("did you mean 'generate'?", '')
    """
    nearest = difflib.get_close_matches(text[:100], names, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else ""


def first_difference(found: object, expected: object, name: str = "") -> str:
    """Return the first place where two values differ, what was found there and what was expected; "" if they are equal.

    >>> first_difference({"dim": 8, "windows": [4, 4]}, {"dim": 8, "windows": [4, None]})
    'windows[1] is 4; expected None'
    >>> first_difference([1, 2], [1], "tokens")
    'tokens has 2 entries; expected 1'
    """
    if found == expected:
        return ""
    if isinstance(found, dict) and isinstance(expected, dict):
        key = next(key for key in (*expected, *found) if found.get(key) != expected.get(key))
        return first_difference(found.get(key), expected.get(key), f"{name}.{key}".lstrip("."))
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return f"{name} has {len(found)} entries; expected {len(expected)}"
        at = next(at for at, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
        return first_difference(found[at], expected[at], f"{name}[{at}]")
    return f"{name or 'it'} is {short_repr(found)}; expected {short_repr(expected)}"


def checked_choice(name: str, value: _Choice, choices: Iterable[str]) -> _Choice:
    """Return an argument that is one of `choices`; otherwise raise InputError.

    >>> checked_choice("bf16_inputs", "float16", ("float32", "bfloat16"))
    Traceback (most recent call last):
    mistral_ref.errors.InputError: bf16_inputs is 'float16'; expected one of float32, bfloat16
    """
    choices = list(choices)  # a list compares with values that have no hash, too
    if value not in choices:
        raise InputError(f"{name} is {short_repr(value)}; expected one of {', '.join(choices)}")
    return value


def checked_function(name: str, value: object) -> None:
    """Raise InputError unless an argument can be called, or is None."""
    if value is not None and not callable(value):
        raise InputError(f"{name} is {short_repr(value)}; expected a function")


def checked_settings(settings: Iterable[str], known: Iterable[str]) -> None:
    """Raise InputError if one of these names of settings is not known.

    >>> checked_settings(["top_pp"], ["top_k", "top_p"])
    Traceback (most recent call last):
    mistral_ref.errors.InputError: 'top_pp' is no setting; expected one of top_k, top_p
    """
    known = list(known)
    if unknown := [name for name in settings if name not in known]:
        raise InputError(f"{short_repr(unknown[0])} is no setting; expected one of {', '.join(known)}")


def checked_int(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return an argument as an int; raise InputError unless it is a whole number from `least` to `most`.

    NumPy's integers count as whole numbers. Without `most` there is no maximum.

    >>> checked_int("max_tokens", 0, least=1)
    Traceback (most recent call last):
    mistral_ref.errors.InputError: max_tokens is 0; expected a whole number of at least 1
    """
    if isinstance(value, SupportsIndex) and not isinstance(value, bool):
        with suppress(TypeError):  # an array of several numbers
            number = operator.index(value)
            if least <= number and (most is None or number <= most):
                return number
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise InputError(f"{name} is {short_repr(value)}; expected a whole number {bounds}")


def checked_float(name: str, value: object, least: float, most: float) -> float:
    """Return an argument as a float; raise InputError unless it is a number from `least` to `most`.

    NumPy's numbers count as numbers.

    >>> checked_float("top_p", float("nan"), least=0, most=1)
    Traceback (most recent call last):
    mistral_ref.errors.InputError: top_p is nan; expected a number from 0 to 1
    """
    # Compared before it is converted, because float() of a very large integer raises OverflowError.
    if isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most:  # type: ignore[operator]
        return float(value)
    raise InputError(f"{name} is {short_repr(value)}; expected a number from {least:g} to {most:g}")
