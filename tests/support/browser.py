"""Chromium, driven by playwright: where it is, how it starts, and what a page must not do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")

# Whether the first heat map has its colours.
IS_DRAWN = """() => {
    const canvas = document.querySelector('main figure canvas');
    if (!canvas || canvas.width < 10) return false;
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return new Set(new Uint32Array(pixels.buffer)).size > 20;
}"""


def launched(driver: Any) -> Any:
    """Return a browser of this playwright driver, which ends with the driver."""
    return driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # root has no sandbox


class Complaints(list[str]):
    """What a page says on its console, throws, or pops up, and what it asks for outside the address `own`."""

    def __init__(self, tab: Any, own: str) -> None:
        super().__init__()
        tab.on("console", lambda message: self.append(f"console: {message.text}"))
        tab.on("pageerror", lambda error: self.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: (self.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        tab.on("request", lambda request: request.url.startswith(own) or self.append(f"request: {request.url}"))


@contextmanager
def quiet_tab(browser: Any, own: str) -> Iterator[Any]:
    """Yield a tab in which nothing may be complained of."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    tab = context.new_page()
    complaints = Complaints(tab, own)
    yield tab
    context.close()
    assert complaints == []
