"""The site builds without a warning, its links lead somewhere, and it loads nothing from a network."""

from __future__ import annotations

import doctest
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support.paths import ROOT

DOCS = ROOT / "docs"
_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "object": "data"}


class SitePage(HTMLParser):
    """What a page refers to.

    anchors     where a link into the page can lead
    links       targets of links
    loaded      what a browser fetches to show the page
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.add(values.get("id", ""))
        if tag == "a":
            self.anchors.add(values.get("name", ""))
            self.links += [values["href"]] if "href" in values else []
        if tag in _LOADS and _LOADS[tag] in values:
            self.loaded.append(values[_LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the site, built so that a warning is an error."""
    if any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings_handlers")):
        pytest.skip("mkdocs is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(DOCS / "mkdocs.yml"), "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme's word about its successor
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, SitePage]:
    return {path: SitePage(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}


@pytest.mark.slow
def test_every_page_of_the_documentation_is_there(site: Path, pages: dict[Path, SitePage]) -> None:
    made = {path.relative_to(site).with_suffix("").as_posix() for path in pages}
    for source in [
        *DOCS.glob("*.md"),
        *DOCS.glob("course/*.md"),
        *DOCS.glob("api/*.md"),
        *DOCS.glob("notebooks/*.ipynb"),
    ]:
        assert source.relative_to(DOCS).with_suffix("").as_posix() in made
    assert "source/mistral_ref/transformer.py" in made
    assert not list(site.rglob("*.py"))


@pytest.mark.slow
def test_links_and_anchors_lead_somewhere(site: Path, pages: dict[Path, SitePage]) -> None:
    lost = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            base = site if parts.path.startswith("/") else path.parent  # 404.html's, which may be shown anywhere
            target = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            is_there = unquote(parts.fragment) in pages[target].anchors if target in pages else target.is_file()
            lost += [] if is_there else [f"{path.relative_to(site)}: {link}"]
    assert not lost


@pytest.mark.slow
def test_nothing_is_loaded_from_a_network(site: Path, pages: dict[Path, SitePage]) -> None:
    for path, page in pages.items():
        for target in page.loaded:
            parts = urlsplit(target)
            assert parts.scheme in ("", "data"), f"{path.relative_to(site)} loads {target}"
            assert not parts.netloc, f"{path.relative_to(site)} loads {target}"
            if not parts.scheme:
                base = site if target.startswith("/") else path.parent
                assert (base / unquote(parts.path).lstrip("/")).is_file(), f"{path.relative_to(site)} loads {target}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style.name


@pytest.mark.slow
def test_docstrings_keep_their_lists_and_code(site: Path) -> None:
    page = (site / "api" / "model.html").read_text(encoding="utf-8")
    assert "<dt><code>max_tokens</code></dt>\n<dd>how many at most</dd>" in page
    assert "<dt><code>temperature</code>, <code>top_k</code>, <code>top_p</code>, <code>min_p</code></dt>" in page
    assert '"layers.*.attention_weights"' in page
    assert 'class="gp">&gt;&gt;&gt;' in (site / "api" / "cache.html").read_text(encoding="utf-8")  # a doctest
    spec = importlib.util.spec_from_file_location("docstrings", DOCS / "site" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module).failed == 0
