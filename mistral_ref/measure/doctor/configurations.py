"""Configurations: params.json against config.json, and what is unlikely in one of them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import short_repr
from mistral_ref.files.config_fields import NAMES, difference_text, differences, value_at
from mistral_ref.files.config_files import unknown_in_params_json
from mistral_ref.files.gguf_config import lost_window
from mistral_ref.files.json_file import read_json
from mistral_ref.measure.doctor.finding import Finding, Severity
from mistral_ref.measure.doctor.patient import Patient

_CORRECT = "Compare both files with those of the model's publisher, and correct the one that is wrong."
_SIZE = "The sizes are those of another model, or one file is wrong: the weights fit only one of them."
_WHY = {
    "sliding_window": "Tokens see other keys: texts that are longer than a window come out wrong.",
    "rope_theta": "Positions turn by other angles: short texts look right, and longer ones become incoherent.",
    "max_seq_len": "Programs stop at different lengths, or take more memory than the model needs.",
    "norm_eps": "Every norm divides by another number, so all values are a little off.",
    "yarn": "With YaRN on one side alone, positions turn by other angles there.",
    "yarn.attention_factor": "Attention is too sharp or too flat. config.json says it by mscale and mscale_all_dim, "
    "params.json by apply_scale; a program that takes one of them alone computes another factor.",
    "query_temperature": "Queries far into a text are too small or too large there.",
    "moe": "Tokens go to other experts, or to another number of them.",
}
_SAY_IT = "Say it in the file as the model's publisher does."


def check_configurations(patient: Patient) -> Iterator[Finding]:
    """Check every configuration that could be read."""
    files = list(patient.configs.items())
    for path, config in files[1:]:
        yield from _against_first(files[0], path, config)
    for path, config in files:
        yield from _window_and_theta(path, config)
        yield from _yarn(path, config)
        if path.suffix == ".json":
            file = read_json(path)
            if "dim" in file:
                yield from _params_json(path, file, config, alone=len(files) == 1)
            else:
                yield from _absent_in_config_json(path, file, config)
    yield from _tied(patient)


def _against_first(first: tuple[Path, ModelConfig], path: Path, config: ModelConfig) -> Iterator[Finding]:
    for field, ours, theirs in differences(first[1], config):
        name = NAMES.get(field, ("", ""))[1].split(" ")[-1] if "." not in field else ""
        spelled = f"{field} ({name})" if path.suffix == ".json" and name not in ("", field) else field
        why = _WHY.get(field) or _WHY.get(field.partition(".")[0]) or _SIZE
        severity: Severity = "suspicious" if field == "max_seq_len" else "wrong"
        yield Finding(severity, path, difference_text(spelled, ours, theirs, first[0].name), why, _CORRECT)


def _window_and_theta(path: Path, config: ModelConfig) -> Iterator[Finding]:
    is_gguf = path.suffix != ".json"
    if lost_window(config):
        yield Finding(
            "suspicious",
            path,
            "has the shape of Mistral 7B v0.1 and no sliding window; expected 4096",
            "The model has learnt to see 4096 keys: texts that are longer come out wrong."
            + (" GGUF files do not hold this window." if is_gguf else ""),
            "Load it with --window 4096, or window=4096." if is_gguf else "Set sliding_window to 4096.",
        )
    elif config.rope_theta <= 1e4 and not any(config.sliding_window) and not config.yarn and _is_long(config):
        yield Finding(
            "suspicious",
            path,
            f"rope_theta is {config.rope_theta:g} with {config.max_seq_len} positions and no window; published models "
            "of this length have 1e6 or more",
            "With a wrong theta short texts look right, and longer ones become incoherent.",
            "Look up rope_theta in the files of the model's publisher.",
        )


def _is_long(config: ModelConfig) -> bool:
    return config.max_seq_len is not None and config.max_seq_len >= 2**15


def _yarn(path: Path, config: ModelConfig) -> Iterator[Finding]:
    yarn, temperature = config.yarn, config.query_temperature
    if yarn is None:
        return
    if temperature is not None and yarn.attention_factor != 1:
        yield Finding(
            "suspicious",
            path,
            f"YaRN's attention factor is {yarn.attention_factor:.4g} beside a query temperature; expected 1",
            "This is how several programs got Ministral 3 wrong: cosines and sines are multiplied by it, and texts "
            "repeat themselves.",
            "In config.json mscale and mscale_all_dim must both be 1, in params.json apply_scale must be false, in a "
            "GGUF file rope.scaling.yarn_log_multiplier must be 1.",
        )
    if temperature is None and yarn.attention_factor == 1:
        yield Finding(
            "suspicious",
            path,
            "YaRN's attention factor is 1 and there is no query temperature; models with this factor have one",
            "Without the temperature attention becomes too flat far into a text.",
            "Look for llama_4_scaling, or llama_4_scaling_beta, in the files of the model's publisher.",
        )
    original = yarn.original_max_position_embeddings
    if temperature is not None and temperature.original_max_position_embeddings != original:
        found = temperature.original_max_position_embeddings
        yield Finding(
            "suspicious",
            path,
            f"the query temperature grows every {found} positions; expected YaRN's original length, {original}",
            "Queries are too small or too large far into a text.",
            _SAY_IT,
        )


def _params_json(path: Path, file: dict[str, Any], config: ModelConfig, *, alone: bool) -> Iterator[Finding]:
    if unknown := unknown_in_params_json(file):
        yield Finding(
            "suspicious",
            path,
            f"unknown fields are ignored: {', '.join(map(short_repr, islice(unknown, 20)))}",
            "A field that changes the mathematics would be missed.",
            "Ask the model's publisher what it means. There is nothing to do if it does not concern the text model.",
        )
    if alone and value_at(file, "rope_theta") is None and not any(config.sliding_window):
        yield Finding(
            "suspicious",
            path,
            f"rope_theta is missing; {config.rope_theta:g} is assumed, because there is no sliding window",
            "Other programs assume other values. With a wrong one, longer texts become incoherent.",
            _SAY_IT,
        )


def _absent_in_config_json(path: Path, file: dict[str, Any], config: ModelConfig) -> Iterator[Finding]:
    level = "text_config." if isinstance(file.get("text_config"), dict) else ""
    if value_at(file, f"{level}model_type") not in ("mistral", "ministral"):
        return
    present = {**(file["text_config"] if level else file)}
    for block in ("rope_scaling", "rope_parameters"):
        present |= present.get(block) or {}
    for name, value in {
        "sliding_window": next((window for window in config.sliding_window if window), None),
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }.items():
        if name not in present:
            yield Finding(
                "suspicious",
                path,
                f"{level}{name} is missing; {value} is assumed, as transformers does",
                "Other programs assume other values, and published files say it.",
                _SAY_IT,
            )
    if present.get("head_dim") is None and config.head_dim > 128:
        yield Finding(
            "suspicious",
            path,
            f"{level}head_dim is missing, so it is hidden_size / num_attention_heads, {config.head_dim}; heads of the "
            "published models are 128 wide",
            "In Mistral Nemo and Small the heads together are narrower than the model.",
            "Set head_dim as the model's publisher does.",
        )


def _tied(patient: Patient) -> Iterator[Finding]:
    said = {}
    for path in patient.configs:
        file = read_json(path) if path.suffix == ".json" else {}
        for name in ("tied_embeddings", "tie_word_embeddings", "text_config.tie_word_embeddings"):
            if isinstance(found := value_at(file, name), bool):
                said[path, name] = found
    if len({*said.values()}) > 1:
        (path, name), found = list(said.items())[-1]
        others = "; ".join(f"{file.name} has {other} {value}" for (file, other), value in list(said.items())[:-1])
        yield Finding(
            "suspicious",
            path,
            f"{name} is {found}; {others}",
            "A program that ties the embeddings takes the embedding as the output matrix, whatever the files hold.",
            "Both must be true if the files hold no output matrix, and false otherwise.",
        )
    is_tied = [key for key, tied in said.items() if tied]
    for opened in patient.opened if is_tied else ():
        embedding, output = opened.weights.tok_embeddings, opened.weights.output
        rows = slice(min(64, embedding.shape[0]))
        if output is not embedding and not np.array_equal(
            embedding.rows(rows, np.float32), output.rows(rows, np.float32), equal_nan=True
        ):
            path, name = is_tied[0]
            yield Finding(
                "wrong",
                path,
                f"{name} is true, but the files hold an output matrix that is not the embedding",
                "A program that follows it writes gibberish. This program uses the output matrix.",
                f"Set {name} to false.",
            )
