"""Take the documentation's pictures of the pages of `mistral-ref trace -o trace.html` and `mistral-ref explore`.

python docs/make_screenshots.py [FOLDER]        # docs/figures, by default

Chromium takes them. Needs playwright and Chromium (Debian's package chromium).
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import quote

from playwright.sync_api import sync_playwright
from story import N_STORY, STORY

import mistral_ref
from mistral_ref.study import report
from mistral_ref.study.live.server import LiveServer
from mistral_ref.study.live.session import Session
from mistral_ref.study.live.work import Work

VIEWS = {
    "page_block": "block/layers.2.q_rotated/2/3/20",
    "page_attention": "attention/layers.2.attention_weights/2/3/85",
}


# Two heads are taken from the pass of the text with Lily.
TOM, LILY = (f"{name} went to the park. Then" for name in ("Tom", "Lily"))
CHANGES = [{"kind": "patch", "step": f"layers.{layer}.heads", "head": 3, "text": LILY} for layer in (3, 4)]


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
        take_live(browser, model, folder)
        browser.close()


def take_live(browser: Any, model: mistral_ref.Model, folder: Path) -> None:
    """Take the picture of the live page."""
    session, work = Session(model, "the demonstration model", exercises=True), Work()
    session.begin(TOM, lambda done, total: None)
    kept = quote(json.dumps({"text": TOM, "changes": CHANGES, "shown": "before"}), safe="")
    with LiveServer(session, work) as server:
        for target in (server.serve_forever, work.run):
            Thread(target=target, daemon=True).start()
        for theme in ("light", "dark"):
            tab = browser.new_page(viewport={"width": 1400, "height": 1000}, color_scheme=theme)
            tab.goto(f"{server.url}#attention/layers.4.attention_weights/4/3/7/{kept}")
            tab.wait_for_selector("text=take head 3 of layers.4.heads")
            tab.wait_for_selector('[aria-label="How the text goes on"] h3')
            if tab.is_visible('[data-key="goes on"]'):  # a busy machine is slow
                tab.click('[data-key="goes on"]')
                tab.wait_for_selector(".goes-on")
            tab.wait_for_selector("main figure canvas")
            tab.wait_for_timeout(500)
            tab.screenshot(path=folder / f"page_explore_{theme}.png")
            tab.close()
        server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
