"""mistral-ref compare: options that would mean nothing are refused, and what cannot show says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.errors import assert_complains

import mistral_ref
from mistral_ref.cli import main

TEXT = "Once upon a time"


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("traces") / "trace.bin"  # any name will do
    mistral_ref.load(backend="numpy").trace(TEXT).save(path)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["compare", *arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("FILE", "demo", "--broken", "theta"), "--broken plants a bug in A, and A is a trace"),
        (("FILE", "FILE", "--continue", "5"), "--continue is for models, and both sides are traces"),
        (("FILE", "FILE", "--last", "2"), "--last is for models"),
        (("FILE", "FILE", "--backend", "numpy"), "--backend is for models"),
        (("FILE", "demo", "--own"), "--own needs two models"),
        (("demo", "demo", TEXT, "--continue", "99999999999"), "--continue is 99999999999; expected"),
        (("demo", "demo", TEXT, "--bound", "-1"), "bound is -1.0"),
    ],
)
def test_options_without_a_meaning_are_refused(
    capsys: pytest.CaptureFixture[str], trace_file: str, options: tuple[str, ...], complaint: str
) -> None:
    status, out, err = run(capsys, *(trace_file if option == "FILE" else option for option in options))
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert complaint in err


def test_a_file_of_any_name_is_a_trace(capsys: pytest.CaptureFixture[str], trace_file: str) -> None:
    status, out, _ = run(capsys, trace_file, "demo", "--backend", "numpy")
    assert (status, "all 88 steps are equal" in out) == (0, True)


def test_a_bug_that_cannot_show_says_when_it_would(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "demo", "demo", TEXT, "--broken", "extra-key")
    assert status == 0
    assert out.endswith("extra-key shows after more tokens than the window holds\n")


def test_own_finds_the_faulty_steps_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "demo", "demo", TEXT, "--broken", "tiled-heads", "--own", "--all")
    departed = [line.split()[2] for line in out.splitlines() if line.startswith("| * ")]
    assert status == 1
    assert {name.rpartition(".")[2] for name in departed} == {"scores", "heads"}
    _, out, _ = run(capsys, "demo", "demo", TEXT, "--own", "--backend", "numba,numpy")
    assert "10 steps could only be looked at, such as layers.0.scores" in out


def test_the_text_goes_on(capsys: pytest.CaptureFixture[str], trace_file: str) -> None:
    model = mistral_ref.load(backend="numpy")
    text = model.complete(TEXT, max_tokens=4)
    _, out, _ = run(capsys, trace_file, "demo", "--backend", "numpy", "--continue", "4")
    assert out.endswith(f"the model goes on: {text}\n")


def test_a_missing_folder_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["trace", TEXT, "-o", str(tmp_path / "nowhere" / "x.safetensors")]) == 2
    file = tmp_path / "nowhere" / "x.safetensors"
    assert_complains(capsys.readouterr().err, file, file.parent, "no directory")


def test_the_verdict_outlives_a_reader_who_leaves() -> None:
    command = [sys.executable, "-m", "mistral_ref", "compare", "demo", "demo", TEXT, "--broken", "theta", "--all"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (1, b"")
