"""Finding: one thing that is wrong or suspicious in the files of a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Severity = Literal["wrong", "suspicious"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong or suspicious in the files of a model.

    severity    "wrong": the model does not load, or results are wrong in a program that follows this file;
                "suspicious": this may be meant, and seldom is
    file        where it is
    what        what was found, and what was expected
    why         what follows from it
    cure        what to do
    """

    severity: Severity
    file: Path
    what: str
    why: str
    cure: str
