"""mistral-ref trace; and mistakes in the arguments of all commands that look into a pass."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from support.command import run
from support.errors import assert_complains

import mistral_ref

TEXT = "Once upon a time"


@pytest.fixture(scope="module")
def model() -> mistral_ref.Model:
    return mistral_ref.load(backend="numpy")


def test_trace_lists_every_step(model: mistral_ref.Model) -> None:
    done = run("trace", "--backend", "numpy", TEXT)
    trace = model.trace(TEXT)
    assert (done.returncode, done.stderr) == (0, "")
    for name, step in trace.steps.items():
        assert re.search(rf"^\| {re.escape(name)} .*{re.escape(str(step.statistics))} \|$", done.stdout, re.MULTILINE)


def test_trace_writes_what_the_library_keeps(tmp_path: Path, model: mistral_ref.Model) -> None:
    path = str(tmp_path / "trace.safetensors")
    keep = ("--keep", "layers.0.*", "--keep", "logits")
    done = run("trace", "--backend", "numpy", *keep, TEXT, "-o", path)
    assert (done.returncode, done.stdout.startswith(f"{path}: 18 steps of 5 tokens")) == (0, True)
    loaded = mistral_ref.Trace.load(path)
    kept = model.trace(TEXT, keep=["layers.0.*", "logits"])
    assert list(loaded) == list(kept)
    assert all(np.array_equal(loaded[name], kept[name]) for name in kept)
    # and back: a file against a model, with the file's own tokens
    done = run("compare", path, "demo", "--backend", "numpy")
    assert (done.returncode, "all 18 steps are equal" in done.stdout) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("compare", "demo", "demo"), ("no text",)),
        (("compare", "demo", "nowhere", TEXT), (Path("nowhere"), "no such directory")),
        (("compare", "nowhere.safetensors", "demo"), (Path("nowhere.safetensors"), "No such file")),
        (("compare", "demo", "demo", "--backend", "a,b,c", TEXT), ("--backend", "'a,b,c'")),
        (("compare", "demo", "demo", "--backend", "cuda", TEXT), ("backend", "'cuda'", "'numba'", "'numpy'")),
        (("compare", "demo", "demo", "--dtype", "float64", "--backend", "numba", TEXT), ("'float64'", "'float32'")),
        (("compare", "demo", "demo", "--broken", "everything", TEXT), ("--broken", "'everything'", "not-causal")),
        (("compare", "demo", "demo", "--last", "0", TEXT), ("--last", 0)),
        (("compare", "demo", "demo", "--continue", "0", TEXT), ("--continue", 0)),
        (("step", "--last", "99", TEXT), ("--last", 99, "1 to 5")),
        (("step", ""), ()),
        (("trace", TEXT, "-o", "x.txt"), (Path("x.txt"), ".html", ".safetensors")),
        (("trace", TEXT, "-o", "nowhere/x.safetensors"), (Path("nowhere/x.safetensors"), "written")),
        (("trace", TEXT, "--keep", "nothing"), ("step", "'nothing'")),
    ],
)
def test_mistakes_in_arguments_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    facts: tuple[object, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    if facts:
        assert_complains(done.stderr, *facts)
    assert (done.returncode, bool(done.stderr)) == ((2, True) if facts else (0, False))
    assert not list(tmp_path.iterdir())
