"""Take the documentation's pictures of the page that `mistral-ref trace -o trace.html` writes, by Chromium.

python docs/make_screenshots.py [FOLDER]        # docs/figures, by default

Needs playwright and Chromium (Debian's package chromium).
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from story import N_STORY, STORY

import mistral_ref
from mistral_ref.study import report

VIEWS = {
    "page_block": "block/layers.2.q_rotated/2/3/20",
    "page_attention": "attention/layers.2.attention_weights/2/3/85",
}


def main(arguments: list[str]) -> None:
    """Write a PNG file of each view, light and dark."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent / "figures"
    model = mistral_ref.load()
    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as driver:
        page = Path(temporary) / "trace.html"
        report.write(model, model.token_ids(STORY)[:N_STORY], page, title="the demonstration model")
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for theme in ("light", "dark"):
            for name, address in VIEWS.items():
                tab = browser.new_page(viewport={"width": 1180, "height": 1000}, color_scheme=theme)
                tab.goto(f"{page.as_uri()}#{address}")
                tab.wait_for_selector("main figure canvas")
                tab.wait_for_timeout(500)  # for the canvas to find its size
                tab.screenshot(path=folder / f"{name}_{theme}.png")
                tab.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
