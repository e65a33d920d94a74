"""What may import what: the three rules of docs/architecture.md, no circle, and no test that imports another."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from support.paths import ROOT

import mistral_ref


def dotted(path: Path) -> str:
    """Return the name of a module of the package; of a folder for its __init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {dotted(path): path for path in (ROOT / "mistral_ref").rglob("*.py")}
WINGS = ("files", "text", "measure", "study", "cli")
FILLED = re.compile(r"mistral_ref\.(config|weights|steps|display|errors|host|\w+_matrix)")  # what files/ and text/ fill
MAY_IMPORT = {
    "ground": {"ground", "filled", "files", "text"},
    "files": {"filled", "files"},
    "text": {"filled", "files", "text"},
    "measure": {"ground", "filled", "files", "text", "measure"},
    "study": {"ground", "filled", "files", "text", "measure", "study"},
    "cli": {"face", "ground", "filled", "files", "text", "measure", "study", "cli"},
    "face": {"ground", "filled", "files", "text", "measure", "study"},  # measure/ and study/ when they are asked for
    "main": {"cli"},
}


def room(name: str) -> str:
    """Return which room a module stands in."""
    if name in ("mistral_ref", "mistral_ref.__main__"):
        return "face" if name == "mistral_ref" else "main"
    wing = name.split(".")[1]
    return wing if wing in WINGS else "filled" if FILLED.fullmatch(name) else "ground"


def imported(name: str) -> Iterator[str]:
    """Yield the modules of the package that a module imports, at its beginning or inside a function."""
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (name if name in MODULES else node.module for name in names if node.module in MODULES)


def test_modules_import_only_what_their_room_may() -> None:
    strays = []
    for name in MODULES:
        allowed = MAY_IMPORT["ground" if room(name) == "filled" else room(name)]
        strays += [f"{name} imports {there}" for there in imported(name) if room(there) not in allowed]
    assert strays == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert list(TopologicalSorter({name: set(imported(name)) for name in MODULES}).static_order())


def test_the_rooms_of_many_files_import_nothing() -> None:
    for wing in ("files", "measure", "study"):
        assert list(imported(f"mistral_ref.{wing}")) == []


def test_every_module_of_measure_and_study_comes_from_the_package_by_name() -> None:
    for name in MODULES:
        if room(name) in ("measure", "study") and name.count(".") == 2:
            assert getattr(mistral_ref, name.rpartition(".")[2]).__name__ == name


def test_the_package_imports_what_is_asked_for_and_nothing_before() -> None:
    for name in mistral_ref.__all__:
        assert getattr(mistral_ref, name).__module__.startswith("mistral_ref.")
    assert mistral_ref.errors.__name__ == "mistral_ref.errors"
    assert {*mistral_ref.__all__, "lens", "speed"} <= set(dir(mistral_ref))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mistral_ref.nothing  # noqa: B018
    code = "import sys; before = {*sys.modules}; import mistral_ref; print(*{*sys.modules} - before)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert set(found.stdout.split()) == {"mistral_ref", "__future__"}


def test_all_that_is_listed_can_be_had_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """help() looks at every name."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert {"diagrams", "drawing", "plots"} & {*dir(mistral_ref)} == set()
    monkeypatch.undo()
    assert {"diagrams", "drawing", "plots"} <= {*dir(mistral_ref)}


def test_kernels_know_nothing_of_models() -> None:
    for path in (ROOT / "kernels").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) mistral_ref", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_no_test_imports_another() -> None:
    imports_a_test = re.compile(r"^\s*(from|import) (\w+\.)*test_\w+", re.MULTILINE)
    for path in (ROOT / "tests").rglob("*.py"):
        assert not imports_a_test.search(path.read_text(encoding="utf-8")), path
