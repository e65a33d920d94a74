"""Files and directories that are written whole or not at all, beside everything that others have or write there."""

from __future__ import annotations

import multiprocessing
import os
import resource
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.checkpoints import FAMILIES, write_consolidated
from support.command import start
from support.errors import refused
from support.writers import MODEL, WRITERS

from mistral_ref.errors import InputError
from mistral_ref.files.tensor_file import write_tensor_file
from mistral_ref.files.whole_file import remove_leftovers, whole_directory, whole_file
from mistral_ref.study import report

LEFT = ".mistral_ref-0123456789abcdef.partial"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave(path: Path, seconds: float = 60.0) -> Path:
    """Put something at a path that a writer seems to have left so many seconds ago."""
    path.write_bytes(b"half")
    os.utime(path, (time.time() - seconds,) * 2)
    return path


# --------------------------------------------------------------------------------------------- what others have there


def test_files_and_links_of_others_are_not_touched(tmp_path: Path) -> None:
    """Whatever their names: FILE.partial may be a file of the user's, or a link to one."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.partial").write_text("mine")
    (tmp_path / "b.partial").symlink_to(victim)
    for name in ("a", "b"):
        write_tensor_file(tmp_path / name, {"x": np.zeros(3, np.float32)}, {})
        assert list(load_file(tmp_path / name)) == ["x"]
    assert names_in(tmp_path) == ["a", "a.partial", "b", "b.partial", "victim"]
    assert (tmp_path / "a.partial").read_text() == "mine"
    assert victim.read_text() == "precious"


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, link = tmp_path / "victim", tmp_path / "link"
    victim.write_text("precious")
    link.symlink_to(victim)
    with whole_file(link) as file:
        file.write(b"new")
    assert (link.is_symlink(), link.read_text(), victim.read_text()) == (False, "new", "precious")


def test_two_writers_of_one_file_both_succeed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with whole_file(path) as first:
        first.write(b"first" * 9000)
        with whole_file(path) as second:
            second.write(b"second" * 9000)
            first.write(b"first" * 9000)
        assert path.read_bytes() == b"second" * 9000
    assert path.read_bytes() == b"first" * 18000
    assert names_in(tmp_path) == ["x"]


def test_the_second_of_two_writers_of_a_directory_is_told(tmp_path: Path) -> None:
    target = tmp_path / "d"
    with refused(InputError, target, "exists", "another program"), whole_directory(target) as slow:
        (slow / "file").write_text("slow")
        with whole_directory(target) as quick:
            (quick / "file").write_text("quick")
    assert (target / "file").read_text() == "quick"
    assert names_in(tmp_path) == ["d"]


@pytest.mark.parametrize("kind", ["directory", "pipe", "link to a pipe"])
def test_what_is_no_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    """Otherwise root would put a file in the place of /dev/null or of /dev/stdout, which is a link."""
    path = tmp_path / "x"
    if kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe") if "link" in kind else path.hardlink_to(tmp_path / "pipe")
    before = names_in(tmp_path)
    with refused(InputError, path, "written", "directory" if kind == "directory" else "regular"):
        report.write(MODEL, [1], path, with_cost=False)
    assert names_in(tmp_path) == before
    assert not path.is_file()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_are_those_of_any_new_file(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "x") as file:
            file.write(b"x")
        with whole_directory(tmp_path / "d"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o777 & ~umask


def test_a_file_keeps_the_permissions_of_the_one_that_it_replaces(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch(0o600)
    with whole_file(path) as file:
        file.write(b"x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


# ------------------------------------------------------------------------------------------------ what is left behind


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """Not what is too young to be locked yet, and no file of a name that only resembles one of ours."""
    leave(tmp_path / LEFT)
    (tmp_path / LEFT.replace("0", "1")).mkdir()
    leave(tmp_path / LEFT.replace("0", "1") / "weights")
    os.utime(tmp_path / LEFT.replace("0", "1"), (0, 0))
    others = [
        leave(tmp_path / LEFT.replace("0", "2"), seconds=0),
        leave(tmp_path / f"{LEFT}.mine"),
        leave(tmp_path / LEFT.replace("a", "x")),
    ]
    victim = leave(tmp_path / "victim")
    link = tmp_path / LEFT.replace("0", "3")
    link.symlink_to(victim)
    os.utime(link, (0, 0), follow_symlinks=False)
    write_tensor_file(tmp_path / "x", {}, {})
    assert names_in(tmp_path) == sorted(["x", "victim", link.name, *(path.name for path in others)])


def test_what_another_process_is_writing_stays(tmp_path: Path) -> None:
    code = """
import sys
from mistral_ref.files.whole_file import whole_directory, whole_file
with whole_file(sys.argv[1]) as file, whole_directory(sys.argv[2]) as directory:
    file.write(b"half")
    file.flush()
    print(flush=True)
    sys.stdin.read()
"""
    process = start(sys.executable, "-c", code, tmp_path / "file", tmp_path / "directory", stdin=subprocess.PIPE)
    assert process.stdout.readline() == b"\n"
    written = names_in(tmp_path)
    assert len(written) == 2
    for name in written:
        os.utime(tmp_path / name, (0, 0))
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == written
    process.kill()
    process.communicate()
    remove_leftovers(tmp_path)
    assert names_in(tmp_path) == []


def test_a_forked_child_does_not_set_free_what_its_parent_writes(tmp_path: Path) -> None:
    with whole_file(tmp_path / "x") as file:
        file.write(b"x")
        multiprocessing.get_context("fork").Process(target=os._exit, args=(0,)).start()
        for child in multiprocessing.active_children():
            child.join()
        (partial,) = tmp_path.iterdir()
        os.utime(partial, (0, 0))
        remove_leftovers(tmp_path)
    assert names_in(tmp_path) == ["x"]


def test_where_there_are_no_locks_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_ref.files.whole_file.fcntl", None)
    leave(tmp_path / LEFT)
    write_tensor_file(tmp_path / "x", {}, {})
    assert names_in(tmp_path) == [LEFT, "x"]


# --------------------------------------------------------------------------------------------- what cannot be written


each_writer = pytest.mark.parametrize("writer", WRITERS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder beside a model."""
    (tmp_path / "source").mkdir()
    write_consolidated(tmp_path / "source", FAMILIES["dense_windowed"])
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@contextmanager
def full_after(n_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@each_writer
def test_a_full_disk_is_told_by_the_name_that_was_given(writer: str, folder: Path) -> None:
    kind, write, _ = WRITERS[writer]
    with full_after(5000), refused(kind, str(folder / "x"), "written", "File too large") as caught:
        write(folder / "x", folder.parent / "source")
    assert ".partial" not in str(caught.value)
    assert [path for path in folder.rglob("*") if path.is_file()] == []


@each_writer
def test_a_working_directory_that_is_gone(writer: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, write, _ = WRITERS[writer]
    monkeypatch.chdir(folder)
    folder.rmdir()
    with refused(kind, Path("x"), "No such file or directory") as caught:
        write(Path("x"), folder.parent / "source")
    assert ".partial" not in str(caught.value)


@each_writer
def test_a_folder_that_is_missing_and_a_name_that_cannot_be(writer: str, folder: Path) -> None:
    kind, write, _ = WRITERS[writer]
    for path, fact in ((folder / "file" / "x", "directory"), (folder / ("x" * 300), "too long")):
        (folder / "file").touch()
        with refused(kind, path, fact):
            write(path, folder.parent / "source")
    assert names_in(folder) == ["file"]


@each_writer
def test_a_tilde_is_the_home(writer: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(folder)
    WRITERS[writer].write(Path("~/x"), folder.parent / "source")
    assert names_in(folder) == ["x"]
