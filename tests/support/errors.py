"""Facts in a message: tests pin these, and the sentence around them stays free to change."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath

import pytest

from mistral_ref.errors import MistralRefError, MistralRefWarning


def _alone(fact: object) -> str:
    """Return a regex of a fact that stands alone: 12 is not in 128, 1.12 or -12, nor a path in one that goes on."""
    text = str(fact)
    before = r"(?<!\w)" if re.match(r"\w", text) else ""
    if re.match(r"\d", text):
        before += r"(?<!\d\.)(?<!\W-)(?<!^-)"
    after = r"(?!\w)(?!\.\d)" if re.search(r"\w$", text) else ""
    if isinstance(fact, PurePath):
        after += r"(?!/)(?!\.\w)"
    return before + re.escape(text) + after


def unsaid(message: str, *facts: object) -> list[str]:
    """Return which of these facts a message does not say: `str(fact)` as a whole word, number or path.

    Paths, longest first, are looked for and taken out before the rest: no other fact is found in the name of a folder.
    """
    assert facts
    assert all(str(fact) for fact in facts), facts
    missing = []
    for fact in sorted(facts, key=lambda fact: -len(str(fact)) if isinstance(fact, PurePath) else 0):
        if not re.search(_alone(fact), message):
            missing.append(str(fact))
        if isinstance(fact, PurePath):
            message = re.sub(_alone(fact), "", message)
    return missing


def assert_says(message: str, *facts: object) -> None:
    """Assert that a message is one line, fit for any terminal, and says each of these facts."""
    assert message.isprintable(), repr(message)
    missing = unsaid(message, *facts)
    assert not missing, f"{message!r} does not say {missing}"


def assert_complains(stderr: str, *facts: object, program: str = "mistral-ref") -> None:
    """Assert that a command wrote one line under its name to the error stream, and that it says each of these facts."""
    found = re.fullmatch(rf"{re.escape(program)}[\w -]*: ([^\n]+)\n", stderr)
    assert found is not None, repr(stderr)
    assert_says(found[1], *facts)


@contextmanager
def refused(kind: type[MistralRefError], *facts: object) -> Iterator[pytest.ExceptionInfo[MistralRefError]]:
    """Expect an error of this kind whose message is one line and says each of these facts."""
    with pytest.raises(kind) as caught:
        yield caught
    assert_says(str(caught.value), *facts)


@contextmanager
def warned(*facts: object) -> Iterator[pytest.WarningsRecorder]:
    """Expect warnings of ours, of one line each; one of them says each of these facts."""
    with pytest.warns(MistralRefWarning) as caught:
        yield caught
    messages = [str(warning.message) for warning in caught if issubclass(warning.category, MistralRefWarning)]
    assert all(message.isprintable() for message in messages), messages
    assert not all(unsaid(message, *facts) for message in messages), f"none of {messages} says all of {facts}"
