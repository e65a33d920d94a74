"""The examples of the documentation run as printed."""

from __future__ import annotations

import codeop
import contextlib
import io
import re
from pathlib import Path

import pytest
from support.marks import slow_but
from support.paths import ROOT

COURSE = tuple(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs" / "course").glob("*.md")))
PAGES = (
    "README.md",
    "docs/weights.md",
    "docs/generating.md",
    "docs/chat.md",
    "docs/in-a-program.md",
    "docs/stepping.md",
    "docs/quantization.md",
    *COURSE,
)
GUIDES = ("architecture", "benchmarks", "changelog", "conformance", "contributing", "kernels", "transformer-lens")
MEASUREMENTS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs" / "measurements").glob("*.md"))]
ADAPTERS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs" / "conformance").glob("*.md"))]
LINKED = (*PAGES, *ADAPTERS, *(f"docs/{guide}.md" for guide in GUIDES), *MEASUREMENTS)

# A block of Python, and the block of text that follows it at once, if one does: what it prints.
_EXAMPLE = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


@pytest.mark.parametrize("page", slow_but(["README.md"], {page: page for page in PAGES}))
def test_python_examples_run_and_print_what_is_shown(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    examples = _EXAMPLE.findall((ROOT / page).read_text(encoding="utf-8"))
    assert examples or page.endswith("index.md")
    for block, expected in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.replace('"path/to/dir", ', ""), page, "exec"), names)
        assert not expected or printed.getvalue() == expected


@pytest.mark.parametrize("page", PAGES)
def test_examples_can_be_pasted_into_pythons_prompt_line_by_line(page: str) -> None:
    """There an empty line ends the body of a loop or a function, and nothing else does."""
    for block, _ in _EXAMPLE.findall((ROOT / page).read_text(encoding="utf-8")):
        compiled, entered = codeop.CommandCompiler(), ""
        for line in [*block.splitlines(), ""]:
            entered += f"{line}\n"
            try:
                is_whole = compiled(entered.removesuffix("\n")) is not None
            except SyntaxError as error:
                pytest.fail(f"{page}: {error.msg} at {line!r}")
            entered = "" if is_whole else entered
        assert not entered.strip()


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
