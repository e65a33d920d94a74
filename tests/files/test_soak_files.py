"""Files on full disks, of killed writers, of writers at the same time, and cut short: many trials at random places."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import FAMILIES, write_consolidated, write_hf
from support.command import start
from support.errors import assert_says
from support.hostile import attempt
from support.paths import ROOT
from support.tiny_tokenizers import tiny_tokenizer
from support.writers import MODEL, WRITERS

import mistral_ref
from mistral_ref import MistralRefError
from mistral_ref.files.whole_file import remove_leftovers
from mistral_ref.text import load_tokenizer

pytestmark = pytest.mark.soak

each_writer = pytest.mark.parametrize("name", WRITERS)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the directory of a model."""
    directory = tmp_path / "source"
    directory.mkdir()
    write_consolidated(directory, FAMILIES["dense_windowed"])
    return directory


# ----------------------------------------------------------------------------------------------------------- full disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return an empty disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted")
    yield folder
    subprocess.run(["umount", folder], check=True)


@each_writer
def test_a_full_disk_leaves_what_was_there(
    name: str, source: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much room there is: a file is written whole, or it is refused by its name and nothing is left of it."""
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**50, 0, 2**50))  # as if the disk filled up later
    writer, draw = WRITERS[name], random.Random(name)
    writer.write(disk / "x", source)
    n_bytes = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
    outcomes = set()
    for _ in range(150):
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        free = draw.randrange(n_bytes + 2**15)
        (disk / "filler").write_bytes(bytes(max(0, 2**22 - free)))
        try:
            writer.write(disk / "x", source)
        except writer.error as error:
            assert_says(str(error), str(disk / "x"), "No space left on device")
            files = {path.name for path in disk.rglob("*") if path.is_file()} - {"filler"}
            assert not files or (name == "random weights" and files == {"consolidated.safetensors"})
            if files:  # the weights are whole, and only the configuration had no room
                writer.read(disk / "x")
            outcomes.add("refused")
        else:
            writer.read(disk / "x")
            outcomes.add("written")
    assert outcomes == {"refused", "written"}


# --------------------------------------------------------------------------------------------------------------- killed


def begin(folder: Path, source: Path, *names: str) -> subprocess.Popen[bytes]:
    """Start a process that writes for ever; return it when it is about to begin."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "tests", ROOT, ROOT / "kernels")))}
    process = start(sys.executable, "-m", "support.writers", folder, source, *names, env=environment)
    assert process.stdout.readline() == b"\n", process.stderr.read()
    return process


@each_writer
def test_a_killed_writer_leaves_only_what_the_next_one_removes(name: str, source: Path, tmp_path: Path) -> None:
    writer, draw = WRITERS[name], random.Random(name)
    n_left = 0
    for number in range(25):
        folder = tmp_path / str(number)
        folder.mkdir()
        with begin(folder, source, name) as process:
            time.sleep(draw.uniform(0, 0.1))
            process.kill()
        for path in folder.glob("[!.]*"):
            writer.read(path)
        left = list(folder.rglob(".*"))
        n_left += len(left)
        assert len(left) <= 1
        for path in left:
            os.utime(path, (0, 0))
            remove_leftovers(path.parent)
        assert list(folder.rglob(".*")) == []
    assert n_left > 0, "no process was killed while it wrote"


@pytest.mark.parametrize("name", ["trace", "cache", "figures"])
def test_writers_at_the_same_time_always_leave_one_whole_file(name: str, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    writers = [begin(folder, source, name) for _ in range(4)]
    ends, n_read = time.monotonic() + 20, 0
    while time.monotonic() < ends:
        if (folder / name).exists():
            WRITERS[name].read(folder / name)
            n_read += 1
        assert all(process.poll() is None for process in writers), [process.stderr.read() for process in writers]
    for process in writers:
        process.kill()
        process.communicate()
    assert n_read > 100


# ----------------------------------------------------------------------------------------------------------- cut files


def cuts(path: Path, n: int) -> Iterator[int]:
    """Cut a file to n lengths, all of its first kilobyte's and others at random, and put it right at the end."""
    content, draw = path.read_bytes(), random.Random(path.name)
    for length in [*range(min(1000, len(content))), *(draw.randrange(len(content)) for _ in range(n))]:
        path.write_bytes(content[:length])
        yield length
    path.write_bytes(content)


@pytest.mark.parametrize("layout", ["consolidated", "shards", "quantized"])
def test_a_model_with_a_cut_file_is_refused_in_one_line(layout: str, source: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    if layout == "quantized":
        mistral_ref.quantize(source, directory)
    else:
        directory.mkdir()
        family = FAMILIES["dense_windowed"]
        write_consolidated(directory, family) if layout == "consolidated" else write_hf(directory, family, shards=2)
    (directory / "generation_config.json").write_text('{"eos_token_id": [2, 3]}')
    for path in sorted(directory.iterdir()):
        for _ in cuts(path, 1000):
            if message := attempt(directory):
                assert_says(message, path)
            else:  # what was cut off is the line's end
                json.loads(path.read_text())
    assert attempt(directory) == ""


READERS: dict[str, Callable[[Path], object]] = {
    "trace": mistral_ref.Trace.load,
    "cache": MODEL.load_cache,
    "tokenizer": load_tokenizer,
}


@pytest.mark.parametrize("name", READERS)
def test_a_cut_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "tokenizer":
        path.write_bytes(tiny_tokenizer())
    else:
        WRITERS[name].write(path, tmp_path)
    n_refused = 0
    for _ in cuts(path, 5000):
        try:
            READERS[name](path)
        except MistralRefError as error:
            assert_says(str(error), path)
            n_refused += 1
    assert n_refused > 1000
    READERS[name](path)
