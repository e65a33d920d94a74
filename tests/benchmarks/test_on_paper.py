"""benchmarks/on_paper.py: counts and bounds by hand."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.paths import ROOT

from mistral_ref.measure.cost import Limits
from mistral_ref.measure.shapes import SHAPES

SCRIPT = ROOT / "benchmarks" / "on_paper.py"


@pytest.fixture
def on_paper(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    return importlib.import_module("on_paper")


def test_mistral_7b_by_hand(on_paper: ModuleType) -> None:
    counts = on_paper.counts_of(SHAPES["mistral-7b"], depth=4096)
    # 7,241,732,096 weights, of which a token reads one row of the 32000 of the embedding, norms in float32
    assert counts.parameters == 7_241_732_096
    products = 7_241_732_096 - 32000 * 4096 - 65 * 4096
    assert counts.weights == products + 4096 + 65 * 4096 * 2
    # 32 layers, 8 heads of 128, keys and values of 2 bytes: 4096 keys in sight, and 1 without a cache before
    assert counts.cache_bytes == 32 * 2 * 8 * 128 * 2 * 4095
    limits = Limits(bandwidth=50e9, peak=1e12)
    assert on_paper.decode_rate(counts, 16, limits) == pytest.approx(50e9 / (2 * counts.weights + counts.cache_bytes))
    assert on_paper.decode_rate(counts, 16, limits, machines=2) == 2 * on_paper.decode_rate(counts, 16, limits)


def test_a_model_over_machines_by_hand(on_paper: ModuleType) -> None:
    config = SHAPES["large-123b"]
    counts, limits = on_paper.counts_of(config, 0), Limits(1e11, 1e12)
    alone = on_paper.split_rates(config, counts, limits, (1e9, 1e-4), 1)
    assert alone == (pytest.approx(on_paper.decode_rate(counts, 4.5, limits)), 0, alone[0], 0)
    layers, layers_bytes, rows, rows_bytes = on_paper.split_rates(config, counts, limits, (1e9, 1e-4), 4)
    assert layers_bytes == 3 * 12288 * 4
    assert 1 / layers == pytest.approx(1 / alone[0] + 3 * (12288 * 4 / 1e9 + 1e-4))
    assert rows_bytes == round(2 * 88 * 2 * 3 / 4 * 12288 * 4)
    assert 1 / rows == pytest.approx(1 / alone[0] / 4 + rows_bytes / 1e9 + 2 * 88 * 6 * 1e-4)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_the_script_prints_both_tables(tmp_path: Path) -> None:
    done = run("--bandwidth", 50, "--peak", 200, "--split", "small-24b", "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "| mistral-7b " in done.stdout
    assert "small-24b in 4.5 bits, 1 Gbit/s and 200 us a hop" in done.stdout
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["limits"] == {"bandwidth": 50e9, "peak": 200e9}
    assert len(content["models"]) == len(SHAPES)  # the headings for the one that is nobody's


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [("--split", "giant"), ("--bandwidth", "-1"), ("--us", "nan"), ("--gbit", "inf")])
def test_a_mistake_is_one_line(wrong: tuple[str, str]) -> None:
    done = run(*wrong)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
