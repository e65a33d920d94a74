"""mistral-ref compare: options that would mean nothing are refused, and what cannot show says so."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.command import COMMAND, run, start
from support.errors import assert_complains

import mistral_ref

TEXT = "Once upon a time"
LONG_TEXT = "Lily and Tom went to the park. They saw a big red ball. " * 8  # longer than the window


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("traces") / "trace.bin"  # any name will do
    mistral_ref.load(backend="numpy").trace(TEXT).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (("FILE", "demo", "--broken", "theta"), ("--broken", "A", "trace", "model")),
        (("FILE", "FILE", "--continue", "5"), ("--continue", "models", "traces")),
        (("FILE", "FILE", "--last", "2"), ("--last", "models", "traces")),
        (("FILE", "FILE", "--backend", "numpy"), ("--backend", "models", "traces")),
        (("FILE", "demo", "--own"), ("--own", "two models")),
        (("demo", "demo", TEXT, "--continue", "99999999999"), ("--continue", 99999999999, 1, 100000)),
        (("demo", "demo", TEXT, "--bound", "-1"), ("bound", -1.0)),
    ],
)
def test_options_without_a_meaning_are_refused(
    trace_file: str, options: tuple[str, ...], facts: tuple[object, ...]
) -> None:
    done = run("compare", *(trace_file if option == "FILE" else option for option in options))
    assert (done.returncode, done.stdout) == (2, "")
    assert_complains(done.stderr, *facts)


def test_a_file_of_any_name_is_a_trace(trace_file: str) -> None:
    done = run("compare", trace_file, "demo", "--backend", "numpy")
    assert (done.returncode, "all 88 steps are equal" in done.stdout) == (0, True)


def test_a_bug_that_cannot_show_says_when_it_would() -> None:
    done = run("compare", "demo", "demo", TEXT, "--broken", "extra-key")
    assert done.returncode == 0
    assert done.stdout.endswith("extra-key shows after more tokens than the window holds\n")


def test_own_finds_the_faulty_steps_and_no_others() -> None:
    done = run("compare", "demo", "demo", TEXT, "--broken", "tiled-heads", "--own", "--all")
    departed = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("| * ")]
    assert done.returncode == 1
    assert {name.rpartition(".")[2] for name in departed} == {"scores", "heads"}
    done = run("compare", "demo", "demo", TEXT, "--own", "--backend", "numba,numpy")
    assert "all 88 steps agree within 200 ulps" in done.stdout


def test_the_text_goes_on(trace_file: str) -> None:
    model = mistral_ref.load(backend="numpy")
    text = model.complete(TEXT, max_tokens=4)
    done = run("compare", trace_file, "demo", "--backend", "numpy", "--continue", "4")
    assert done.stdout.endswith(f"the model goes on: {text}\n")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    file = tmp_path / "nowhere" / "x.safetensors"
    done = run("trace", TEXT, "-o", file)
    assert done.returncode == 2
    assert_complains(done.stderr, file, file.parent, "no directory")


def test_the_verdict_outlives_a_reader_who_leaves() -> None:
    with start(*COMMAND, "compare", "demo", "demo", TEXT, "--broken", "theta", "--all") as process:
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, b"")


def test_compare_tells_rounding_from_bugs() -> None:
    done = run("compare", "demo", "demo", "--backend", "numba,numpy", TEXT)
    assert (done.returncode, "agree within 2000 ulps" in done.stdout) == (0, True)
    done = run("compare", "demo", "demo", "--dtype", "float32,float64", "--own", "--all", TEXT)
    assert (done.returncode, "agree within 200 ulps" in done.stdout, done.stdout.count("\n| ")) == (0, True, 88)
    done = run("compare", "demo", "demo", "--broken", "tiled-heads", TEXT, "--continue", "5", "--backend", "numpy")
    out = done.stdout
    assert (done.returncode, "the first is layers.0.scores" in out) == (1, True)
    goes_on = [
        line.removeprefix(f"{side} goes on: ") for side in "AB" for line in out.splitlines() if f"{side} goes" in line
    ]
    assert len(set(goes_on)) == len(goes_on) == 2
    assert goes_on[1] == mistral_ref.load(backend="numpy").complete(TEXT, max_tokens=5)


@pytest.mark.parametrize("bug", ["extra-key", "one-key-less", "no-window", "short-ring", "positions-restart"])
def test_compare_over_a_cache_finds_bugs_that_need_one(bug: str) -> None:
    done = run("compare", "demo", "demo", "--backend", "numpy", "--broken", bug, "--last", "4", LONG_TEXT)
    first = "q_rotated" if bug == "positions-restart" else "scores"
    assert (done.returncode, done.stderr, f"the first is layers.0.{first}" in done.stdout) == (1, "", True)


def test_a_bug_that_changes_the_tokens_departs_before_every_step() -> None:
    done = run("compare", "demo", "demo", "--broken", "bos-twice", "--backend", "numpy", "Once upon a time")
    assert (done.returncode, done.stderr) == (1, "")
    assert "6" in done.stdout  # tokens of A
    assert "5" in done.stdout  # and of B


def test_keys_and_values_of_two_types_are_compared(trace_file: str) -> None:
    options = (LONG_TEXT, "--backend", "numpy", "--last", 4)
    same = run("compare", "demo", "demo", *options, "--cache-dtype", "int8")
    other = run("compare", "demo", "demo", *options, "--cache-dtype", "float32,int8", "--bound", 1000, "--continue", 4)
    assert "all 88 steps are equal" in same.stdout
    assert other.returncode == 1
    model = mistral_ref.load(backend="numpy")
    for name, dtype in (("A", "float32"), ("B", "int8")):
        text = model.complete(LONG_TEXT, max_tokens=4, cache=model.new_cache(dtype=dtype))
        assert f"{name} goes on: {text}" in other.stdout
    assert_complains(run("compare", "demo", "demo", *options, "--cache-dtype", "int3").stderr, "int3")
    assert_complains(run("compare", "demo", trace_file, "--cache-dtype", "int3", "--last", 1).stderr, "int3")
