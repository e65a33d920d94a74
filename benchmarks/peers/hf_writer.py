"""A checkpoint in Mistral's own layout as a Hugging Face directory for transformers, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError
from mistral_ref.files.checkpoint import open_checkpoint
from mistral_ref.files.config_files import read_config
from mistral_ref.files.tensor_file import Tensor
from mistral_ref.files.tensor_names import huggingface_name
from mistral_ref.measure.synthetic import PlannedTensor, write_planned
from mistral_ref.study.conform.layouts import config_json, rows_in_halves

_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _config_json(config: ModelConfig, dtype: str) -> dict[str, object]:
    """Return what config.json says; without a window, so that every runtime does the same work."""
    no_window = config.replace(sliding_window=(None,) * config.n_layers)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    return config_json(no_window, "mistral", _TORCH_NAMES[dtype]) | ids


def _planned(tensor: Tensor, config: ModelConfig) -> PlannedTensor:
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(tensor.name.split(".")[-2])

    def pieces() -> Iterator[np.ndarray]:
        data = tensor.mapped()[1]
        yield data if heads is None else rows_in_halves(data, heads)

    return PlannedTensor(huggingface_name(tensor.name), tensor.dtype, tensor.shape, pieces)


def write_huggingface(directory: Path, target: Path) -> None:
    """Write the model in a directory as config.json and model.safetensors; raise InputError if these cannot say it."""
    config, tensors = read_config(directory), list(open_checkpoint(directory).tensors.values())
    if config.moe or config.yarn or config.query_temperature:
        raise InputError("only models without experts, YaRN and query temperature are written for transformers here")
    if not {tensor.dtype for tensor in tensors} <= set(_TORCH_NAMES):
        raise InputError(f"expected weights in {', '.join(_TORCH_NAMES)} for transformers")
    target.mkdir(exist_ok=True)
    text = json.dumps(_config_json(config, tensors[0].dtype), indent=2)
    (target / "config.json").write_text(text + "\n", encoding="utf-8")
    write_planned(target / "model.safetensors", [_planned(tensor, config) for tensor in tensors], {"format": "pt"})
