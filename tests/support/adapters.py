"""Adapters of random numbers, written as PEFT, mlx-lm and mistral-finetune write them. None of the three is needed."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from support.checkpoints import rows_in_halves, to_bfloat16, write_tensor_file

from mistral_ref.config import ModelConfig, tensor_shapes
from mistral_ref.files.adapters import with_adapters
from mistral_ref.files.tensor_names import huggingface_name
from mistral_ref.model import Model


class Delta(NamedTuple):
    """What an adapter adds to one matrix: scale b · a, the rows of b in Mistral's own order. All float32."""

    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def whole(self) -> np.ndarray:
        """scale b · a in float64."""
        return self.scale * (self.b.astype(np.float64) @ self.a.astype(np.float64))


Deltas = dict[str, Delta]  # by Mistral's own name of the matrix, without ".weight"


def adaptable(config: ModelConfig) -> list[str]:
    """Return the names of the matrices of all layers."""
    every = (name.removesuffix(".weight") for name, shape in tensor_shapes(config) if len(shape) == 2)
    return [name for name in every if name.startswith("layers.")]


def draw_deltas(
    config: ModelConfig, names: Iterable[str] | None = None, *, rank: int = 2, scale: float = 0.5, seed: int = 0
) -> Deltas:
    """Return random deltas for these matrices, by default all; about as large as the weights, and exact in 16 bits."""
    random, shapes = np.random.RandomState(seed), dict(tensor_shapes(config))

    def draw(*shape: int) -> np.ndarray:
        return random.randint(-128, 129, shape).astype(np.float32) / np.float32(128)

    deltas = {}
    for name in adaptable(config) if names is None else names:
        n_out, n_in = shapes[f"{name}.weight"]
        deltas[name] = Delta(draw(rank, n_in) / np.float32(8), draw(n_out, rank), scale)
    return deltas


def in_halves(config: ModelConfig, name: str, matrix: np.ndarray) -> np.ndarray:
    """Return a matrix, or B of an adapter, as Hugging Face orders its rows: those of wq and wk move."""
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.rpartition(".")[2])
    return matrix if heads is None else rows_in_halves(matrix, heads)


def stored(values: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    """Return values as a file holds them in "F32", "F16" or "BF16"."""
    values = np.ascontiguousarray(values, np.float32)
    return dtype, {"F32": lambda: values, "F16": lambda: values.astype("<f2"), "BF16": lambda: to_bfloat16(values)}[
        dtype
    ]()


def _module(name: str) -> str:
    return huggingface_name(f"{name}.weight").removesuffix(".weight")


def _write(
    directory: Path, file: str, tensors: Mapping[str, np.ndarray], dtype: str, about: Any, about_file: str
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    write_tensor_file(directory / file, {name: stored(values, dtype) for name, values in tensors.items()})
    if about is not None:
        (directory / about_file).write_text(json.dumps(about))
    return directory


def write_peft(directory: Path, config: ModelConfig, deltas: Deltas, dtype: str = "F32", **fields: Any) -> Path:
    """Write deltas of one rank and scale as PEFT does, with these fields in its configuration. Return the directory."""
    tensors = {}
    for name, (a, b, _) in deltas.items():
        tensors[f"base_model.model.{_module(name)}.lora_A.weight"] = a
        tensors[f"base_model.model.{_module(name)}.lora_B.weight"] = in_halves(config, name, b)
    rank, scale = next(((len(a), scale) for a, _, scale in deltas.values()), (1, 1.0))
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "target_modules": ["q_proj"], "bias": "none"}
    about |= {"use_dora": False, "modules_to_save": None, "init_lora_weights": True, "rank_pattern": {}, **fields}
    return _write(directory, "adapter_model.safetensors", tensors, dtype, about, "adapter_config.json")


def write_mlx(directory: Path, config: ModelConfig, deltas: Deltas, dtype: str = "F32", **fields: Any) -> Path:
    """Write deltas of one rank and scale as mlx-lm does: transposed, and all experts of a layer in one tensor."""
    tensors: dict[str, np.ndarray] = {}
    experts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    theirs = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for name, (a, b, _) in deltas.items():
        if ".experts." in name:
            layer, which = name.split(".")[1], theirs[name.rpartition(".")[2]]
            experts.setdefault(f"model.layers.{layer}.block_sparse_moe.switch_mlp.{which}", []).append((a, b))
        else:
            tensors[f"{_module(name)}.lora_a"] = a.T
            tensors[f"{_module(name)}.lora_b"] = in_halves(config, name, b).T
    for module, pairs in experts.items():
        tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"] = map(np.stack, zip(*pairs, strict=True))
    rank, scale = next(((len(a), scale) for a, _, scale in deltas.values()), (1, 1.0))
    about = {"fine_tune_type": "lora", "num_layers": config.n_layers}
    about |= {"lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0}, **fields}
    return _write(directory, "adapters.safetensors", tensors, dtype, about, "adapter_config.json")


def write_finetune(directory: Path, config: ModelConfig, deltas: Deltas, dtype: str = "F32", **fields: Any) -> Path:
    """Write deltas of one rank and scale as mistral-finetune does; `fields` are added to lora in params.json."""
    tensors = {}
    for name, (a, b, _) in deltas.items():
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    rank, scale = next(((len(a), scale) for a, _, scale in deltas.values()), (1, 1.0))
    about = {"dim": config.dim, "lora": {"enable": True, "rank": rank, "dropout": 0.0, "scaling": scale, **fields}}
    return _write(directory, "lora.safetensors", tensors, dtype, about, "params.json")


WRITERS: dict[str, Callable[..., Path]] = {"PEFT": write_peft, "mlx-lm": write_mlx, "mistral-finetune": write_finetune}


def adapted(model: Model, *, rank: int = 3) -> Model:
    """Return a model of the same weights and operations, with a random adapter on every matrix of its layers."""
    with tempfile.TemporaryDirectory() as directory:
        path = write_finetune(Path(directory), model.config, draw_deltas(model.config, rank=rank))
        return Model(*with_adapters(model.config, model.weights, [path]), model.ops, tokenizer=model.tokenizer)
