"""Read all parts of a model that are there, each by itself, into a Patient."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mistral_ref.config import ModelConfig
from mistral_ref.errors import ConfigError, InputError, MistralRefWarning, UnknownTokenizerError
from mistral_ref.files import hub
from mistral_ref.files.build_weights import build_weights
from mistral_ref.files.checkpoint import (
    PICKLES,
    Checkpoint,
    Layout,
    gguf_checkpoint,
    open_checkpoint,
    weight_files,
)
from mistral_ref.files.config_files import read_config, read_config_json, read_params_json
from mistral_ref.files.generation_config import read_bos_ids, read_eos_ids
from mistral_ref.files.gguf import GGUF, gguf_header, open_gguf
from mistral_ref.files.gguf_config import gguf_config, gguf_eos_ids
from mistral_ref.files.json_file import read_json
from mistral_ref.files.paths import METADATA, begins_gguf_model, checked_model, is_gguf, local_path
from mistral_ref.measure.doctor.patient import Opened, Patient
from mistral_ref.text import find_tokenizer, load_tokenizer, tokenizer_files
from mistral_ref.text.gguf_tokenizer import gguf_tokenizer, has_tokenizer
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.text.tokenizer import Tokenizer
from mistral_ref.text.tokenizer_json import WrongPatternWarning

_ReadConfig = Callable[[Path], ModelConfig]
_LAYOUTS: tuple[Layout, ...] = ("consolidated", "huggingface")  # the first that is there is loaded


def located(path: str | os.PathLike[str]) -> Path:
    """Return the directory, the GGUF file or the lone configuration that a path or a name means.

    A model in the hub's cache need not be whole. Raises InputError if there is nothing to examine.
    """
    found = local_path(path)
    if not os.path.lexists(found):
        found = hub.find(os.fspath(path), InputError, whole=False) or found
        if not os.path.lexists(found):
            raise InputError(f"{found}: no such file or directory")
    return found if _reader_of(found) else checked_model(found)


def read_parts(patient: Patient) -> None:
    """Read what is at the patient's path. Raises InputError for a directory in which there is no part of a model."""
    path = patient.path
    if reader := _reader_of(path):
        _read_configuration(patient, path, reader)
        patient.config = patient.configs.get(path)
        patient.left_out.append("weights and tokenizer: a configuration alone holds neither")
    elif is_gguf(path):
        _read_gguf(patient, path)
        patient.config = patient.configs.get(path)
    else:
        _read_directory(patient)


def _reader_of(path: Path) -> _ReadConfig | None:
    """Return what reads the configuration that a file holds by its name or its content; None for any other path."""
    if path.suffix != ".json" or not os.path.isfile(path):
        return None
    try:
        file = read_json(path)
    except ConfigError:
        file = {}
    if path.name == "params.json" or "dim" in file:
        return read_params_json
    return read_config_json if path.name == "config.json" or {"model_type", "text_config"} & {*file} else None


def _read_configuration(patient: Patient, path: Path, read: _ReadConfig) -> None:
    config = patient.attempt("configuration", path, lambda: read(path))
    if config is not None:
        patient.configs[path] = config
        patient.examined.append(f"{path.name}: the configuration")


def _read_directory(patient: Patient) -> None:
    directory = patient.path
    names = sorted(os.listdir(directory))
    files = [directory / "params.json", directory / "config.json"]
    present = [path for path in files if path.name in names]
    has_weights = any(name.endswith((".safetensors", ".safetensors.index.json", ".gguf", *PICKLES)) for name in names)
    if not present and not has_weights and not tokenizer_files(directory):
        raise InputError(f"{directory}: holds no part of a model; expected params.json or config.json")
    if METADATA in names:
        _read_gguf(patient, directory / METADATA)
    for path in present:
        _read_configuration(patient, path, read_params_json if path.name == "params.json" else read_config_json)
    whole = patient.configs.get(directory / METADATA)
    if METADATA not in names:
        whole = patient.attempt("configuration", files[0], lambda: read_config(directory))
    if whole is not None and files[0] in patient.configs:
        patient.configs[files[0]] = whole  # with what only config.json says
    patient.config = whole or next(iter(patient.configs.values()), None)
    layouts: list[Layout | None] = [layout for layout in _LAYOUTS if weight_files(directory, layout)]
    for layout in layouts or ([None] if has_weights else []):
        _read_layout(patient, layout)
    if not has_weights:
        patient.left_out.append("weights: there are none here")
    if not patient.tokenizers:
        _read_tokenizers(patient)
    for name in names:
        if begins_gguf_model(name) and name != METADATA:  # beside the safetensors files, which count
            _read_gguf(patient, directory / name)


def _read_layout(patient: Patient, layout: Layout | None) -> None:
    directory = patient.path
    file = directory / next(iter(weight_files(directory, layout)), "")
    checkpoint = patient.attempt("weights", file, lambda: open_checkpoint(directory, layout))
    if checkpoint is not None:
        _build(patient, checkpoint, patient.config, file)


def _build(patient: Patient, checkpoint: Checkpoint, config: ModelConfig | None, file: Path) -> None:
    """Make weights of a checkpoint."""
    if config is None:
        patient.left_out.append(f"{file.name}: the configuration, which says what is in it, cannot be read")
        return
    weights = patient.attempt("weights", file, lambda: build_weights(checkpoint, config))
    if weights is not None:
        patient.opened.append(Opened(checkpoint, weights, config))
        patient.examined.append(f"{file.name}: names and shapes of {len(checkpoint.tensors)} tensors")


def _read_gguf(patient: Patient, path: Path) -> None:
    gguf = patient.attempt("weights", path, lambda: open_gguf(path))
    is_whole = gguf is not None
    gguf = gguf or patient.attempt("weights", path, lambda: gguf_header(path))
    if gguf is not None:
        _read_parts_of_gguf(patient, gguf, is_whole=is_whole)


def _read_parts_of_gguf(patient: Patient, gguf: GGUF, *, is_whole: bool) -> None:
    path = gguf.path
    config = patient.attempt("configuration", path, lambda: gguf_config(gguf), notices=MistralRefWarning)
    if config is not None:
        patient.configs[path] = config
        patient.examined.append(f"{path.name}: the configuration in its metadata")
    if is_whole and path.name == METADATA:
        pass  # the weights lie beside it
    elif not is_whole or not gguf.tensors:
        patient.left_out.append(f"{path.name}: its weights are not there")
    elif (checkpoint := patient.attempt("weights", path, lambda: gguf_checkpoint(gguf))) is not None:
        _build(patient, checkpoint, config, path)
    if not has_tokenizer(gguf):
        patient.left_out.append(f"{path.name}: it holds no tokenizer")
    elif not patient.tokenizers:  # beside other files, theirs counts
        patient.eos_ids = patient.attempt("tokenizer", path, lambda: gguf_eos_ids(gguf)) or ()
        _read_tokenizer(patient, path, lambda: gguf_tokenizer(gguf))


def _read_tokenizers(patient: Patient) -> None:
    directory = patient.path
    patient.bos_ids = patient.attempt("configuration", directory, lambda: read_bos_ids(directory)) or ()
    patient.eos_ids = patient.attempt("configuration", directory, lambda: read_eos_ids(directory)) or ()
    paths = tokenizer_files(directory)
    if not paths:
        patient.left_out.append("tokenizer: there is none here")
        return
    patient.attempt("tokenizer", directory, lambda: find_tokenizer(directory))
    for path in paths:
        _read_tokenizer(patient, path, lambda path=path: load_tokenizer(path))  # type: ignore[misc]


def _read_tokenizer(patient: Patient, path: Path, load: Callable[[], Tokenizer]) -> None:
    def read() -> Tokenizer | None:
        try:
            return load()
        except UnknownTokenizerError:
            if not isinstance(patient.tokenizer, SentencePieceTokenizer):
                raise
            return None  # SentencePiece in a tokenizer.json: it is compared as it stands

    # What others warn of, the first has warned of, too: the files beside it.
    notices = WrongPatternWarning if patient.tokenizers else MistralRefWarning
    tokenizer = patient.attempt("tokenizer", path, read, notices=notices)
    if tokenizer is not None:
        patient.tokenizers[path] = tokenizer
        patient.examined.append(f"{path.name}: {tokenizer.kind}, {tokenizer.vocab_size:,} ids")
