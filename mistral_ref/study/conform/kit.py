"""Write the conformance kit into a directory, and open one that has been written.

OUT/README.md               how to use it, and which bugs each model tells apart
OUT/kit.json                the models, the token ids of their texts, and checksums of the weights
OUT/MODEL/mistral/          the model in Mistral's layout; beside it huggingface/ and GGUF files
OUT/MODEL/TEXT.safetensors  what the oracle computes at every step, rounded to float32: a trace
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ref.display import markdown_table
from mistral_ref.errors import ConfigError, InputError, Progress, first_difference
from mistral_ref.files.json_file import read_json
from mistral_ref.files.paths import local_path
from mistral_ref.files.whole_file import whole_directory
from mistral_ref.loading import load
from mistral_ref.steps import Step
from mistral_ref.study.broken import BUGS
from mistral_ref.study.conform.cases import CASES, Case, Text
from mistral_ref.study.conform.hypotheses import BF16, FLOAT32, RIGHT, Evidence, Hypotheses, Precision, logits_of
from mistral_ref.study.conform.layouts import GGUF_TYPES, write_gguf, write_huggingface, write_mistral
from mistral_ref.trace import Trace

_FORMAT = "mistral_ref.conform.v1"
_README = """\
# A conformance kit of mistral_ref

Tiny random models for an engine of the Mistral transformer. Let your engine compute the logits of each text in
kit.json, and write them to DUMPS/MODEL-TEXT.safetensors: a tensor "logits" (tokens, vocabulary), and more steps if you
have them. Then

    mistral-ref conform check THIS_FOLDER DUMPS

The same weights, bit for bit, lie in every file of a model. A text with a first pass is read in two: first so many
tokens, then the others over the cache; the dump holds the second pass, or both.

## Models

{models}

## What each model tells apart

Which texts show a bug in the logits: s short, w window, p past, c chunks. A capital letter: in 16 bits too. A point:
the model cannot have the bug.

{table}

{alike}
"""


@dataclass(frozen=True)
class Kit:
    """A kit in a directory: its models, and their folders' parent."""

    directory: Path
    cases: tuple[Case, ...]

    def hypotheses(self, case: Case) -> Hypotheses:
        """Return the passes of a model of the kit, computed by the oracle."""
        return Hypotheses(load(self.directory / case.name / "mistral", dtype="float64"))


def make_kit(
    directory: str | os.PathLike[str], *, cases: Sequence[Case] = CASES, progress: Progress | None = None
) -> Kit:
    """Write a kit into a new directory and return it. It gets its name only when it is complete.

    cases       its models
    progress    called with (models done, models in all)

    Raises InputError if the directory is there already, or cannot be written.
    """
    path = local_path(directory)
    if path.exists():
        raise InputError(f"{path}: is there already; expected the name of a new directory")
    with whole_directory(path) as partial:
        kit = Kit(partial, tuple(cases))
        rows: dict[str, dict[str, str]] = {}
        alike = []
        for done, case in enumerate(cases):
            if progress is not None:
                progress(done, len(cases))
            _write_models(case, partial / case.name)
            hypotheses = kit.hypotheses(case)
            for text in case.texts():
                _rounded(hypotheses.trace(RIGHT, text)).save(partial / case.name / f"{text.name}.safetensors")
            rows[case.name] = {bug: _letters(hypotheses, bug, case.texts()) for bug in hypotheses.bugs}
            alike += [f"- {case.name}: {first} and {second}" for first, second in _alike(hypotheses, case)]
        if progress is not None:
            progress(len(cases), len(cases))
        _write_texts(kit, rows, alike)
    return Kit(path, tuple(cases))


def open_kit(directory: str | os.PathLike[str]) -> Kit:
    """Return the kit in a directory.

    Raises InputError if it holds none, if another version wrote it, or if a file of weights has changed since.
    """
    path = local_path(directory)
    if not (path / "kit.json").is_file():
        raise InputError(f"{path}: holds no kit.json; expected a directory that mistral-ref conform make wrote")
    try:
        found = read_json(path / "kit.json")
    except ConfigError as error:
        raise InputError(str(error)) from None
    cases = tuple(case for case in CASES if (path / case.name).is_dir())
    expected = {"format": _FORMAT, "models": [_case_json(case, path) for case in cases]}
    if difference := first_difference({name: found.get(name) for name in expected}, expected):
        raise InputError(f"{path / 'kit.json'}: {difference}; conform make writes a kit that this version can check")
    return Kit(path, cases)


def _write_models(case: Case, folder: Path) -> None:
    for layout in ("mistral", "huggingface"):
        (folder / layout).mkdir(parents=True)
    write_mistral(case, folder / "mistral")
    write_huggingface(case, folder / "huggingface")
    if case.architecture is not None:
        for kind in GGUF_TYPES:
            write_gguf(case, kind, folder / f"{kind}.gguf")


def _rounded(trace: Trace) -> Trace:
    """Return a trace whose values are float32."""
    steps = [
        Step(step.name, step.kind, step.value.astype(np.float32), step.key_positions) for step in trace.steps.values()
    ]
    return Trace(steps, trace.tokens, trace.pieces, start=trace.start, made_by=trace.made_by, windows=trace.windows)


def _letters(hypotheses: Hypotheses, bug: str, texts: list[Text]) -> str:
    """Return the first letter of each text that shows a bug in the logits; capital if 16 bits show it too."""

    def shows(text: Text, precision: Precision) -> bool:
        wrong = logits_of(hypotheses.trace((bug,), text))
        return not hypotheses.explains(RIGHT, [Evidence(text, wrong)], precision)

    seen = [text.name[0].upper() if shows(text, BF16) else text.name[0] for text in texts if shows(text, FLOAT32)]
    return "".join(seen)


def _alike(hypotheses: Hypotheses, case: Case) -> list[tuple[str, str]]:
    """Return the pairs of bugs that have the same logits in all texts."""
    return [
        pair
        for pair in combinations(hypotheses.bugs, 2)
        if not any(hypotheses.separates([(pair[0],), (pair[1],)], [text]) for text in case.texts())
    ]


def _write_texts(kit: Kit, rows: dict[str, dict[str, str]], alike: list[str]) -> None:
    """Write kit.json and README.md."""
    folder, cases = kit.directory, kit.cases
    content = {"format": _FORMAT, "models": [_case_json(case, folder) for case in cases], "shows": rows}
    (folder / "kit.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    models = "\n".join(f"- {case.name}: {case.says}" for case in cases)
    table = [[bug, *(rows[case.name].get(bug, ".") for case in cases)] for bug in BUGS]
    text = _README.format(
        models=models,
        table=markdown_table(["bug", *(case.name for case in cases)], table),
        alike="\n".join(["Alike, with the same logits in all texts of a model:", "", *(alike or ["- no two bugs"])]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _case_json(case: Case, folder: Path) -> dict[str, Any]:
    """Return what kit.json says of a model: texts, and the checksum of each file of weights."""
    texts = {text.name: {"tokens": list(text.tokens), "first_pass": text.n_first} for text in case.texts()}
    files = ["mistral/consolidated.safetensors", "huggingface/model.safetensors"]
    files += [f"{kind}.gguf" for kind in GGUF_TYPES if case.architecture is not None]
    return {
        "name": case.name,
        "says": case.says,
        "vocabulary": case.config.vocab_size,
        "texts": texts,
        "sha256": {file: _checksum(folder / case.name / file) for file in files},
    }


def _checksum(path: Path) -> str:
    """Return the SHA-256 of a file; "" if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""
