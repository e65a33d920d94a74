"""What the site adds to MkDocs: pages of notebooks, pages of source that links out of docs/ lead to, and trace.html.

There is no public address of the repository, so a link to ../mistral_ref/rope.py leads to a page of the site that shows
that file. Only files that something links to get one.
"""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import mistral_ref
from mistral_ref.study import report

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
sys.path.append(str(DOCS))

from story import N_STORY, STORY  # noqa: E402

_LINK = re.compile(r"(?P<text>\[[^\]]*\])\((?P<target>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")
_LANGUAGES = {".py": "python", ".toml": "toml", ".md": "markdown", ".js": "javascript", ".css": "css", ".sh": "sh"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let the site be made of the folder that mkdocs.yml lies in, which MkDocs refuses as a setting."""
    config.docs_dir = str(DOCS)
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for every notebook, then one for every file of the repository that a page links to."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text = notebook_page(json.loads(notebook.content_string), notebook.name)
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content=text))
    linked = {
        path
        for page in files.documentation_pages()
        for match in _LINK.finditer(page.content_string)
        if (path := _shown_as_source(page.src_uri, match["target"])) is not None
    }
    for path in sorted(linked):
        files.append(File.generated(config, _source_uri(path), content=source_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to notebooks and to files outside docs/ lead to the pages that stand for them."""

    def replaced(match: re.Match[str]) -> str:
        text, target, anchor = match["text"], match["target"], match["anchor"] or ""
        path = _shown_as_source(page.file.src_uri, target)
        if path is not None:
            start = os.path.dirname(page.file.src_uri)
            return f"{text}({os.path.relpath(_source_uri(path), start or '.')}{anchor})"
        if target.endswith(".ipynb"):
            return f"{text}({target.removesuffix('.ipynb')}.md{anchor})"
        return match[0]

    return _LINK.sub(replaced, markdown)


def on_post_build(config: MkDocsConfig) -> None:
    """Add what `mistral-ref trace -o trace.html` writes, of a text that is longer than the window."""
    model = mistral_ref.load()
    path = Path(config.site_dir) / "trace.html"
    report.write(model, model.token_ids(STORY)[:N_STORY], path, title="the demonstration model")


def _shown_as_source(page_uri: str, target: str) -> str | None:
    """Return the path in the repository of a link's target, if it is a file that is no part of the site as it is."""
    file = (DOCS / page_uri).parent / target
    if not file.is_file() or (file.resolve().is_relative_to(DOCS) and file.suffix != ".py"):
        return None
    return file.resolve().relative_to(ROOT).as_posix()


def _source_uri(path: str) -> str:
    return f"source/{path}.md"


def source_page(path: str) -> str:
    """Return the page that shows a file of the repository, its lines numbered."""
    text = (ROOT / path).read_text(encoding="utf-8").rstrip()
    language = _LANGUAGES.get(Path(path).suffix, "text")
    head = "---\nhide: [navigation, toc]\nsearch: {exclude: true}\n---\n\n"
    return f'{head}# {path}\n\n````````{language} linenums="1"\n{text}\n````````\n'


def notebook_page(notebook: Any, name: str) -> str:
    """Return a notebook as Markdown: its prose, its code, and below each cell what it showed."""
    first, *others = notebook["cells"]
    download = f'<a class="md-button" href="{name}.ipynb" download>Download this notebook</a>'
    parts = ["".join(first["source"]), download]
    for cell in others:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts += [f"```python\n{source}\n```", *map(_output, _shown(cell["outputs"]))]
    return "\n\n".join(parts)


def _shown(outputs: Any) -> Iterator[tuple[str, str]]:
    """Yield (kind, content) of each output, in the richest form that it has."""
    for output in outputs:
        data = output.get("data", {"text/plain": output.get("text", "")})
        kind = next(kind for kind in ("image/png", "text/html", "text/plain") if kind in data)
        yield kind, "".join(data[kind])


def _output(shown: tuple[str, str]) -> str:
    kind, content = shown
    if kind == "image/png":
        data = content.replace("\n", "")
        content = f'<img alt="picture drawn by the cell above" src="data:image/png;base64,{data}">'
    elif kind == "text/plain":
        content = f"<pre><code>{html.escape(content.rstrip())}</code></pre>"
    return f'<div class="output">{content}</div>'
