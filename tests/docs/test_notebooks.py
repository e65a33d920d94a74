"""The notebooks run from a clean start and show what is committed with them."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.paths import ROOT

DOCS = ROOT / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
MAX_BYTES = 300_000

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    """Return docs/run_notebooks.py as a module."""
    if any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel")):
        pytest.skip("nbclient or ipykernel is not installed")
    spec = importlib.util.spec_from_file_location("run_notebooks", DOCS / "run_notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["01-first-walk", "02-ablation", "03-find-the-bug"]


@each_notebook
def test_a_notebook_is_committed_with_what_it_shows(path: Path) -> None:
    notebook = read(path)
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run docs/run_notebooks.py"
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) >= len(code) / 2
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not [cell["id"] for cell in notebook["cells"] if cell["metadata"]]
    assert notebook["metadata"].keys() == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert path.stat().st_size < MAX_BYTES


@pytest.mark.slow
@each_notebook
def test_a_notebook_runs_and_shows_the_same(path: Path, runner: ModuleType) -> None:
    committed = runner.nbformat.read(path, as_version=4)
    again = runner.executed(path)
    assert list(runner.shown(again)) == list(runner.shown(committed))
    assert [cell.get("execution_count") for cell in again.cells] == [
        cell.get("execution_count") for cell in committed.cells
    ]


@each_notebook
def test_links_of_a_notebook_lead_somewhere(path: Path) -> None:
    prose = ["".join(cell["source"]) for cell in read(path)["cells"] if cell["cell_type"] == "markdown"]
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", "\n".join(prose)):
        assert (path.parent / target).exists(), target
