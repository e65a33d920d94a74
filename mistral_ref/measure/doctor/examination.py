"""examine: read all parts of a model, and run every check."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mistral_ref.config import MAX_VALUES
from mistral_ref.errors import Progress, checked_int
from mistral_ref.measure.doctor.configurations import check_configurations
from mistral_ref.measure.doctor.files import check_index, check_whole
from mistral_ref.measure.doctor.finding import Finding
from mistral_ref.measure.doctor.layouts import check_layouts
from mistral_ref.measure.doctor.memory import check_memory
from mistral_ref.measure.doctor.opening import located, read_parts
from mistral_ref.measure.doctor.patient import Patient
from mistral_ref.measure.doctor.tokenizers import check_tokenizers
from mistral_ref.measure.doctor.values import check_values

# Each takes what could be read, and yields what it finds. They are in this order in a report.
CHECKS = (check_index, check_configurations, check_tokenizers, check_layouts)


@dataclass(frozen=True)
class Report:
    """What an examination has found.

    path        what was examined: a directory, a GGUF file, or a configuration
    findings    what is wrong or suspicious; empty if nothing is
    examined    what was read, in words
    left_out    what was not examined, and why
    """

    path: Path
    findings: tuple[Finding, ...]
    examined: tuple[str, ...]
    left_out: tuple[str, ...]


def examine(
    path: str | os.PathLike[str], *, tokens: int | None = None, quick: bool = False, progress: Progress | None = None
) -> Report:
    """Return what is wrong or suspicious in the files of a model.

    path        what `load` takes, also a broken model in the hub's cache, or a params.json or a config.json alone
    tokens      also check whether a text of so many tokens fits into the memory that is left now
    quick       do not read the weights: only their names, their shapes, and a few rows where there are two layouts.
                Without this an examination takes as long as the files take to be read
    progress    called with (weights done, weights in all)

    What prevents loading is a finding, and does not hide the rest. Raises InputError if there is nothing at the path.
    """
    if tokens is not None:
        tokens = checked_int("tokens", tokens, least=1, most=MAX_VALUES["max_seq_len"])
    patient = Patient(located(path))
    patient.findings += check_whole(patient.path)
    read_parts(patient)
    for check in CHECKS:
        patient.findings += check(patient)
    if tokens is not None:
        patient.findings += check_memory(patient, tokens)
    if quick:
        patient.left_out.append("the values of the weights: a quick examination does not read them")
    else:
        patient.findings += check_values(patient, progress)
    return Report(
        patient.path, tuple(dict.fromkeys(patient.findings)), tuple(patient.examined), tuple(patient.left_out)
    )
