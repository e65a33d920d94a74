"""The scripts in docs/conformance that write dumps of other engines: what the kit then says of these engines.

MISTRAL_REF_TRANSFORMERS and MISTRAL_REF_LLAMA_CPP are Pythons in which transformers and llama-cpp-python are installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.paths import ROOT

from mistral_ref.study.conform.check import Verdict, check
from mistral_ref.study.conform.kit import Kit, make_kit

FOLDER = ROOT / "docs" / "conformance"
TRANSFORMERS, LLAMA_CPP = (os.environ.get(f"MISTRAL_REF_{name}") for name in ("TRANSFORMERS", "LLAMA_CPP"))
NO_GGUF, WITHOUT_WINDOW = ("interleaved", "fp8"), ("window", "multi_query")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return make_kit(tmp_path_factory.mktemp("adapters") / "kit")


def script_of(page: str, folder: Path) -> Path:
    """Write the script of a page into a folder."""
    found = re.search(r"```python\n(.*?)```", (FOLDER / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    (folder / "dump.py").write_text(found[1], encoding="utf-8")
    return folder / "dump.py"


def verdicts_of(python: str, script: Path, kit: Kit, dumps: Path, *options: str) -> dict[str, Verdict]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [python, str(script), str(kit.directory), str(dumps), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {verdict.model: verdict for verdict in check(kit, dumps)}


@pytest.mark.parametrize("page", sorted(path.name for path in FOLDER.glob("*.md")))
def test_scripts_are_python(page: str, tmp_path: Path) -> None:
    if page != "numpy.md":
        compile(script_of(page, tmp_path).read_text(), page, "exec")


@pytest.mark.slow
def test_the_port_in_numpy_agrees(kit: Kit, tmp_path: Path) -> None:
    found = verdicts_of(sys.executable, FOLDER / "port.py", kit, tmp_path / "dumps")
    assert {verdict.outcome for verdict in found.values()} == {"agrees"}


@pytest.mark.soak
@pytest.mark.skipif(not TRANSFORMERS, reason="MISTRAL_REF_TRANSFORMERS is not set")
@pytest.mark.parametrize(
    ("dtype", "outcome"),
    [("float32", "agrees"), ("bfloat16", "agrees in 16 bits"), ("float16", "agrees in 16 bits")],
)
def test_transformers_agrees(dtype: str, outcome: str, kit: Kit, tmp_path: Path) -> None:
    found = verdicts_of(TRANSFORMERS or "", script_of("transformers.md", tmp_path), kit, tmp_path / "dumps", dtype)
    assert {name: verdict.outcome for name, verdict in found.items()} == dict.fromkeys(found, outcome)


@pytest.mark.soak
@pytest.mark.skipif(not LLAMA_CPP, reason="MISTRAL_REF_LLAMA_CPP is not set")
@pytest.mark.parametrize(
    ("kind", "outcome"), [("F32", "agrees"), ("BF16", "agrees in 16 bits"), ("Q8_0", "agrees in 16 bits")]
)
def test_llama_cpp_agrees_but_for_windows(kind: str, outcome: str, kit: Kit, tmp_path: Path) -> None:
    found = verdicts_of(LLAMA_CPP or "", script_of("llama-cpp.md", tmp_path), kit, tmp_path / "dumps", kind)
    for name, verdict in found.items():
        if name in NO_GGUF:
            assert verdict.outcome == "no dump"
        elif name in WITHOUT_WINDOW:
            assert (verdict.outcome, verdict.causes) == ("departs", (("no-window",),))
        else:
            assert verdict.outcome == outcome, name
