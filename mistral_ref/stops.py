"""What ends a text besides the model: strings, which are watched for in its text, and token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from mistral_ref.errors import InputError, checked_int
from mistral_ref.text.tokenizer import Tokenizer, checked_text

Stop = str | int | Iterable[str | int] | None


class StopStrings:
    """Watch a stream of text for stop strings. Text that may be the beginning of a stop string is held back.

    >>> watch = StopStrings(["END"])
    >>> watch.push("one E"), watch.push("N"), watch.push("tre END two"), watch.found
    ('one ', '', 'ENtre ', 'END')
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take the next text; return the text that cannot be part of a stop string.

        If a stop string is found, the result is the text before it, and `found` becomes that string.
        """
        text = self._held + text
        found = [(start, string) for string in self._strings if (start := text.find(string)) >= 0]
        if found:
            start, self.found = min(found)
            self._held = ""
            return text[:start]
        longest = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def flush(self) -> str:
        """Return the text that is held back. Call this at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Return how many characters at the end of `text` are also the beginning of `string`."""
    return next(n for n in range(min(len(text), len(string) - 1), -1, -1) if text.endswith(string[:n]))


def split_stops(stop: Stop, vocab_size: int, tokenizer: Tokenizer | None) -> tuple[tuple[str, ...], frozenset[int]]:
    """Return the stop strings and the stop ids in `stop`. `stop` is one of them, several of them, or None.

    A string that is the name of a control token gives its id too: the token has no text in which it could be found.
    Raises InputError for an empty string, for any string without a tokenizer, for an id outside [0, vocab_size), and
    for anything else, such as bytes.
    """
    stops: list[object] = [] if stop is None else [stop]
    if isinstance(stop, Iterable) and not isinstance(stop, (str, bytes, bytearray, memoryview)):
        with suppress(TypeError):  # a NumPy array that holds one number has no items
            stops = list(stop)
    strings = tuple(one for one in stops if isinstance(one, str))
    try:
        ids = frozenset(checked_int("stop", one, 0, vocab_size - 1) for one in stops if not isinstance(one, str))
    except InputError as error:
        raise InputError(f"{error}, a token id, or text") from None
    if "" in strings:
        raise InputError("stop is ''; expected text of at least one character, or a token id")
    for string in strings:
        checked_text(string)
        if tokenizer is None:
            raise InputError("this model has no tokenizer; expected stops as token ids")
        with suppress(InputError):
            ids |= {tokenizer.control_id(string)}
    return strings, ids
