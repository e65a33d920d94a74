"""Paths that a user gave: what `~` is, and which directory is no model's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import FAMILIES, write_consolidated
from support.command import run
from support.errors import assert_complains, refused
from support.tiny import SMALL, model_of

import mistral_ref
from mistral_ref import CheckpointError, InputError
from mistral_ref.files.paths import checked_model, local_path

NOBODY = 65534
TRACE = model_of(SMALL).trace([1], keep="norm")


@pytest.fixture
def private() -> Iterator[Path]:
    """Return a folder that belongs to a user who is not root; the test is that user."""
    folder = Path(tempfile.mkdtemp())
    was_root = os.geteuid() == 0
    if was_root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if was_root:
            os.seteuid(0)
        for path in folder.iterdir():
            path.chmod(0o700)
        shutil.rmtree(folder)


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o100, 0o300])
def test_a_directory_without_permission_is_said_to_be_one(mode: int, private: Path) -> None:
    directory = private / "model"
    directory.mkdir(mode)
    with refused(InputError, directory, "Permission denied"):
        mistral_ref.load(directory)


def test_a_folder_that_may_not_be_written_to(private: Path) -> None:
    (private / "folder").mkdir(0o500)
    with refused(CheckpointError, private / "folder" / "x", "written", "Permission denied"):
        TRACE.save(private / "folder" / "x")
    assert os.listdir(private / "folder") == []


@pytest.mark.parametrize(
    ("name", "said", "problem"),
    [
        ("model\x1b[2J\n", r"model\x1b[2J\n", "no such directory"),
        ("model\0", r"model\x00", "null byte"),
        ("m" * 300, "m" * 300, "too long"),
        ("\udcff", r"\udcff", "no such directory"),
    ],
)
def test_impossible_names_are_one_line(name: str, said: str, problem: str) -> None:
    with refused(InputError, said, problem):
        checked_model(name)


def test_a_long_path_is_told_whole(tmp_path: Path) -> None:
    path = tmp_path / "/".join(["very long names"] * 15)
    with refused(InputError, path, "no such directory"):
        mistral_ref.load(path)


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    write_consolidated(tmp_path / "model", FAMILIES["dense_windowed"])
    assert local_path("~/model") == tmp_path / "model"
    model = mistral_ref.load("~/model", backend="numpy")
    model.trace([1, 2], keep="norm").save("~/trace.safetensors")
    assert mistral_ref.Trace.load("~/trace.safetensors").tokens == [1, 2]
    model.new_cache().save("~/cache")
    assert model.load_cache("~/cache").length == 0
    assert mistral_ref.quantize("~/model", "~/small") == tmp_path / "small"
    for arguments in (("info", "--model=~/small"), ("compare", "~/trace.safetensors", "~/model")):
        assert run(*arguments).returncode == 0
    done = run("info", "--model", "~/nowhere")
    assert_complains(done.stderr, tmp_path / "nowhere", "no such directory")


def hub_folder(parent: Path, *, main: str | None) -> Path:
    """Return a repository's folder as the hub's cache has it: two snapshots, the newer one of main unless asked."""
    repository = parent / "models--org--name"
    for number, commit in enumerate(("0ld", "new")):
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "params.json").symlink_to("../../blobs/0123")
        os.utime(snapshot, (number, number))
    (repository / "blobs").mkdir()
    if main is not None:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(main)
    return repository


@pytest.mark.parametrize(("main", "expected"), [("0ld", "0ld"), (None, "new"), ("../../..", "new")])
def test_a_folder_of_the_hubs_cache_is_told_its_snapshot(main: str | None, expected: str, tmp_path: Path) -> None:
    repository = hub_folder(tmp_path, main=main)
    with refused(InputError, repository, repository / "snapshots" / expected):
        mistral_ref.load(repository)


def test_a_folder_of_the_hubs_cache_without_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    with refused(InputError, tmp_path / "models--a--b", "snapshots"):
        mistral_ref.load(tmp_path / "models--a--b")


def test_a_models_own_folder_of_snapshots_is_in_nobodys_way(tmp_path: Path) -> None:
    write_consolidated(tmp_path, FAMILIES["dense_windowed"])
    (tmp_path / "snapshots").mkdir()
    assert mistral_ref.load(tmp_path, backend="numpy").config.n_layers == 3
