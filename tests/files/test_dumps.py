"""Every step against transformers: traces that docs/dump_transformers.py wrote, compared with what we compute.

And proof that the comparison finds bugs in a port: with a planted one, the step that departs first is the one where it
sits.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import FAMILIES, write_hf
from support.paths import GOLDEN, ROOT
from support.tiny import BACKENDS

import mistral_ref
from mistral_ref.cli import main
from mistral_ref.steps import step_names
from mistral_ref.study.broken import BUGS, broken

NAMES = ("dense_windowed", "ministral3")
BOUND = 300  # ulps; 109 were found, in the third layer's heads


def dump_path(name: str) -> Path:
    return GOLDEN / f"dump_{name}.safetensors"


def dump_of(name: str) -> mistral_ref.Trace:
    return mistral_ref.Trace.load(dump_path(name), rope_row_order="halves")


def model_like(name: str, directory: Path, backend: str = "numpy") -> mistral_ref.Model:
    write_hf(directory, FAMILIES[name])
    return mistral_ref.load(directory, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_equals_that_of_transformers(name: str, backend: str, tmp_path: Path) -> None:
    model, dump = model_like(name, tmp_path, backend), dump_of(name)
    comparison = model.trace(dump.tokens).compare(dump, bound=BOUND)
    assert comparison.first is None, str(comparison)
    without_scores = [step for step in step_names(model.config) if not step.endswith(".scores")]
    assert [difference.name for difference in comparison] == without_scores


@pytest.mark.parametrize(
    ("name", "bug"),
    [
        *(("dense_windowed", bug) for bug in ("not-causal", "no-window", "extra-key", "one-key-less", "tiled-heads")),
        *(("dense_windowed", bug) for bug in ("prompt-extra-key", "small-ring", "wrong-scale", "row-order")),
        *(("dense_windowed", bug) for bug in ("permuted-twice", "theta", "norm-cast")),
        *(("ministral3", bug) for bug in ("yarn-scale", "yarn-dropped", "theta", "tiled-heads", "wrong-scale")),
    ],
)
def test_a_bug_in_a_port_departs_where_it_sits(name: str, bug: str, tmp_path: Path) -> None:
    port, dump = broken(model_like(name, tmp_path), bug), dump_of(name)
    first = port.trace(dump.tokens).compare(dump, bound=BOUND).first
    expected = BUGS[bug].first_step.replace("scores", "attention_weights")  # transformers' scores are not to be had
    assert first is not None
    assert first.name == f"layers.0.{expected}"


def test_the_wrong_row_order_of_a_dump_is_found(tmp_path: Path) -> None:
    dump = mistral_ref.Trace.load(dump_path("dense_windowed"))
    first = model_like("dense_windowed", tmp_path).trace(dump.tokens).compare(dump).first
    assert first is not None
    assert first.name == "layers.0.q"


def test_the_command_line_compares_a_dump(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_hf(tmp_path, FAMILIES["dense_windowed"])
    status = main(["compare", str(dump_path("dense_windowed")), str(tmp_path), "--rope-row-order", "halves"])
    out = capsys.readouterr().out
    assert (status, "all 51 steps agree within 2000 ulps" in out) == (0, True)


def test_the_script_still_writes_such_a_dump(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    model, dump = model_like("dense_windowed", tmp_path), dump_of("dense_windowed")
    script, out = ROOT / "docs" / "dump_transformers.py", tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(out), *map(str, dump.tokens)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert re.search(r"51 steps of 12 tokens", done.stdout), done.stderr
    again = mistral_ref.Trace.load(out, rope_row_order="halves")
    assert again.compare(dump, bound=BOUND).first is None
    assert model.trace(dump.tokens).compare(again, bound=BOUND).first is None
