"""The scripts in benchmarks/ that ask one question each, on tiny models: tables, files, figures, mistakes."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import json
import math
import os
import pty
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from support.browser import needs_chromium
from support.errors import assert_complains, refused
from support.paths import ROOT
from support.tiny_tekken import tiny_tekken

import mistral_ref
from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.host import available_memory, process_memory
from mistral_ref.measure.shapes import shape
from mistral_ref.measure.synthetic import make_checkpoint

BENCHMARKS = ROOT / "benchmarks"
TINY = ("--shape", "tiny")
FAST = ("--repeats", 2, "--seconds", 0)
# The smallest settings of each script, and what its table begins with.
SCRIPTS: dict[str, tuple[tuple[object, ...], str]] = {
    "widths": (("--dims", 512, 1024, "--layers", 1, "--prompt", 8, *FAST), "| dim "),
    "context": ((*TINY, "--window", 16, "--depths", 0, 8, 64, *FAST), "| window "),
    "thread_scaling": ((*TINY, "--threads", 1, 2, "--prompt", 8, *FAST), "| what "),
    "memory": ((*TINY, "--prompt", 8, "--depth", 64), "| cache "),
    "roofline": ((*TINY, "--prompt", 8, "--repeats", 2), "| step "),
    "kernels": ((*TINY, "--quick", "--buffer-mib", 1, *FAST), "| what "),
}


def script(name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=variables)


def measured(name: str, folder: Path) -> dict[str, Any]:
    """Run a script on its smallest settings; check what it prints and draws, and return its JSON."""
    settings, table = SCRIPTS[name]
    work = ("--work-dir", folder) if name == "memory" else ()
    files = ("--json", folder / "out.json", "--figure", folder / "out.png")
    done = script(name, *settings, *work, *files)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith(("weights: ", "note: "))] == []
    assert done.stdout.startswith("cpu: ")
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert lines[0].startswith(table)
    assert {line.count("|") for line in lines[:3]} == {lines[0].count("|")}
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "out.json").read_text())
    assert content["machine"]["cpu"] is None or content["machine"]["cpu"] in done.stdout
    return content


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_examples(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    assert f"examples:\n  python benchmarks/{name}.py" in done.stdout


@pytest.mark.slow
def test_kernels_of_every_group_are_measured(tmp_path: Path) -> None:
    content = measured("kernels", tmp_path)
    assert list(content["groups"]) == ["decode", "prompt", "attention", "depth"]
    for rows in content["groups"].values():
        assert rows
        assert all(len(row["seconds"]) == 2 for row in rows)


@pytest.mark.slow
def test_a_terminal_shows_what_is_going_on_in_one_line() -> None:
    ours, theirs = pty.openpty()
    settings, _ = SCRIPTS["roofline"]
    command = [sys.executable, str(BENCHMARKS / "roofline.py"), *map(str, settings)]
    streams = {"stderr": theirs, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, env=os.environ | {"COLUMNS": "30"}, **streams) as process:
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal that nobody writes to any more
            while piece := os.read(ours, 4096):
                shown += piece
        os.close(ours)
    assert process.returncode == 0
    lines = [line for line in shown.decode().split("\r\x1b[K") if not line.startswith("note: ")]
    assert "making weights" in lines
    assert lines[-1] == ""
    assert max(map(len, lines)) == 29


@pytest.mark.slow
def test_widths_and_how_time_grows_with_them(tmp_path: Path) -> None:
    content = measured("widths", tmp_path)
    assert [row["dim"] for row in content["widths"]] == [512, 1024]
    assert all(len(row[test]["seconds"]) == 2 for row in content["widths"] for test in ("decode", "prompt"))
    assert {name: len(found["measured"]) for name, found in content["exponents"].items()} == {
        "one token": 2,
        "prompt of 8": 2,
    }
    assert all(1.8 < found["counted"] < 2.05 for found in content["exponents"].values())


@pytest.mark.slow
def test_depths_with_a_window_and_without(tmp_path: Path) -> None:
    windows = measured("context", tmp_path)["windows"]
    assert list(windows) == ["16", "none"]
    work = {name: [row["work"] for row in rows] for name, rows in windows.items()}
    assert work["16"][0] == work["none"][0] < work["16"][1] == work["none"][1]
    assert work["16"][2] < work["none"][2]
    assert all(len(row["seconds"]) == 2 for rows in windows.values() for row in rows)


@pytest.mark.slow
def test_speed_ups_beside_those_of_the_limits(tmp_path: Path) -> None:
    tests = measured("thread_scaling", tmp_path)["tests"]
    assert list(tests) == ["one token", "prompt of 8"]
    for rows in tests.values():
        assert [row["threads"] for row in rows] == [1, 2]
        assert rows[0]["speed_ups"] == rows[0]["limit_speed_ups"] == [1, 1]
        assert rows[1]["speed_ups"] == [
            one / two for one, two in zip(rows[0]["seconds"], rows[1]["seconds"], strict=True)
        ]


@pytest.mark.slow
def test_memory_after_each_stage(tmp_path: Path) -> None:
    content = measured("memory", tmp_path)
    assert [process["cache"] for process in content["processes"]] == ["float32", "float16", "int8"]
    caches = []
    for process in content["processes"]:
        stages = process["stages"]
        assert [found["stage"] for found in stages] == ["before", "load", "1 token", "prompt of 8", "64 tokens"]
        if process_memory(os.getpid())["peak_resident"] is not None:
            peaks = [found["peak_resident"] for found in stages]
            assert peaks == sorted(peaks)
            assert all(0 < found["anonymous"] <= found["peak_resident"] for found in stages)
        caches.append(stages[-1]["cache_bytes"])
    assert caches[0] == 2 * caches[1] > 0
    assert content["file_bytes"] == (tmp_path / "tiny-2-bf16" / "consolidated.safetensors").stat().st_size


@pytest.mark.slow
def test_steps_under_the_roof(tmp_path: Path) -> None:
    content = measured("roofline", tmp_path)
    assert list(content["passes"]) == ["One token after 8 others", "A prompt of 8 tokens"]
    roof = content["roof"]
    assert roof["bandwidth"] == max(limit["bandwidth"] for limit in content["limits"])
    for steps in content["passes"].values():
        assert steps[-1]["step"] == "total"
        assert all(len(step["seconds"]) == 2 for step in steps)
        gate = next(step for step in steps if step["step"] == "layers.0.gate")
        assert math.isclose(gate["predicted"], max(gate["flops"] / roof["peak"], gate["bytes"] / roof["bandwidth"]))


@pytest.mark.slow
def test_quality_against_size(tmp_path: Path) -> None:
    """More bits a weight, less divergence; and theirs are there as far as their packages are."""
    (tmp_path / "text").write_text("Once upon a time there was a little cat. She had a red ball and a friend. " * 20)
    files = ("--json", tmp_path / "out.json", "--figure", tmp_path / "out.png")
    ways = ("int8 g32 int16", "int8 g32 int8", "int4 g32 float", "Q8_0", "Q4_0", "Q4_K")
    done = script("quality", tmp_path / "text", "--tokens", 128, "--context", 64, "--only", *ways, *files)
    assert done.returncode == 0, done.stderr
    assert "| rounded to " in done.stdout
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    results = {row["name"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    kl = {name: row["kl"] for name, row in results.items()}
    assert kl["as it is"] == 0 < kl["int8 g32 int16"] < kl["int8 g32 int8"] < kl["int4 g32 float"]
    assert results["int8 g32 int16"]["bits_a_weight"] == pytest.approx(8.5, abs=1e-4)
    has_gguf, has_llama = (importlib.util.find_spec(name) is not None for name in ("gguf", "llama_cpp"))
    assert ("Q4_0" in kl, "Q4_K" in kl) == (has_gguf, has_gguf and has_llama)
    assert any("Q4_0" in line and "gguf" in line for line in done.stderr.splitlines()) == (not has_gguf)


@pytest.mark.slow
def test_texts_that_cannot_be_measured_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "short").write_text("Hi")
    (tmp_path / "ids").write_text("[1, 2")
    for options, facts in [
        ((), ("FILE", "--ids")),
        ((tmp_path / "none",), (tmp_path / "none", "No such file")),
        ((tmp_path / "short",), (tmp_path / "short", "2 tokens", 255, "window")),
        (("--ids", tmp_path / "ids"), (tmp_path / "ids", "token ids")),
    ]:
        done = script("quality", *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert_complains(done.stderr, *facts, program="quality.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "facts"),
    [
        ("widths", ("--dims", 512, 700), ("dims", 700, 512)),
        ("widths", ("--dims", 512), ("dims", "one", "two")),
        ("context", ("--shape", "giant"), ("shape", "'giant'", "tiny")),
        ("thread_scaling", (*TINY, "--threads", 0), ("threads", 0)),
        ("memory", (*TINY, "--prompt", 0), ("prompt", 0)),
        ("roofline", (*TINY, "--repeats", 0), ("repeats", 0)),
        ("roofline", (*TINY, "--figure", "out.bmpp"), (Path("out.bmpp"), "figure")),
        ("context", (*TINY, "--json", "nowhere/out.json"), (Path("nowhere/out.json"), "no such folder")),
    ],
)
def test_a_mistake_is_one_line(name: str, options: tuple[object, ...], facts: tuple[object, ...]) -> None:
    done = script(name, *options)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert_complains(done.stderr, *facts, program=f"{name}.py")


@pytest.mark.slow
def test_without_matplotlib_a_figure_is_one_line_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ModuleNotFoundError('matplotlib')\n")
    done = script(
        "roofline", *TINY, "--figure", tmp_path / "out.png", PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path])
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert_complains(done.stderr, "figures", "matplotlib", "pip install 'mistral-ref[plots]'", program="roofline.py")


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what the scripts share."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("common")


@pytest.mark.slow
def test_the_model_in_memory_is_the_one_that_files_hold(common: Any, tmp_path: Path) -> None:
    config, ops = shape("tiny"), CompiledOps(threads=1)
    for kind in ("bf16", "fp8"):
        stored = mistral_ref.load(make_checkpoint(tmp_path / kind, config, kind=kind), threads=1)
        model = common.random_model(config, kind, ops)
        assert (model.forward([1, 2, 3]) == stored.forward([1, 2, 3])).all()
        assert model.weights.layers[0].wq.data.ctypes.data % 64 == 0


@pytest.mark.slow
def test_a_filled_cache_is_as_long_as_asked_and_goes_on(common: Any) -> None:
    config, ops = shape("tiny", window=8), CompiledOps(threads=1)
    model = common.random_model(config, "bf16", ops)
    cache = common.filled_cache(config, ops, 1500, dtype="float16")
    assert (cache.length, cache.dtype) == (1500, "float16")
    assert np.isfinite(model.forward([1], cache)).all()


def test_too_large_a_model_is_one_line(common: Any) -> None:
    if available_memory() is None:
        return
    with refused(common.MistralRefError, "1024 layers", "dim 12288", "memory"):  # 2.6 TiB
        common.require_memory(shape("large-123b", layers=1024), "bf16")


def test_where_the_time_to_the_first_token_goes_is_drawn(common: Any, tmp_path: Path) -> None:
    start = importlib.import_module("start")
    cold = {"imports": 0.3, "load": 0.01, "first token": 19.0, "again": 0.2, "in all": 19.4}
    common.save_figure(
        str(tmp_path / "start.svg"), lambda: start.draw(cold, [cold | {"first token": 0.2, "in all": 0.6}])
    )
    drawn = (tmp_path / "start.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("cold", "warm", " 19.40 s", " 0.60 s", "Python itself"))


@pytest.mark.slow
def test_what_a_tokenizer_adds_to_the_first_token_is_measured(common: Any, tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tiny_tekken("v13")))
    rows = importlib.import_module("start").tokenizer_rows(str(tmp_path / "tekken.json"), 2)
    assert [row[0] for row in rows] == ["read", "first text"]
    assert all(float(row[1]) >= 0 for row in rows)


@pytest.mark.parametrize("name", ["widths", "thread_scaling"])
def test_examples_in_docstrings(name: str, common: Any) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.slow
def test_drafts_are_measured_in_pairs(tmp_path: Path) -> None:
    settings = (*TINY, "--draft-layers", 1, "--dtype", "bf16", "--tokens", 40, "--repeats", 2)
    done = script("drafts", *settings, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_bytes())["results"]
    assert [result["name"] for result in results] == ["quoting", "not quoting", "draft model"]
    for result in results:
        assert len(result["plain"]) == len(result["with_drafts"]) == 2
        assert min(result["plain"] + result["with_drafts"]) > 0
        assert 0 <= result["accepted"] <= result["drafted"]
    assert_complains(script("drafts", *TINY, "--tokens", 3).stderr, "tokens", 3, program="drafts.py")


@pytest.mark.slow
def test_sequences_together_are_measured_beside_one_and_a_prompt(tmp_path: Path) -> None:
    settings = (*TINY, "--quick", "--prompt", 8, "--tokens", 2, "--sequences", 3, "--peers", "--work-dir", tmp_path)
    done = script("batches", *settings, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    rates = json.loads((tmp_path / "out.json").read_text())["rates"]
    assert [row[0].strip() for row in rows[2:]] == list(rates)
    for row, found in zip(rows[2:], rates.values(), strict=True):
        one, together, prompt = (median(found[test]) for test in ("one", "together", "prompt"))
        assert len(found["together"]) == 2
        assert float(row[-1]) == pytest.approx(together / min(3 * one, prompt), abs=0.006)
    assert_complains(script("batches", "--shape", "no").stderr, "shape", "no", "tiny", program="batches.py")


@pytest.mark.slow
def test_the_second_turn_of_a_conversation_is_timed(tmp_path: Path) -> None:
    settings = (*TINY, "--prompt", 60, "--answer", 3, "--new", 4, "--repeats", 2)
    done = script("second_turn", *settings, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert len(content["first"]) == len(content["second"]) == 2
    share = median(second / first for first, second in zip(content["first"], content["second"], strict=True))
    assert f"share: {share:.1%}" in done.stdout
    assert_complains(script("second_turn", *TINY, "--new", 0).stderr, "new", 0, program="second_turn.py")


@needs_chromium
@pytest.mark.slow
def test_the_live_page_is_timed(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="playwright is not installed")
    done = script("live_page", "--tokens", 8, "--repeats", 2, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["milliseconds"]
    assert len(found) == 8
    assert all(len(times) == 2 for times in found.values())
    assert all(0 < seen <= continued for times in found.values() for seen, continued in times)
    assert_complains(script("live_page", "--tokens", 2).stderr, "tokens", 2, program="live_page.py")
