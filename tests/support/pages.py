"""What a browser would make of a piece of HTML: its tags, its texts, its tables. Nothing may be loaded or run."""

from __future__ import annotations

from html.parser import HTMLParser

_TAGS = {"div", "table", "caption", "thead", "tbody", "tr", "th", "td", "bdi", "img"}
_VOID = {"img"}


class Page(HTMLParser):
    """A parsed page. Asserts that tags are known, closed in order, and have no attributes but those of an image.

    texts       all texts, unescaped
    tables      of each its rows, of each its cells' texts
    images      the attributes of each image
    """

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.images: list[dict[str, str]] = []
        self._open: list[str] = []
        assert page.isprintable()
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _TAGS, tag
        assert tag == "img" or not attrs, attrs
        if tag == "img":
            self.images.append({name: value or "" for name, value in attrs})
            assert set(self.images[-1]) == {"alt", "width", "height", "style", "src"}
            assert self.images[-1]["src"].startswith("data:image/png;base64,")
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert self._open[-1] == "bdi", data  # whose direction is its own
        self.texts.append(data)
        if self._open[-2:-1] in (["th"], ["td"]):
            self.tables[-1][-1][-1] += data

    def handle_decl(self, decl: str) -> None:
        raise AssertionError(decl)

    handle_comment = handle_pi = unknown_decl = handle_decl
