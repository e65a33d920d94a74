"""Execute the documentation's notebooks in place, and keep of what they show only what is the same every time.

python docs/run_notebooks.py [NOTEBOOK ...]     # all of docs/notebooks, by default

Needs nbclient and ipykernel: pip install 'mistral-ref[notebooks]'. tests/docs/test_notebooks.py executes them in the
same way and compares what comes out with what is committed.
"""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"
_RICH = ("text/html", "image/png")
_VARIES = re.compile(r"data:image/png;base64,[^\"]*|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")  # pictures, numbers in HTML


def executed(path: Path) -> nbformat.NotebookNode:
    """Return a notebook, run from a clean start in a folder of its own; raise CellExecutionError where a cell fails."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=120, resources=resources, coalesce_streams=True).execute()
    return tidied(notebook)


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Take away what a run leaves besides results: times, versions, and the plain text beside a richer output."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode()
        for output in cell.get("outputs", ()):
            if "data" in output:
                output.metadata = nbformat.NotebookNode()
                if any(kind in output.data for kind in _RICH):
                    output.data.pop("text/plain", None)
    return notebook


def shown(notebook: nbformat.NotebookNode) -> Iterator[tuple[str, str, str]]:
    """Yield (cell's id, kind, text) of all that a notebook shows, without what depends on the machine.

    What is printed counts letter by letter. Of HTML the numbers are left out, of pictures all but that they are there.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            yield from ((cell.id, kind, text) for kind, text in _contents(output))


def _contents(output: Any) -> Iterator[tuple[str, str]]:
    if output.output_type == "stream":
        yield output.name, output.text
    for kind, text in output.get("data", {}).items():
        yield kind, _VARIES.sub("#", text) if kind == "text/html" else "" if kind.startswith("image/") else text


def main(arguments: list[str]) -> None:
    """Execute notebooks and write them back."""
    for path in map(Path, arguments) if arguments else sorted(FOLDER.glob("*.ipynb")):
        notebook = executed(path)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
