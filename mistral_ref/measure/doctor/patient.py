"""Patient: what could be read of a model. What cannot be read is a finding, and does not hide the rest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from mistral_ref.config import ModelConfig
from mistral_ref.errors import MistralRefError, escaped
from mistral_ref.files.checkpoint import Checkpoint
from mistral_ref.measure.doctor.finding import Finding, Severity
from mistral_ref.text.tokenizer import Tokenizer
from mistral_ref.text.tokenizer_json import WrongPatternWarning
from mistral_ref.weights import Weights

_Part = TypeVar("_Part")
_NOTICE = "Something is assumed or ignored here, and results may depend on it."
_NOTICES: dict[type[Warning], tuple[Severity, str, str]] = {
    WrongPatternWarning: (
        "wrong",
        "A program that follows the file cuts some words in other places than the model has learnt, such as 'The' with "
        "its quotes. This program uses the right pattern.",
        "Take tekken.json of the same model instead, or, in transformers, load with fix_mistral_regex=True.",
    )
}
_NO_PART = {
    "configuration": (
        "The model cannot be loaded without its configuration.",
        "Take the file anew from the model's publisher, or correct what it says.",
    ),
    "weights": (
        "The model cannot be loaded without these weights.",
        "Take the files of the weights anew from the model's publisher, all of one revision.",
    ),
    "tokenizer": (
        "Texts do not become the token ids that the model has learnt.",
        "Take the tokenizer's files anew from the model's publisher.",
    ),
}


class Opened(NamedTuple):
    """The weights in one layout, the checkpoint that they were made of, and the configuration of them."""

    checkpoint: Checkpoint
    weights: Weights
    config: ModelConfig


@dataclass
class Patient:
    """What could be read of a model.

    path        the directory, the GGUF file, or the file of a lone configuration
    configs     the configuration that each file holds
    config      the configuration that counts; None: none could be read
    opened      the weights of each layout and of each GGUF file; those that count come first
    tokenizers  the tokenizer of each file; the one that counts comes first
    bos_ids, eos_ids    the ids that begin and end a text according to files beside the tokenizer
    findings    what was found so far
    examined    what was read, in words
    left_out    what was not read, and why
    """

    path: Path
    configs: dict[Path, ModelConfig] = field(default_factory=dict)
    config: ModelConfig | None = None
    opened: list[Opened] = field(default_factory=list)
    tokenizers: dict[Path, Tokenizer] = field(default_factory=dict)
    bos_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    findings: list[Finding] = field(default_factory=list)
    examined: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that counts."""
        return next(iter(self.tokenizers.values()), None)

    def attempt(
        self, part: str, file: Path, read: Callable[[], _Part], *, notices: type[Warning] | None = None
    ) -> _Part | None:
        """Return what `read` returns; None if it raises an error, which becomes a finding.

        part        "configuration", "weights" or "tokenizer"
        file        the file that is read, if the message does not begin with another
        notices     warnings of this kind become findings, too. What others are about, a check looks for
        """
        why, cure = _NO_PART[part]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = read()
            except MistralRefError as error:
                self._add(Finding("wrong", *self._told(file, str(error)), why, cure))
                return None
        for warning in caught:
            if notices is not None and issubclass(warning.category, notices):
                severity, *why_and_cure = _NOTICES.get(warning.category, ("suspicious", _NOTICE, cure))
                self._add(Finding(severity, *self._told(file, str(warning.message)), *why_and_cure))
        return found

    def _told(self, file: Path, message: str) -> tuple[Path, str]:
        """Return which file a message is about, and the message without its path."""
        for path in (file, self.path):
            if message.startswith(f"{escaped(str(path))}: "):
                return path, message.removeprefix(f"{escaped(str(path))}: ")
        inside = f"{escaped(str(self.path))}/"
        name, colon, what = message.removeprefix(inside).partition(": ")
        if message.startswith(inside) and colon:
            return self.path / name, what
        return file, message

    def _add(self, finding: Finding) -> None:
        """Add a finding, unless the file is known to be wrong already: what follows from it is no news."""
        broken = {known.file for known in self.findings if known.severity == "wrong" and not known.file.is_dir()}
        if finding.file not in broken and finding not in self.findings:
            self.findings.append(finding)
