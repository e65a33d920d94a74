"""Give a model adapters: what they add is computed beside the model's own matrices, or merged into them for good."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import DTypeLike

from mistral_ref.config import ModelConfig, tensor_shapes
from mistral_ref.errors import CheckpointError, InputError, checked_float, short_repr
from mistral_ref.files.adapter_file import Adapter, read_adapter
from mistral_ref.steps import MATRIX_OF
from mistral_ref.weights import Lora, Matrix, Rows, Weights, interleaved_rows, with_matrices

Source = str | os.PathLike[str]
_MAX_SCALE = 1e6


def with_adapters(
    config: ModelConfig, weights: Weights, sources: Iterable[Source | tuple[Source, float]]
) -> tuple[ModelConfig, Weights]:
    """Return a configuration and weights that have adapters. The model's own matrices stay as they are.

    sources     for each adapter its path, or its path and a number by which its own scale is multiplied

    The adapters' matrices are in memory. Raises InputError, CheckpointError as `read_adapter`, and CheckpointError if
    an adapter does not fit the model.
    """
    if isinstance(sources, (str, os.PathLike)) or not isinstance(sources, Iterable):
        raise InputError(f"adapters is {short_repr(sources)}; expected a list of paths, or of (path, scale)")
    adapters = [_read(source) for source in sources]
    for adapter, _ in adapters:
        _check_fits(adapter, config)
    layers, ranks = [], []
    for number, layer in enumerate(weights.layers):
        names = {step: _matrices_of(step, f"layers.{number}", config) for step in MATRIX_OF}
        loras = {step: lora for step in names if (lora := _lora(names[step], adapters, config))}
        layers.append(replace(layer, lora=loras))
        ranks += [(f"layers.{number}.{step}", len(lora.scale_R)) for step, lora in loras.items()]
    return config.replace(adapted=tuple(ranks)), replace(weights, layers=tuple(layers))


def _read(source: object) -> tuple[Adapter, float]:
    path, scale = source if isinstance(source, tuple) and len(source) == 2 else (source, 1.0)
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"adapters holds {short_repr(source)}; expected a path, or a path and a scale")
    scale = checked_float(f"the scale of {os.fspath(path)}", scale, -_MAX_SCALE, _MAX_SCALE)
    return read_adapter(path), scale


def _check_fits(adapter: Adapter, config: ModelConfig) -> None:
    """Raise CheckpointError unless the model has each matrix that an adapter adds to, in the same shape."""
    shapes = dict(tensor_shapes(config))
    for name, (a, b, _) in adapter.pairs.items():
        shape = shapes.get(f"{name}.weight", ())
        if len(shape) != 2:  # a norm has one axis
            raise CheckpointError(
                f"{adapter.path}: {a.name} has no place in a model of {config.n_layers} layers "
                f"with{'' if config.moe else 'out'} experts"
            )
        if (b.shape[0], a.shape[1]) != shape:
            raise CheckpointError(
                f"{adapter.path}: {a.name} is for a matrix of shape {(b.shape[0], a.shape[1])}; expected {shape}, as "
                f"this model's {name}"
            )


def _matrices_of(step: str, layer: str, config: ModelConfig) -> list[str]:
    """Return the name of the matrix of a step of a layer; of a step of experts the name of each expert's matrix."""
    network, which = MATRIX_OF[step].split(".")
    if config.moe is None or not (network == "feed_forward" and which.startswith("w")):
        return [f"{layer}.{MATRIX_OF[step]}"]
    return [f"{layer}.{network}.experts.{expert}.{which}" for expert in range(config.moe.num_experts)]


def _lora(names: Sequence[str], adapters: Sequence[tuple[Adapter, float]], config: ModelConfig) -> Lora | None:
    """Return what adapters add to a matrix, or to those of all experts; None if none adds anything."""
    touching = [(adapter, scale) for adapter, scale in adapters if any(name in adapter.pairs for name in names)]
    if not touching:
        return None
    scales = []
    for adapter, scale in touching:
        alike = {(pair.a.shape[0], pair.scale) for name in names if (pair := adapter.pairs.get(name))}
        if len(alike) > 1 or not all(name in adapter.pairs for name in names):
            raise CheckpointError(
                f"{adapter.path}: adapts not all experts of {names[0].partition('.experts')[0]} alike; expected "
                "all, in one rank and with one scale"
            )
        rank, own = alike.pop()
        scales.append(np.full(rank, scale * own))
    return Lora(
        a=tuple(_joined(f"{name}.lora_a", [adapter.pairs[name].a for adapter, _ in touching], 0) for name in names),
        b=tuple(_joined(f"{name}.lora_b", [_b(adapter, name, config) for adapter, _ in touching], 1) for name in names),
        scale_R=np.concatenate(scales),
    )


def _b(adapter: Adapter, name: str, config: ModelConfig) -> Matrix:
    """Return the matrix b for a matrix of the model, its rows in Mistral's own order."""
    b = adapter.pairs[name].b
    if adapter.form.row_order == "interleaved" or not name.endswith((".wq", ".wk")):
        return b
    return replace(b, data=b.data[interleaved_rows(b.shape[0], config.head_dim)])


def _joined(name: str, matrices: Sequence[Matrix], axis: int) -> Matrix:
    """Return matrices as one, side by side along an axis. If they are of several kinds, all become float32."""
    kind = matrices[0].kind
    if any(matrix.kind != kind for matrix in matrices):
        return Matrix(name, "f32", np.concatenate([matrix.rows(slice(None), np.float32) for matrix in matrices], axis))
    return Matrix(name, kind, np.concatenate([matrix.data for matrix in matrices], axis))


def merged(config: ModelConfig, weights: Weights) -> Weights:
    """Return weights in which what adapters add is part of the matrices. Only `rows` of these matrices may be used."""
    added = {
        name: (lora, expert)
        for number, layer in enumerate(weights.layers)
        for step, lora in layer.lora.items()
        for expert, name in enumerate(_matrices_of(step, f"layers.{number}", config))
    }

    def change(matrix: Matrix) -> Matrix:
        if matrix.name not in added:
            return matrix
        order = np.arange(matrix.shape[0])
        if config.rope_row_order == "halves" and matrix.name.endswith((".wq", ".wk")):
            order = np.argsort(interleaved_rows(len(order), config.head_dim))
        lora, expert = added[matrix.name]
        whole = _Merged(matrix.name, "f32", matrix.data, base=matrix, lora=lora, expert=expert, order=order)
        # A router is small, and quantizing leaves it as it is.
        is_router = matrix.name.endswith("feed_forward.gate")
        return Matrix(matrix.name, "f32", whole.rows(slice(None), np.float32)) if is_router else whole

    plain = tuple(replace(layer, lora={}) for layer in weights.layers)
    return replace(weights, layers=with_matrices(plain, change))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Merged(Matrix):
    """A matrix with what an adapter adds to it. Only `rows` computes it: the other fields are those of `base`.

    order   for each row of `base` its number in Mistral's own order
    """

    base: Matrix
    lora: Lora
    expert: int
    order: np.ndarray

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return self.base.shape

    def rows(self, index: Rows, dtype: DTypeLike) -> np.ndarray:
        """Return the rows at `index`, with what the adapter adds to them."""
        return self.base.rows(index, dtype) + self.lora.rows(self.order[index], dtype, self.expert)
