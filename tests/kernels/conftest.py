"""One thread for all tests of kernels, but where a test says otherwise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mistral_kernels import threads


@pytest.fixture(autouse=True, scope="module")
def one_running_thread() -> Iterator[None]:
    """Let one thread do what several share out, except where a test says otherwise: on a busy machine they wait."""
    with threads.using(1):
        yield
