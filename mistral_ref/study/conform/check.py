"""Check dumps of another engine against the kit: a Verdict for each model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mistral_ref.config import RowOrder
from mistral_ref.errors import InputError, Progress, first_difference, short_repr
from mistral_ref.files.paths import local_path
from mistral_ref.steps import step_names
from mistral_ref.study.conform.cases import BOS, Case, Text
from mistral_ref.study.conform.departure import Departure, departure_of
from mistral_ref.study.conform.hypotheses import (
    BF16,
    F16,
    FLOAT32,
    RIGHT,
    Bugs,
    Evidence,
    Hypotheses,
    Precision,
)
from mistral_ref.study.conform.kit import Kit
from mistral_ref.trace import Trace

Outcome = Literal["agrees", "agrees in 16 bits", "departs", "no dump"]


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one model.

    model       its name
    outcome     whether its dumps agree
    texts       the names of the texts that have a dump
    precision   with which numbers the engine computes, if the dumps agree or a cause is found: "float32", "f16", "bf16"
    distance    of the last steps, as a share of the right ones
    departure   where the dumps depart beyond the rounding of float32; None if they do not
    departure_in_16_bits    where they depart beyond the rounding of bf16; None if they do not
    causes      what would explain the dumps: the names of one bug or of two. Several, if they are alike in these texts
    separating  the text that would tell the causes apart; "" if there is one cause, or no such text
    """

    model: str
    outcome: Outcome
    texts: tuple[str, ...] = ()
    precision: str = ""
    distance: float = 0.0
    departure: Departure | None = None
    departure_in_16_bits: Departure | None = None
    causes: tuple[Bugs, ...] = ()
    separating: str = ""


def check(
    kit: Kit,
    dumps: str | os.PathLike[str],
    *,
    rope_row_order: RowOrder | None = None,
    float32: bool = False,
    progress: Progress | None = None,
) -> list[Verdict]:
    """Return a verdict for each model of a kit.

    dumps       a directory of files MODEL-TEXT.safetensors, as `Trace.load` describes them
    rope_row_order  as in `Trace.load`
    float32     whether the engine computes in float32, so that what 16 bits could round is a departure
    progress    called with (models done, models in all)

    Raises InputError if there is no dump at all, or if a dump holds another text; CheckpointError if one is broken.
    """
    found = {case: _dumps_of(case, local_path(dumps), rope_row_order) for case in kit.cases}
    if not any(found.values()):
        names = f"{kit.cases[0].name}-{kit.cases[0].texts()[0].name}.safetensors"
        raise InputError(f"{dumps}: holds no dump; expected files such as {names}")
    verdicts = []
    for done, (case, evidence) in enumerate(found.items()):
        if progress is not None:
            progress(done, len(found))
        if evidence:
            verdicts.append(verdict(case, kit.hypotheses(case), evidence, float32=float32))
        else:
            verdicts.append(Verdict(case.name, "no dump"))
    if progress is not None:
        progress(len(found), len(found))
    return verdicts


def verdict(case: Case, hypotheses: Hypotheses, evidence: Sequence[Evidence], *, float32: bool = False) -> Verdict:
    """Return the verdict of a model, from at least one dump; `float32` as in `check`.

    The tighter precision goes first: a small bug of an engine that computes in float32 must not pass for rounding.
    """
    narrow = () if float32 else (F16, BF16)
    texts = tuple(one.text.name for one in evidence)
    distance = hypotheses.distance(RIGHT, evidence)
    if hypotheses.explains(RIGHT, evidence):
        return Verdict(case.name, "agrees", texts, FLOAT32.name, distance)
    precision = next((one for one in narrow if hypotheses.explains(RIGHT, evidence, one)), None)
    causes, exact = hypotheses.causes(evidence, FLOAT32), FLOAT32
    if not causes:
        causes, exact = hypotheses.nearer_by_far(evidence), F16
    departure = _first_departure(hypotheses, evidence, FLOAT32)
    if not causes and precision is not None:
        return Verdict(case.name, "agrees in 16 bits", texts, precision.name, distance, departure)
    for one in narrow:
        if not causes:
            causes, exact = hypotheses.causes(evidence, one), one
    return Verdict(
        case.name,
        "departs",
        texts,
        exact.name if causes else "",
        distance,
        departure,
        None if float32 else _first_departure(hypotheses, evidence, BF16),
        tuple(causes),
        hypotheses.separates(causes, case.texts()) if len(causes) > 1 else "",
    )


def _dumps_of(case: Case, folder: Path, rope_row_order: RowOrder | None) -> list[Evidence]:
    """Return the dumps of a model that a directory holds."""
    evidence = []
    for text in case.texts():
        path = folder / f"{case.name}-{text.name}.safetensors"
        if path.is_file():
            dump = Trace.load(path, rope_row_order=rope_row_order)
            if dump.keys().isdisjoint(step_names(case.config)):
                raise InputError(f"{path}: holds no step of {case.name}, but {short_repr(list(dump))}")
            _check_tokens(path, dump, text)
            evidence.append(Evidence(text, dump))
    return evidence


def _check_tokens(path: Path, dump: Trace, text: Text) -> None:
    """Raise InputError unless a dump is of a text, or of a text with BOS twice, as far as it says."""
    whole, part = list(text.tokens), list(text.tokens[text.n_first :])
    expected = part if text.n_first and len(dump.tokens) == len(part) else whole
    if dump.tokens and dump.tokens not in (expected, [BOS, *whole]):
        raise InputError(f"{path}: {first_difference(dump.tokens, expected, 'tokens')}")
    longest = len(whole) + 1
    if dump.n_tokens > longest:
        raise InputError(f"{path}: holds {dump.n_tokens} tokens; expected {len(whole)}, as in kit.json")


def _first_departure(hypotheses: Hypotheses, evidence: Sequence[Evidence], precision: Precision) -> Departure | None:
    """Return where the dumps depart first from the right pass: in the first text of those that depart."""
    for one in evidence:
        for pair in hypotheses.pairs(RIGHT, one, precision):
            if pair.departs:
                return departure_of(one.text, pair)
    return None
