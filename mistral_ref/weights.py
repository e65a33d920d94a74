"""Matrices as they are stored, and the tensors of a model under Mistral's own names.

A matrix stays a view of the mapped file. Only the rows that a product needs are widened to floats, when it needs them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike

from mistral_kernels.layout import rows_of_tiles, to_tiles
from mistral_ref.config import ModelConfig
from mistral_ref.errors import Progress

Kind = Literal["f32", "f16", "bf16", "fp8", "int8", "int4"]
Rows = slice | np.ndarray

FP8_BLOCK = 128  # published fp8 checkpoints scale squares of 128 x 128 weights, or the whole matrix


@cache
def e4m3_values() -> np.ndarray:
    """Return the 256 values of fp8 e4m3 ("fn": no infinities, NaN at 0x7f and 0xff) as float32.

    One sign bit, four of exponent e (bias 7), three of mantissa m: (1 + m/8) 2^(e-7), and m/8 2^-6 where e is 0.

    >>> e4m3_values()[[0x38, 0x7E, 0x01, 0xB8]].tolist()
    [1.0, 448.0, 0.001953125, -1.0]
    """
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    value[code & 127 == 127] = np.nan
    return np.where(code < 128, value, -value).astype(np.float32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Return float32 numbers rounded to the nearest bf16, ties to even, as uint16; NaN stays NaN.

    >>> [hex(bits) for bits in bf16_bits(np.float32([1.0, -2.0, 1.0 + 2**-8]))]
    ['0x3f80', '0xc000', '0x3f80']
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    nearest = bits + (0x7FFF + (bits >> 16 & 1))
    return (np.where(np.isnan(values), bits | 0x400000, nearest) >> 16).astype(np.uint16)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """Return the float32 numbers whose upper halves are `bits`, uint16."""
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)


@dataclass(frozen=True, eq=False)
class Matrix:
    """A matrix (O, I) of O outputs and I inputs, as stored.

    data    (O, I), read-only: float32, float16, uint16 (bf16: the upper half of a float32) or uint8 (fp8 e4m3)
    scale   fp8 only: float32, (1, 1) for the whole matrix or (ceil(O/128), ceil(I/128)); weight = value * scale
    """

    name: str
    kind: Kind
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
        """How many weights it has."""
        return self.shape[0] * self.shape[1]

    @cached_property
    def nbytes(self) -> int:
        """Bytes in the file, those of the scale included."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    @cached_property
    def as_bytes(self) -> np.ndarray:
        """`data` as it lies in memory, row after row, as one read-only array of bytes: what compiled kernels take."""
        flat = np.ascontiguousarray(self.data).view(np.uint8).reshape(-1)
        flat.flags.writeable = False
        return flat

    def rows(self, index: Rows, dtype: DTypeLike) -> np.ndarray:
        """Return the rows at `index` (a slice or integers) as an aligned float array (R, I) of `dtype`.

        Rows that are stored as `dtype` already are returned as they lie in the file, without a copy.
        """
        stored = self.data[index]
        if self.kind == "bf16":
            stored = bf16_values(stored)
        elif self.kind == "fp8":
            return e4m3_values().astype(dtype)[stored] * self._scale_of(index).astype(dtype)
        return np.require(stored, dtype, "A")

    def _scale_of(self, index: Rows) -> np.ndarray:
        """Return the scale of each weight in the rows at `index`, broadcastable to (R, I)."""
        assert self.scale is not None
        if self.scale.shape == (1, 1):
            return self.scale
        n_out, n_in = self.shape
        return self.scale[np.ix_(np.arange(n_out)[index] // FP8_BLOCK, np.arange(n_in) // FP8_BLOCK)]


@dataclass(frozen=True, eq=False)
class TiledMatrix(Matrix):
    """A matrix whose rows lie side by side in tiles of eight, as mistral_kernels.layout describes.

    data    (ceil(O/8), I, 8); rows beyond O are 0
    n_out   O
    """

    n_out: int = 0

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(O, I)"""
        return self.n_out, self.data.shape[1]

    def rows(self, index: Rows, dtype: DTypeLike) -> np.ndarray:
        rows = rows_of_tiles(self.data, np.arange(self.n_out)[index])
        return Matrix(self.name, self.kind, rows).rows(slice(None), dtype)


def tiled(matrix: Matrix) -> Matrix:
    """Return a copy of a matrix in tile order, or itself if it has not 16 bits a weight, or rows of an odd length."""
    if matrix.kind not in ("bf16", "f16") or matrix.shape[1] % 2:
        return matrix
    return TiledMatrix(matrix.name, matrix.kind, to_tiles(matrix.data), n_out=matrix.shape[0])


@dataclass(frozen=True, eq=False)
class FeedForward:
    """w1 (F, D) the gate, w2 (D, F) down, w3 (F, D) up."""

    w1: Matrix
    w2: Matrix
    w3: Matrix


@dataclass(frozen=True, eq=False)
class ExpertFeedForward:
    """gate (E, D) the router, and E feed-forward networks."""

    gate: Matrix
    experts: tuple[FeedForward, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """One block: wq (H*K, D), wk and wv (G*K, D), wo (D, H*K), the two norms' weights (D,) float32, and the rest."""

    attention_norm: np.ndarray
    wq: Matrix
    wk: Matrix
    wv: Matrix
    wo: Matrix
    ffn_norm: np.ndarray
    feed_forward: FeedForward | ExpertFeedForward


@dataclass(frozen=True, eq=False)
class Weights:
    """tok_embeddings (V, D), L blocks, norm (D,), output (V, D); tied models have one matrix for both ends."""

    tok_embeddings: Matrix
    layers: tuple[Layer, ...]
    norm: np.ndarray
    output: Matrix


def weights_of(tensors: Mapping[str, Any], config: ModelConfig) -> Weights:
    """Return the weights that these tensors make: for each name of config.tensor_shapes a Matrix, or a norm's (D,)."""

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
    """Return every matrix of weights, a layer, a network or a tuple of them; one that stands in two places once."""
    return list(dict.fromkeys(_every_matrix(part)))


def _every_matrix(part: Any) -> Iterator[Matrix]:
    if isinstance(part, Matrix):
        yield part
    elif isinstance(part, tuple):
        for one in part:
            yield from _every_matrix(one)
    elif dataclasses.is_dataclass(part):
        for field in dataclasses.fields(part):
            yield from _every_matrix(getattr(part, field.name))


def with_matrices(part: Any, change: Callable[[Matrix], Matrix]) -> Any:
    """Return weights, a layer, a network or a tuple of them with every matrix replaced by what `change` makes of it."""
    if isinstance(part, Matrix):
        return change(part)
    if isinstance(part, tuple):
        return tuple(with_matrices(one, change) for one in part)
    if not dataclasses.is_dataclass(part):
        return part
    fields = {field.name: with_matrices(getattr(part, field.name), change) for field in dataclasses.fields(part)}
    return dataclasses.replace(part, **fields)  # type: ignore[type-var]


def repacked(weights: Weights, progress: Progress | None = None) -> Weights:
    """Return weights with all matrices that tokens are multiplied with in tile order, where that is possible.

    `progress(done, total)` is called before each matrix and at the end.
    """
    multiplied = (weights.layers, weights.output)
    total, done = len(matrices(multiplied)), itertools.count()
    report = progress or (lambda done, total: None)

    def repack(matrix: Matrix) -> Matrix:
        report(next(done), total)
        return tiled(matrix)

    layers, output = with_matrices(multiplied, repack)
    report(total, total)
    return dataclasses.replace(weights, layers=layers, output=output)
