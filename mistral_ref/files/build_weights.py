"""Make the weights of a model from a checkpoint's tensors: every tensor is checked, and every tensor is used."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mistral_ref.block_matrix import BLOCK_TYPES, BlockMatrix
from mistral_ref.config import ModelConfig, tensor_shapes
from mistral_ref.errors import CheckpointError, short_repr
from mistral_ref.files.checkpoint import Checkpoint, gguf_checkpoint, open_checkpoint
from mistral_ref.files.config_files import read_config
from mistral_ref.files.gguf import GGUF, open_gguf
from mistral_ref.files.gguf_config import gguf_config
from mistral_ref.files.paths import checked_model, gguf_of
from mistral_ref.files.quantized_format import bits_of, kinds_of, quantized_tensors, tiled_tensors
from mistral_ref.files.tensor_file import BLOCKS, Tensor, TensorSpec
from mistral_ref.files.tensor_names import gguf_name, huggingface_name
from mistral_ref.quantized_matrix import QuantizedMatrix
from mistral_ref.tiled_matrix import TiledMatrix
from mistral_ref.weights import FP8_BLOCK, Kind, Matrix, Weights, weights_of


def open_model(path: str | os.PathLike[str]) -> tuple[ModelConfig, Weights]:
    """Return the configuration and the weights of the model in a directory or a GGUF file.

    The tensors' names decide rope_row_order; the output matrix, or its absence, decides tied_embeddings. Raises
    InputError, ConfigError or CheckpointError.
    """
    path = checked_model(path)
    return model_in(path, open_gguf_of(path))


def open_gguf_of(path: Path) -> GGUF | None:
    """Return the GGUF file with the configuration and the tokenizer of the model at a path; None if it has none."""
    about = gguf_of(path)
    return None if about is None else open_gguf(about)


def checkpoint_of(path: Path, gguf: GGUF | None) -> Checkpoint:
    """Return the tensors of the model at a path; `gguf` is what `open_gguf_of` returns, and need not hold them."""
    return gguf_checkpoint(gguf) if gguf is not None and gguf.path == path else open_checkpoint(path)


def model_in(path: Path, gguf: GGUF | None) -> tuple[ModelConfig, Weights]:
    """Return the configuration and the weights of the model at a path; `gguf` is what `open_gguf_of` returns."""
    config = read_config(path) if gguf is None else gguf_config(gguf)
    checkpoint = checkpoint_of(path, gguf)
    config = config.replace(rope_row_order=checkpoint.row_order)
    weights = build_weights(checkpoint, config)
    return config.replace(tied_embeddings=weights.output is weights.tok_embeddings), weights


def build_weights(checkpoint: Checkpoint, config: ModelConfig) -> Weights:
    """Return the weights of a model, made of a checkpoint's tensors.

    If the files hold an output matrix, it is used. If they hold none, the embedding takes its place, but only if the
    configuration has tied_embeddings. Without this condition nobody would notice that the file with the output matrix
    is lost. Raises CheckpointError if a tensor is missing, is left over, or has another dtype or shape than expected.
    """
    config = config.replace(tied_embeddings=config.tied_embeddings and "output.weight" not in checkpoint.tensors)
    untaken = _Untaken(checkpoint)
    taken: dict[str, Matrix | np.ndarray] = {}
    for name, shape in tensor_shapes(config):
        if name not in taken:  # one call of `take` takes all fused experts of a layer
            taken |= untaken.take(name, shape, config)
    if missing := [name for name in untaken.kinds if f"{name}.weight" not in taken]:
        raise CheckpointError(f"{checkpoint.path}: {missing[0]}.weight is missing, which the metadata speak of")
    for tensor in untaken.tensors.values():
        raise CheckpointError(
            f"{tensor.path}: {short_repr(tensor.name)} has no place in a model of {config.n_layers} layers"
            f" with{'' if config.moe else 'out'} experts"
        )
    return dataclasses.replace(weights_of(taken, config), files=checkpoint.files)


class _Untaken:
    """The tensors of a checkpoint that are not used yet. A tensor that is taken is checked (dtype, shape) and removed.

    Two terms: fused experts are all experts of a layer in two tensors. A unit is a power of two; all scales of a
    quantized matrix are multiplied by the matrix's unit.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors = dict(checkpoint.tensors)
        path = checkpoint.files[0].path if len(checkpoint.files) == 1 else checkpoint.path
        self.bits, self.group_size = bits_of(checkpoint.metadata, path)
        self.units = self._units() if self.bits else {}
        self.kinds = kinds_of(checkpoint.metadata, path)

    def take(self, name: str, shape: tuple[int, ...], config: ModelConfig) -> dict[str, Matrix | np.ndarray]:
        """Take the tensor of a name of `tensor_shapes`. If experts are fused, take all experts of the layer with it."""
        stem = name.removesuffix(".weight")
        experts, _, of_expert = stem.partition(".experts.")
        if of_expert and f"{experts}.experts.w1_w3" in self.tensors:
            return dict(self._fused_experts(f"{experts}.experts", config))
        if len(shape) == 1:
            return {name: self._vector(stem, shape)}
        return {name: self._matrix(stem, *shape)}

    def _tensor(self, name: str, shape: tuple[int, ...], said_by: str = "the configuration") -> Tensor:
        tensor = self.tensors.pop(name, None)
        if tensor is None:
            raise CheckpointError(f"{self.checkpoint.path}: {self._missing(name, shape)}")
        if tensor.shape != shape:
            found = short_repr(tensor.shape)
            raise CheckpointError(f"{tensor.path}: {tensor.name} has shape {found}; expected {shape}, as in {said_by}")
        return tensor

    def _missing(self, name: str, shape: tuple[int, ...]) -> str:
        if name == "output.weight":
            return "output.weight (lm_head.weight) is missing, and the configuration does not have tied embeddings"
        spelled = {"huggingface": huggingface_name, "gguf": gguf_name}.get(self.checkpoint.layout, str)
        return f"{spelled(name)} is missing; expected shape {shape}"

    def _floats(self, name: str, shape: tuple[int, ...]) -> tuple[Kind, np.ndarray]:
        tensor = self._tensor(name, shape)
        if tensor.dtype == "F8_E4M3":
            raise CheckpointError(f"{tensor.path}: {tensor.name} is fp8 without its scale; expected F32, F16 or BF16")
        return tensor.mapped()

    def _vector(self, stem: str, shape: tuple[int, ...]) -> np.ndarray:
        """Take a norm's weight, widened to float32."""
        kind, data = self._floats(f"{stem}.weight", shape)
        return Matrix(stem, kind, data[np.newaxis]).rows(slice(None), np.float32)[0]

    def _matrix(self, stem: str, n_out: int, n_in: int) -> Matrix:
        """Take a matrix: with its scale if it is fp8, with scales and unit if it is quantized."""
        if stem in self.kinds:
            return self._tiled(stem, n_out, n_in)
        if f"{stem}.scales" in self.tensors:
            return self._quantized(stem, n_out, n_in)
        tensor = self._tensor(f"{stem}.weight", (n_out, n_in))
        if tensor.dtype in BLOCKS:
            return BlockMatrix(stem, BLOCKS[tensor.dtype], tensor.blocks())
        kind, data = tensor.mapped()
        scale = self.tensors.pop(f"{stem}.qscale_weight", None)
        if (scale is None) == (kind == "fp8"):
            problem = "fp8 without its scale" if scale is None else f"{tensor.dtype} with a scale; only fp8 has one"
            raise CheckpointError(f"{tensor.path}: {tensor.name} is {problem}")
        return Matrix(stem, kind, data, None if scale is None else _fp8_scale(scale, n_out, n_in))

    def _quantized(self, stem: str, n_out: int, n_in: int) -> QuantizedMatrix:
        """Take a quantized matrix."""
        if stem not in self.bits:
            path = self.tensors[f"{stem}.scales"].path
            raise CheckpointError(f"{path}: its metadata do not give the bits of {stem}; expected 8 or 4")
        bits = self.bits[stem]
        codes, scales = self._bytes(stem, quantized_tensors(n_out, n_in, bits, self.group_size))
        kind: Kind = "int8" if bits == 8 else "int4"
        return QuantizedMatrix(stem, kind, codes, scales=scales, unit=self.units[stem], n_out=n_out, n_in=n_in)

    def _tiled(self, stem: str, n_out: int, n_in: int) -> TiledMatrix:
        """Take a matrix of a packed type in tile order."""
        kind = self.kinds[stem]
        if n_in % BLOCK_TYPES[kind].weights:
            raise CheckpointError(
                f"{self.checkpoint.path}: {stem} has rows of {n_in} weights in {kind}; "
                f"expected multiples of {BLOCK_TYPES[kind].weights}"
            )
        codes, scales = self._bytes(stem, tiled_tensors(kind, n_out, n_in))
        return TiledMatrix(stem, kind, codes, scales=scales, n_out=n_out)

    def _bytes(self, stem: str, specs: Mapping[str, TensorSpec]) -> list[np.ndarray]:
        """Take tensors of bytes, given by the endings of their names."""
        found = []
        for ending, spec in specs.items():
            tensor = self._tensor(f"{stem}.{ending}", spec.shape)
            if tensor.dtype != spec.dtype:
                raise CheckpointError(f"{tensor.path}: {tensor.name} is {tensor.dtype}; expected {spec.dtype}")
            found.append(tensor.raw.reshape(tensor.shape))
        return found

    def _units(self) -> dict[str, np.float32]:
        """Take the units of all quantized matrices."""
        tensor = self._tensor("units", (len(self.bits),), said_by="the metadata")
        if tensor.dtype != "F32":
            raise CheckpointError(f"{tensor.path}: units is {tensor.dtype}; expected F32")
        units = tensor.mapped()[1]
        for name, unit in zip(self.bits, units.tolist(), strict=True):
            if not (math.isfinite(unit) and unit > 0 and math.frexp(unit)[0] == 0.5):
                raise CheckpointError(f"{tensor.path}: units has {unit} for {name}; expected powers of two")
        return dict(zip(self.bits, map(np.float32, units), strict=True))

    def _fused_experts(self, stem: str, config: ModelConfig) -> Iterator[tuple[str, Matrix]]:
        """Take all experts of a layer from two tensors: w1_w3 (E, 2F, D) and w2 (E, D, F). w1's rows precede w3's."""
        assert config.moe is not None
        n_experts, dim, hidden = config.moe.num_experts, config.dim, config.hidden_dim
        kind, w1_w3 = self._floats(f"{stem}.w1_w3", (n_experts, 2 * hidden, dim))
        kind_w2, w2 = self._floats(f"{stem}.w2", (n_experts, dim, hidden))
        for expert in range(n_experts):
            name = f"{stem}.{expert}"
            yield f"{name}.w1.weight", Matrix(f"{name}.w1", kind, w1_w3[expert, :hidden])
            yield f"{name}.w2.weight", Matrix(f"{name}.w2", kind_w2, w2[expert])
            yield f"{name}.w3.weight", Matrix(f"{name}.w3", kind, w1_w3[expert, hidden:])


def _fp8_scale(tensor: Tensor, n_out: int, n_in: int) -> np.ndarray:
    """Return the scale of an fp8 matrix as float32 (1, 1) or (ceil(n_out/128), ceil(n_in/128))."""
    blocks = (-(-n_out // FP8_BLOCK), -(-n_in // FP8_BLOCK))
    if tensor.dtype == "F8_E4M3" or tensor.shape not in ((), (1,), (1, 1), blocks):
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} is {tensor.dtype} of shape {short_repr(tensor.shape)}; "
            f"expected one float, or {blocks} of them"
        )
    kind, data = tensor.mapped()
    shape = (1, 1) if data.size == 1 else blocks
    return Matrix(tensor.name, kind, data.reshape(shape)).rows(slice(None), np.float32)
