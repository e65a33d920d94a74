"""Files that are not whole: broken links, half downloads, pointers of Git LFS, and indexes that do not fit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from mistral_ref.errors import CheckpointError, MistralRefError, short_repr
from mistral_ref.files.checkpoint import Checkpoint, weight_files
from mistral_ref.files.hub import lacking
from mistral_ref.files.json_file import read_json
from mistral_ref.files.paths import refuse_pointer
from mistral_ref.measure.doctor.finding import Finding
from mistral_ref.measure.doctor.patient import Patient

# What programs that download leave beside a file, or in place of it, until it is whole.
_BEGUN = ("*.incomplete", "*.aria2", "*.part", "*.partial", "*.crdownload", "*.download")
_LOCAL = ".cache/huggingface/download"  # where the hub's program keeps what it downloads to a directory of the user's
_MAY_BE_POINTER = re.compile(r".+\.(safetensors|gguf|json|jinja|model(\.v\w+)?|bin|pth)")
_POINTER_BYTES = 1024  # a pointer has some 130
_SHARD = re.compile(r"(consolidated|model)-\d{5}-of-\d{5}\.safetensors")
_FETCH = "Download it again; what is whole is not fetched twice."


def check_whole(path: Path) -> Iterator[Finding]:
    """Check the files in a directory, before anything in them is read; of any other path, that file."""
    if not path.is_dir():
        yield from _pointers([path] if path.is_file() else [])
        return
    for missing, problem in lacking(path):
        yield Finding("wrong", missing, problem, "The model cannot be loaded without it.", _FETCH)
    for begun in sorted(
        found for pattern in _BEGUN for found in (*path.glob(pattern), *(path / _LOCAL).rglob(pattern))
    ):
        yield Finding(
            "suspicious",
            begun,
            "a download that has not ended",
            "The file that it becomes is missing, or has holes of zeros although its size is right.",
            f"{_FETCH} If the model is whole, delete this file.",
        )
    yield from _pointers(sorted(found for found in path.iterdir() if _MAY_BE_POINTER.fullmatch(found.name)))


def _pointers(paths: list[Path]) -> Iterator[Finding]:
    for path in paths:
        try:
            if os.path.isfile(path) and os.path.getsize(path) < _POINTER_BYTES:
                refuse_pointer(path, path.read_bytes(), CheckpointError)
        except OSError:
            continue  # whoever reads the file says it
        except MistralRefError:
            yield Finding(
                "wrong",
                path,
                "a pointer of Git LFS, not the file itself",
                "It only says which file belongs here.",
                "Run `git lfs install`, then `git lfs pull` in the repository.",
            )


def check_index(patient: Patient) -> Iterator[Finding]:
    """Check the indexes of shards against the files."""
    for checkpoint in (one.checkpoint for one in patient.opened if one.checkpoint.layout != "gguf"):
        directory, names = checkpoint.path, weight_files(checkpoint.path, checkpoint.layout)
        index = next((directory / name for name in names if name.endswith(".index.json")), None)
        if index is None:
            continue
        if len(names) > 1:
            yield Finding(
                "suspicious",
                index,
                f"stands beside {names[0]}, which holds all weights",
                "Programs differ in which they read, and some read both. This program reads the one file.",
                "Delete the index and its shards, or the one file.",
            )
        else:
            yield from _against_files(index, checkpoint)


def _against_files(index: Path, checkpoint: Checkpoint) -> Iterator[Finding]:
    file = read_json(index, CheckpointError)
    about = file.get("metadata")
    said = about.get("total_size") if isinstance(about, dict) else None
    found = sum(tensor.raw.nbytes for tensor in (*checkpoint.tensors.values(), *checkpoint.ignored))
    if said is not None and said != found:
        yield Finding(
            "suspicious",
            index,
            f"total_size is {short_repr(said)}; the tensors in its shards have {found} bytes",
            "The index or a shard is of another revision, or was changed.",
            "Take the index and all shards of one revision.",
        )
    stem = index.name.partition(".")[0]
    listed = set(file["weight_map"].values())
    for path in sorted(index.parent.glob(f"{stem}-*.safetensors")):
        if _SHARD.fullmatch(path.name) and path.name not in listed:
            yield Finding(
                "suspicious",
                path,
                f"a shard that {index.name} does not list, so it is not read",
                "It is left from another revision, or the index is.",
                "Delete it, or take the index and all shards of one revision.",
            )
