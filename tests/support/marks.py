"""Which parameters of a test are tried each time, and which only with -m slow."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest


def slow_but(kept: Collection[str], parameters: Mapping[str, Any]) -> list[Any]:
    """Return parameters with their names as ids: those in `kept` as they are, the others marked slow.

    >>> [(one.id, len(one.marks)) for one in slow_but(["a"], {"a": 1, "b": 2})]
    [('a', 0), ('b', 1)]
    """
    assert set(kept) <= set(parameters)
    return [
        pytest.param(value, id=name, marks=() if name in kept else pytest.mark.slow)
        for name, value in parameters.items()
    ]


def slow(values: Iterable[Any]) -> list[Any]:
    """Return parameters that are tried only with -m slow."""
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]
