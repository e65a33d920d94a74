"""Matrices in the number format of their file, and all weights of a model under Mistral's own names.

A matrix stays a view of the mapped file. A product widens only the rows that it is working on to floats.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from mistral_ref.config import ModelConfig
from mistral_ref.errors import CheckpointError
from mistral_ref.files.mapped_file import MappedFile

Kind = Literal["f32", "f16", "bf16", "fp8", "int8", "int4"]
# The packed types of GGUF files (block_matrix.py).
BlockKind = Literal["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs"]
Rows = slice | np.ndarray

_HASHED_BYTES = 256  # of every matrix
FP8_BLOCK = 128  # in published fp8 checkpoints a scale is for a square of 128 x 128 weights, or for the whole matrix


@cache
def e4m3_values() -> np.ndarray:
    """Return the values of the 256 codes of fp8 e4m3 as float32 (256,).

    A code has one sign bit, four bits of exponent e (bias 7) and three bits of mantissa m. It stands for
    (1 + m/8) 2^(e-7), or for m/8 2^-6 if e is 0. This is the variant "fn": it has no infinities, and 0x7f and 0xff are
    NaN.

    >>> e4m3_values()[[0x38, 0x7E, 0x01, 0xB8]].tolist()
    [1.0, 448.0, 0.001953125, -1.0]
    """
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    value[code & 127 == 127] = np.nan
    return np.where(code < 128, value, -value).astype(np.float32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Return the bits (uint16) of float32 numbers rounded to the nearest bf16, ties to even. NaN stays NaN.

    >>> [hex(bits) for bits in bf16_bits(np.float32([1.0, -2.0, 1.0 + 2**-8]))]
    ['0x3f80', '0xc000', '0x3f80']
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = bits + (0x7FFF + (bits >> 16 & 1))
    return (np.where(np.isnan(values), bits | 0x400000, nearest) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """Return bf16 numbers as float32. `bits` (uint16) are the upper halves of their float32 bits."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


def flat_bytes(array: np.ndarray) -> np.ndarray:
    """Return the bytes of an array in the order of memory, as one flat read-only array; a copy only if it has gaps."""
    flat = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    flat.flags.writeable = False
    return flat


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix (O, I) of O outputs and I inputs, in the number format of its file.

    name    Mistral's own name, without ".weight"
    kind    the number format
    data    (O, I), read-only: float32, float16, uint16 (bf16: the upper half of a float32) or uint8 (fp8 e4m3)
    scale   fp8 only: float32, (1, 1) for the whole matrix or (ceil(O/128), ceil(I/128)); weight = value * scale
    """

    name: str
    kind: Kind | BlockKind
    data: np.ndarray
    scale: np.ndarray | None = None

    def __repr__(self) -> str:
        return f"<Matrix {self.name} {self.shape} {self.kind}>"

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return self.data.shape

    @cached_property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @cached_property
    def group_size(self) -> int | None:
        """How many neighbours in a row share a scale, if the weights are whole numbers with scales; None for floats."""
        return None

    @cached_property
    def nbytes(self) -> int:
        """Number of bytes in the file, with the bytes of the scale."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @cached_property
    def as_bytes(self) -> np.ndarray:
        """The bytes of `data`, row after row, as one flat read-only array. The compiled kernels take this."""
        return flat_bytes(self.data)

    @cached_property
    def factors(self) -> dict[Any, Any]:
        """What kernels take in place of this matrix, by how its inputs are rounded; `kernel_choice.factor` fills it."""
        return {}

    def rows(self, index: Rows, dtype: DTypeLike) -> np.ndarray:
        """Return the R rows at `index` (a slice or integers) as an aligned float array (R, I) of `dtype`.

        A slice of rows that are stored as `dtype` is returned without a copy if it is aligned.
        """
        stored = self.data[index]
        if self.kind == "bf16":
            stored = bf16_values(stored)
        elif self.kind == "fp8":
            return e4m3_values().astype(dtype)[stored] * self._scale_of(index).astype(dtype)
        return np.require(stored, dtype, "A")

    def _scale_of(self, index: Rows) -> np.ndarray:
        """Return the scale of each weight in the R rows at `index`: (R, I), or (1, 1) for the whole matrix."""
        assert self.scale is not None
        if self.scale.shape == (1, 1):
            return self.scale
        n_out, n_in = self.shape
        return self.scale[np.ix_(np.arange(n_out)[index] // FP8_BLOCK, np.arange(n_in) // FP8_BLOCK)]


@dataclass(frozen=True, eq=False)
class Lora:
    """What adapters add to a product y = x · Wᵀ: scale (x · aᵀ) · bᵀ (LoRA, arXiv:2106.09685).

    a, b        (R, I) and (O, R), where R is the rank: a matrix each, or one for each expert. The rows of b are in
                Mistral's own order, whatever the order of the model's rows is
    scale_R     float64 (R,); the ranks of several adapters lie one after the other
    """

    a: tuple[Matrix, ...]
    b: tuple[Matrix, ...]
    scale_R: np.ndarray

    def rows(self, index: Rows, dtype: DTypeLike, expert: int = 0) -> np.ndarray:
        """Return what is added to the rows of W at `index`: scale b · a, as a float array of `dtype`."""
        b_OR = self.b[expert].rows(index, dtype) * self.scale_R.astype(dtype)
        product: np.ndarray = b_OR @ self.a[expert].rows(slice(None), dtype)
        return product


@dataclass(frozen=True, eq=False)
class FeedForward:
    """A feed-forward network: w1 (F, D) makes the gate, w3 (F, D) makes up, w2 (D, F) brings the result back to D."""

    w1: Matrix
    w2: Matrix
    w3: Matrix


@dataclass(frozen=True, eq=False)
class ExpertFeedForward:
    """A mixture of experts: the router `gate` (E, D), and E feed-forward networks."""

    gate: Matrix
    experts: tuple[FeedForward, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """The weights of one block.

    attention_norm, ffn_norm    weights of the norms, float32 (D,)
    wq              (H*K, D)
    wk, wv          (G*K, D)
    wo              (D, H*K)
    feed_forward    one feed-forward network, or a mixture of experts
    lora            what adapters add to products, by the name of the product's step: "q", "gate", ...
    """

    attention_norm: np.ndarray
    wq: Matrix
    wk: Matrix
    wv: Matrix
    wo: Matrix
    ffn_norm: np.ndarray
    feed_forward: FeedForward | ExpertFeedForward
    lora: Mapping[str, Lora] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Weights:
    """All weights of a model.

    tok_embeddings  (V, D)
    layers          the L blocks
    norm            weight of the last norm, float32 (D,)
    output          (V, D); with tied embeddings it is the same object as tok_embeddings
    files           the mapped files that matrices are views of
    """

    tok_embeddings: Matrix
    layers: tuple[Layer, ...]
    norm: np.ndarray
    output: Matrix
    files: tuple[MappedFile, ...] = ()

    def check_files(self) -> None:
        """Raise CheckpointError if a file with weights has become shorter: the system ends a process that reads on."""
        for file in self.files:
            if file.is_cut and any(file.holds(matrix.data) for matrix in matrices(self)):
                raise CheckpointError(
                    f"{file.path}: it has become shorter since it was opened; expected {len(file.bytes)} bytes"
                )

    def path_of(self, matrix: Matrix) -> Path | None:
        """Return the path of the file that a matrix is a view of; None if it is in memory."""
        return next((file.path for file in self.files if file.holds(matrix.data)), None)


def interleaved_rows(n_rows: int, head_dim: int) -> np.ndarray:
    """Return for each row of wq or wk in Mistral's own order its number in Hugging Face's order.

    >>> interleaved_rows(8, head_dim=4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.arange(n_rows).reshape(-1, 2, head_dim // 2).swapaxes(1, 2).reshape(-1)


def weights_of(tensors: Mapping[str, Any], config: ModelConfig) -> Weights:
    """Return the Weights of a model. `tensors` maps each name of `tensor_shapes` to a Matrix or a norm's (D,)."""

    def network(name: str) -> FeedForward:
        return FeedForward(*(tensors[f"{name}.{which}.weight"] for which in ("w1", "w2", "w3")))

    def feed_forward(name: str) -> FeedForward | ExpertFeedForward:
        if config.moe is None:
            return network(name)
        experts = (network(f"{name}.experts.{expert}") for expert in range(config.moe.num_experts))
        return ExpertFeedForward(tensors[f"{name}.gate.weight"], tuple(experts))

    def layer(name: str) -> Layer:
        return Layer(
            attention_norm=tensors[f"{name}.attention_norm.weight"],
            wq=tensors[f"{name}.attention.wq.weight"],
            wk=tensors[f"{name}.attention.wk.weight"],
            wv=tensors[f"{name}.attention.wv.weight"],
            wo=tensors[f"{name}.attention.wo.weight"],
            ffn_norm=tensors[f"{name}.ffn_norm.weight"],
            feed_forward=feed_forward(f"{name}.feed_forward"),
        )

    tok_embeddings = tensors["tok_embeddings.weight"]
    return Weights(
        tok_embeddings=tok_embeddings,
        layers=tuple(layer(f"layers.{number}") for number in range(config.n_layers)),
        norm=tensors["norm.weight"],
        output=tok_embeddings if config.tied_embeddings else tensors["output.weight"],
    )


def matrices(part: Any) -> list[Matrix]:
    """Return every Matrix in Weights, in a layer, in a network or in a tuple of them; a shared matrix is there once.

    Those of adapters are among them.
    """
    return list(dict.fromkeys(_every_matrix(part)))


def _every_matrix(part: Any) -> Iterator[Matrix]:
    if isinstance(part, Matrix):
        yield part
    elif isinstance(part, tuple):
        for one in part:
            yield from _every_matrix(one)
    elif isinstance(part, Mapping):
        yield from _every_matrix(tuple(part.values()))
    elif dataclasses.is_dataclass(part):
        for each in dataclasses.fields(part):
            yield from _every_matrix(getattr(part, each.name))


def fingerprint(weights: Weights) -> str:
    """Return a hash of some bytes of every matrix and of every norm, in hexadecimal: other weights have another one."""
    digest = hashlib.sha256()
    for matrix in matrices(weights):
        numbers = matrix.as_bytes.reshape(-1)
        digest.update(numbers[numbers.size // 2 :][:_HASHED_BYTES].tobytes())
    for norm_D in norms(weights).values():
        digest.update(norm_D.tobytes())
    return digest.hexdigest()[:16]


def norms(weights: Weights) -> dict[str, np.ndarray]:
    """Return the weight of each norm by its name in a file."""
    found = {"norm.weight": weights.norm}
    for number, layer in enumerate(weights.layers):
        found[f"layers.{number}.attention_norm.weight"] = layer.attention_norm
        found[f"layers.{number}.ffn_norm.weight"] = layer.ffn_norm
    return found


def with_matrices(part: Any, change: Callable[[Matrix], Matrix]) -> Any:
    """Return a copy of Weights, a layer, a network or a tuple of them; `change(matrix)` replaces each Matrix."""
    if isinstance(part, Matrix):
        return change(part)
    if isinstance(part, tuple):
        return tuple(with_matrices(one, change) for one in part)
    if isinstance(part, Mapping):
        return {name: with_matrices(one, change) for name, one in part.items()}
    if not dataclasses.is_dataclass(part):
        return part
    fields = {each.name: with_matrices(getattr(part, each.name), change) for each in dataclasses.fields(part)}
    return dataclasses.replace(part, **fields)  # type: ignore[type-var]
