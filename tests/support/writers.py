"""Everything that the library writes, and what reads it again. As a program: write all of it for ever, to be killed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import NamedTuple

from support.tiny import SMALL, model_of

import mistral_ref
from mistral_ref.errors import CacheError, CheckpointError, InputError, MistralRefError
from mistral_ref.files.tensor_file import open_tensor_file
from mistral_ref.measure.benchmark import write_json
from mistral_ref.measure.shapes import shape
from mistral_ref.measure.synthetic import make_checkpoint
from mistral_ref.study import report

MODEL = model_of(SMALL)
FIGURES = {"x": [1.5] * 2000}


class Writer(NamedTuple):
    """A way to write a file or directory.

    error   what is raised if it cannot be written
    write   writes to a path; the second path is the directory of a model
    read    reads what `write` wrote; fails unless it is whole
    """

    error: type[MistralRefError]
    write: Callable[[Path, Path], object]
    read: Callable[[Path], object]


def _save_cache(path: Path, source: Path) -> None:
    cache = MODEL.new_cache()
    MODEL.forward([1] * 40, cache)
    cache.save(path)


def _read_page(path: Path) -> None:
    assert path.read_text().rstrip().endswith("</html>")


def _read_random_weights(path: Path) -> None:
    """A killed process may have written the weights and not the configuration yet."""
    for file in path.glob("*.safetensors"):
        open_tensor_file(file)
    for file in path.glob("*.json"):
        json.loads(file.read_text())


WRITERS = {
    "trace": Writer(CheckpointError, lambda path, source: MODEL.trace([1] * 40).save(path), mistral_ref.Trace.load),
    "cache": Writer(CacheError, _save_cache, MODEL.load_cache),
    "page": Writer(InputError, lambda path, source: report.write(MODEL, [1], path, with_cost=False), _read_page),
    "quantized": Writer(
        InputError,
        lambda path, source: mistral_ref.quantize(source, path),
        lambda path: mistral_ref.load(path, backend="numpy").forward([1]),
    ),
    "random weights": Writer(
        InputError, lambda path, source: make_checkpoint(path, shape("tiny")), _read_random_weights
    ),
    "figures": Writer(
        InputError, lambda path, source: write_json(path, FIGURES), lambda path: json.loads(path.read_text())
    ),
}


def write_for_ever(folder: Path, source: Path, names: list[str]) -> None:
    """Write to `folder`, over what is there; each quantized directory and its like get a new name."""
    print(flush=True)
    for number in count():
        for name in names:
            is_directory = name in ("quantized", "random weights")
            WRITERS[name].write(folder / (f"{name} {number}" if is_directory else name), source)


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
