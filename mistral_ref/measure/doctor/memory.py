"""Memory: does a text of so many tokens fit into what is left of it?"""

from __future__ import annotations

from collections.abc import Iterator

from mistral_ref.config import ModelConfig
from mistral_ref.errors import size
from mistral_ref.host import available_memory
from mistral_ref.measure.doctor.finding import Finding
from mistral_ref.measure.doctor.patient import Patient
from mistral_ref.memory import memory_needs


def check_memory(patient: Patient, tokens: int) -> Iterator[Finding]:
    """Check a text of so many tokens, prompt and answer together."""
    if patient.config is None:
        patient.left_out.append("memory: the configuration cannot be read")
        return
    yield from _length(patient, patient.config, tokens)
    left = available_memory()
    if left is None:
        patient.left_out.append("memory: the system does not tell how much is left")
        return
    weights = patient.opened[0].weights if patient.opened else None
    needs = memory_needs(patient.config, weights, tokens)
    patient.examined.append(f"memory: {size(left)} are left, for {tokens:,} tokens")
    if needs.total > left:
        yield Finding(
            "wrong",
            patient.path,
            f"{tokens:,} tokens take {size(needs.total)} of memory, {size(needs.cache)} of it for keys and values; "
            f"{size(left)} are left",
            "Generating a text of this length is refused.",
            "Take fewer tokens, keys and values of fewer bits (--cache-dtype int8), or a machine with more memory.",
        )
    elif needs.total + needs.mapped > left:
        yield Finding(
            "suspicious",
            patient.path,
            f"{tokens:,} tokens take {size(needs.total)} of memory, and the weights have {size(needs.mapped)}; "
            f"{size(left)} are left",
            "Weights that do not stay in memory are read from the disk again for each token, which is slow.",
            "Take weights of fewer bits: mistral-ref quantize, or a GGUF file.",
        )


def _length(patient: Patient, config: ModelConfig, tokens: int) -> Iterator[Finding]:
    if config.max_seq_len is not None and tokens > config.max_seq_len:
        yield Finding(
            "wrong",
            patient.path,
            f"{tokens:,} tokens are more than the model is meant for, {config.max_seq_len:,}",
            "A text of this length is refused.",
            "Take fewer tokens, or a model for longer texts.",
        )
