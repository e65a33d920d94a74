"""The live page of a model: its server in threads of this process, and what tests do with the page in Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

from mistral_ref.study.live.server import LiveServer
from mistral_ref.study.live.session import Session
from mistral_ref.study.live.work import Work

HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><b>bold</b>"
PIECES = "[...document.querySelectorAll('[aria-label=Tokens] button bdi')].map((node) => node.textContent)"


def ignored(done: int, total: int) -> None:
    """What is told of the progress is ignored."""


@contextmanager
def served(session: Session, text: str) -> Iterator[str]:
    """Yield the address of a session that begins with a text."""
    work = Work()
    session.begin(text, ignored)
    with LiveServer(session, work) as server:
        for target, arguments in ((server.serve_forever, (0.01,)), (work.run, ())):
            Thread(target=target, args=arguments, daemon=True).start()
        yield server.url
        server.shutdown()


def opened(tab: Any, url: str, address: str = "block/embedding") -> Any:
    """Load the page anew, at a place."""
    tab.goto(f"{url}#{address}")
    tab.reload()  # another place of the same page is no new page
    tab.wait_for_selector("main h2")
    return tab


def shows(tab: Any, pieces: list[str]) -> None:
    """Wait until the tokens of the pass are these."""
    tab.wait_for_function(f"(pieces) => JSON.stringify({PIECES}) === JSON.stringify(pieces)", arg=pieces)


def typed(tab: Any, text: str, pieces: list[str]) -> None:
    """Type a text, and wait until its pass is shown."""
    tab.fill("textarea", text)
    shows(tab, pieces)


def changed(tab: Any, kind: str, **fields: str) -> None:
    """Add a change by the editor, and wait until it is shown."""
    before = tab.locator("ul.changes li").count()
    tab.select_option('[data-key="edit kind"]', kind)
    for name, value in fields.items():
        tab.fill(f'[data-key="edit {name.replace("_", " ")}"]', value)
    tab.click('[data-key="add change"]')
    tab.wait_for_function("(n) => document.querySelectorAll('ul.changes li').length === n", arg=before + 1)
