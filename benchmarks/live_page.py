"""How long `mistral-ref explore` takes to show a text that is typed: from the key to the drawn page, in Chromium.

The text's last letter is exchanged again and again. The page's own clock says how long it takes until the view and the
next tokens are drawn, and until the continuation is, which comes last. Each view is timed without changes, and with a
head that is switched off: a page with changes needs two passes. Needs playwright (the extra browser) and Chromium.
"""

from __future__ import annotations

import argparse
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from common import add_threads_option, finish, parser_for, status

import mistral_ref
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int
from mistral_ref.host import chosen_threads
from mistral_ref.measure.benchmark import spread, write_json
from mistral_ref.measure.machine import machine, machine_lines

EXAMPLES = """\
examples:
  python benchmarks/live_page.py
  python benchmarks/live_page.py --tokens 200 --threads 1
"""
TARGET = 0.3  # seconds, for 64 tokens
STORY = "Once upon a time there was a little girl named Lily. She loved to play in the park with her friend Tom. "
VIEWS = ("block", "attention", "heads", "lens")
SWITCHED_OFF = [{"kind": "zero", "step": "layers.0.heads", "head": 0}]

# Types a text; gives the milliseconds until all but the continuation is drawn, and until that is.
TYPED = """async (text) => {
    const box = document.querySelector("textarea"), begun = performance.now();
    const painted = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    box.value = text;
    box.dispatchEvent(new Event("input", { bubbles: true }));
    while (passes.question.text !== text) await new Promise((done) => setTimeout(done, 1));
    const others = [...document.querySelectorAll("main *")].filter((node) => node !== goesOnBox);
    await Promise.all(others.map((node) => fillings.get(node)));
    await painted();
    const seen = performance.now() - begun;
    await fillings.get(goesOnBox);
    await painted();
    return [seen, performance.now() - begun];
}"""


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__ or "", EXAMPLES)
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of the text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="letters typed (default: %(default)s)")
    add_threads_option(parser)
    parser.add_argument("--json", metavar="FILE", help="write the machine and every sample there")
    return parser.parse_args()


@contextmanager
def page_of(text: str, threads: int) -> Iterator[Any]:
    """Yield a tab of Chromium with the live page of a text, from a server in another process."""
    try:
        from playwright.sync_api import sync_playwright  # noqa: PLC0415
    except ImportError:
        raise InputError("playwright is not installed; pip install 'mistral-ref[browser]' brings it") from None
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise InputError("Chromium is not installed; expected a program called chromium or google-chrome")
    command = [sys.executable, "-m", "mistral_ref", "explore", "--no-browser", "--prompt", text]
    server = subprocess.Popen([*command, "--threads", str(threads)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(url)
            yield tab
    finally:
        server.terminate()
        server.wait()


def story_of(n_tokens: int) -> str:
    """Return the beginning of a story that has n tokens, its last one a letter."""
    model = mistral_ref.load(backend="numpy")
    ids = model.token_ids(STORY * (n_tokens // 20 + 1))[: n_tokens - 2]
    assert model.tokenizer is not None
    return model.tokenizer.decode(ids) + " x"


def measure(arguments: argparse.Namespace) -> None:
    """Type letters in each view; print a table, and write the file."""
    n_tokens, n_repeats = checked_int("tokens", arguments.tokens, least=3), checked_int("repeats", arguments.repeats, 1)
    threads = chosen_threads(arguments.threads)
    text, samples, rows = story_of(n_tokens), {}, []
    with page_of(text, threads) as tab:
        for view in VIEWS:
            for name, changes in (("none", []), ("a head is off", SWITCHED_OFF)):
                status(f"{view}, changes: {name}")
                tab.evaluate("(view) => go({ view })", view)
                tab.evaluate("(changes) => show({ changes }, changes.length ? 'after' : 'before')", changes)
                letters = (string.ascii_letters * n_repeats)[: n_repeats + 2]
                times = [tab.evaluate(TYPED, text[:-1] + letter) for letter in letters][2:]
                seen, continued = ([both[index] / 1000 for both in times] for index in (0, 1))
                samples[f"{view}, {name}"] = times
                rows.append([view, name, *spread(seen).text(2), *spread(continued).text(2)])
    status()
    about = machine(threads)
    print("\n".join(machine_lines(about)))
    print(f"the demonstration model, {n_tokens} tokens; seconds from the key to the drawn page\n")
    columns = ["view and next tokens", "min to max", "with the continuation", "min to max"]
    print(markdown_table(["view", "changes", *columns], rows))
    worst = max(spread([seen for seen, _ in times]).median for times in samples.values()) / 1000
    print(f"\nthe slowest view: {worst:.2f} s; target for 64 tokens: at most {TARGET} s")
    if arguments.json:
        write_json(arguments.json, {"machine": about, "milliseconds": samples})


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
