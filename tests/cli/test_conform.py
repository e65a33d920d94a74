"""mistral-ref conform: exit statuses, what it prints and writes, and what a user may get wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command import run
from support.errors import assert_complains

import mistral_ref
from mistral_ref.study.broken import BUGS, broken
from mistral_ref.study.conform.cases import CASES
from mistral_ref.study.conform.hypotheses import run as compute
from mistral_ref.study.conform.kit import make_kit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a kit of one model, a dump that agrees, and one of a broken model."""
    folder = tmp_path_factory.mktemp("conform")
    case = next(case for case in CASES if case.name == "full")
    kit = make_kit(folder / "kit", cases=[case])
    right = mistral_ref.load(kit.directory / "full" / "mistral", backend="numpy", threads=1)
    for name, model in (("right", right), ("wrong", broken(right, "theta"))):
        (folder / name).mkdir()
        for text in case.texts():
            compute(model, text).save(folder / name / f"full-{text.name}.safetensors")
    return folder


def test_the_exit_status_says_whether_all_agree(folder: Path) -> None:
    done = run("conform", "check", folder / "kit", folder / "right")
    assert (done.returncode, done.stderr) == (0, "")
    assert "agrees" in done.stdout
    done = run("conform", "check", folder / "kit", folder / "wrong")
    assert (done.returncode, done.stderr) == (1, "")
    assert "layers.0.q_rotated" in done.stdout
    assert BUGS["theta"].cure in done.stdout


def test_verdicts_as_json_and_as_a_page(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("conform", "check", folder / "kit", folder / "wrong", "--json", "--html", page)
    assert done.returncode == 1
    (model,) = json.loads(done.stdout)["models"]
    assert (model["model"], model["outcome"], model["causes"]) == ("full", "departs", [["theta"]])
    assert "theta" in page.read_text()


def test_a_narrow_terminal_shows_the_same_words(folder: Path) -> None:
    wide, narrow = (run("conform", "check", folder / "kit", folder / "wrong", columns=n) for n in (None, 40))
    assert max(map(len, narrow.stdout.splitlines())) <= 40
    assert "".join(narrow.stdout.split()) == "".join(wide.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("make", "KIT"), ("kit", "new directory")),
        (("make", "KIT", "dumps"), ("DUMPS", "conform check")),
        (("make", "other", "--json"), ("--json", "conform check")),
        (("make", "other", "--float32"), ("--float32", "conform check")),
        (("make", "nowhere/other"), ("nowhere", "directory")),
        (("check", "KIT"), ("DUMPS",)),
        (("check", "nowhere", "dumps"), ("nowhere", "kit.json")),
        (("check", "KIT", "nowhere"), ("nowhere", "full-short.safetensors")),
    ],
)
def test_mistakes_are_one_line(folder: Path, arguments: tuple[str, ...], facts: tuple[str, ...]) -> None:
    done = run("conform", *(folder / "kit" if word == "KIT" else word for word in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert_complains(done.stderr, *facts)


@pytest.mark.slow
def test_the_kit_is_made(tmp_path: Path) -> None:
    done = run("conform", "make", tmp_path / "kit")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(len(CASES)) in done.stdout
    assert sorted(path.name for path in (tmp_path / "kit").iterdir() if path.is_dir()) == sorted(
        case.name for case in CASES
    )
