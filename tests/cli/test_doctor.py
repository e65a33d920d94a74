"""mistral-ref doctor: what is printed, exit statuses, JSON, mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoints import write_consolidated
from support.command import run, run_process
from support.errors import assert_complains
from support.patients import change_json, family, write_patient

from mistral_ref import doctor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with two faults."""
    directory = tmp_path_factory.mktemp("models") / "a\x1b[2Jmodel"
    write_patient(directory, consolidated=False)
    change_json(directory / "generation_config.json", lambda content: content.update(eos_token_id=22))
    (directory / "tokenizer.json").write_text("{")
    return directory


def test_nothing_is_found_in_the_demonstration_model() -> None:
    done = run_process("doctor", "demo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].startswith("found     nothing")
    assert "consolidated.safetensors: every weight" in done.stdout


def test_every_finding_is_printed_with_its_reason_and_its_cure(model: Path) -> None:
    done, report = run("doctor", model), doctor.examine(model)
    assert (done.returncode, done.stderr) == (1, "")
    assert len(report.findings) == 2
    for finding in report.findings:
        assert finding.severity in done.stdout
        assert f"{finding.file.name}\n" in done.stdout
        for text in (finding.what, finding.why, finding.cure):
            assert f"  {text}\n" in done.stdout
    for text in (*report.examined, *report.left_out):
        assert f"  {text}\n" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["found", "1", "wrong,", "1", "suspicious"]
    assert "\x1b" not in done.stdout
    assert all(len(line) <= 60 for line in run("doctor", model, columns=60).stdout.splitlines() if " " in line.strip())


def test_json_holds_what_the_library_finds(model: Path) -> None:
    done, report = run("doctor", model, "--json", "--quick"), doctor.examine(model, quick=True)
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    assert found["path"] == str(model)
    assert [tuple(one.values()) for one in found["findings"]] == [
        (one.severity, str(one.file), one.what, one.why, one.cure) for one in report.findings
    ]
    assert (found["examined"], found["left_out"]) == (list(report.examined), list(report.left_out))


def test_quick_does_not_read_the_weights(tmp_path: Path) -> None:
    write_consolidated(tmp_path, family())
    assert "every weight" in run("doctor", tmp_path).stdout
    assert "every weight" not in run("doctor", tmp_path, "--quick").stdout


@pytest.mark.parametrize("name", ["none", "none.gguf", "none.json", "org/none", "file.txt"])
def test_a_users_mistake_is_one_line(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    Path("file.txt").touch()
    done = run("doctor", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert_complains(done.stderr, name)
    assert run("doctor").returncode == 2
    assert_complains(run("doctor", "demo", "--tokens", 0).stderr, "tokens", 0)


def test_memory_is_examined_for_the_tokens_that_are_asked_for() -> None:
    assert "memory" not in run("doctor", "demo", "--quick").stdout
    done = run("doctor", "demo", "--quick", "--tokens", 100)
    assert done.returncode == 0
    assert "memory: " in done.stdout
    assert "100 tokens" in done.stdout
