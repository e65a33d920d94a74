"""What several tests of this room share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from support.browser import launched, quiet_tab

import mistral_ref


@pytest.fixture(scope="module")
def model() -> mistral_ref.Model:
    """The demonstration model, by NumPy."""
    return mistral_ref.load(backend="numpy")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium. A module's alone: its driver keeps an event loop, in which other tests cannot start theirs."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        yield launched(driver)


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Any]:
    """A tab in which nothing may be complained of; a module's `url` is the address of its page."""
    with quiet_tab(browser, url) as tab:
        yield tab
