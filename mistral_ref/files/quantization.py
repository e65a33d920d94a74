"""Which matrices of a model are rounded to 8 or 4 bits, and how they are in memory.

The matrices of the layers are rounded, except the routers: a router is small, and an error in it sends tokens to other
experts. The embedding and the head are rounded if their options say so. rounding.py rounds one matrix;
quantized_copy.py writes a whole model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mistral_ref.errors import CheckpointError, InputError, Progress, short_repr
from mistral_ref.files.quantized_format import quantized_tensors
from mistral_ref.files.rounding import quantized
from mistral_ref.quantized_matrix import BITS, GROUP_SIZE, GROUP_SIZES, QuantizedMatrix
from mistral_ref.weights import Matrix, Weights, matrices, with_matrices


def checked_bits(name: str, bits: int) -> int:
    """Return `bits` if it is 8 or 4; otherwise raise InputError."""
    if type(bits) is not int or bits not in BITS:
        raise InputError(f"{name} is {short_repr(bits)}; expected 8 or 4")
    return bits


def checked_group_size(group_size: int) -> int:
    """Return `group_size` if it is one of GROUP_SIZES; otherwise raise InputError."""
    if type(group_size) is not int or group_size not in GROUP_SIZES:
        raise InputError(f"group_size is {short_repr(group_size)}; expected one of {', '.join(map(str, GROUP_SIZES))}")
    return group_size


@dataclass(frozen=True)
class Scheme:
    """How many bits each matrix gets.

    bits        8 or 4, for the matrices of the layers
    group_size  how many neighbouring weights share a scale and a zero: one of GROUP_SIZES
    embedding, head     8 or 4, or None: not rounded
    """

    bits: int
    group_size: int = GROUP_SIZE
    embedding: int | None = 8
    head: int | None = 8

    def __post_init__(self) -> None:
        checked_bits("bits", self.bits)
        checked_group_size(self.group_size)
        for name in ("embedding", "head"):
            if getattr(self, name) is not None:
                checked_bits(name, getattr(self, name))

    def bits_of(self, name: str) -> int | None:
        """Return the bits that the matrix of this name gets; None if it is not rounded."""
        if name.endswith("feed_forward.gate"):
            return None
        return {"tok_embeddings": self.embedding, "output": self.head}.get(name, self.bits)

    def check(self, weights: Weights) -> None:
        """Raise InputError if these weights cannot be rounded by this scheme."""
        if weights.output is weights.tok_embeddings and self.embedding != self.head:
            raise InputError(
                f"embedding is {self.embedding} and head is {self.head}, but this model has one matrix for both; "
                "expected the same for both"
            )
        if done := [matrix for matrix in matrices(weights) if matrix.group_size is not None]:
            where = weights.path_of(done[0])
            raise InputError(
                f"{'' if where is None else f'{where}: '}{done[0].name} is quantized already; expected float weights"
            )


def rounded_bytes(weights: Weights, scheme: Scheme) -> int:
    """Return how many bytes of memory the matrices take that a scheme rounds."""
    rounded = ((matrix, scheme.bits_of(matrix.name)) for matrix in matrices(weights))
    specs = (quantized_tensors(*matrix.shape, bits, scheme.group_size) for matrix, bits in rounded if bits is not None)
    return sum(spec.nbytes for tensors in specs for spec in tensors.values())


def quantized_weights(
    weights: Weights, scheme: Scheme, progress: Progress | None = None, threads: int | None = None
) -> Weights:
    """Return the weights, rounded in memory by a scheme. `progress` is called with (weights done, weights in all).

    threads     number of threads, as in `load`

    Raises InputError if the scheme does not fit, and CheckpointError if a weight is not finite.
    """
    scheme.check(weights)
    total, done = sum(matrix.size for matrix in matrices(weights)), 0
    rounded: dict[int, Matrix] = {}

    def change(matrix: Matrix) -> Matrix:
        nonlocal done
        if id(matrix) not in rounded:
            bits = scheme.bits_of(matrix.name)
            rounded[id(matrix)] = (
                matrix if bits is None else rounded_matrix(weights, matrix, bits, scheme.group_size, threads=threads)
            )
            done += matrix.size
            if progress is not None:
                progress(done, total)
        return rounded[id(matrix)]

    return with_matrices(weights, change)


def rounded_matrix(
    weights: Weights,
    matrix: Matrix,
    bits: int,
    group_size: int,
    row_order: np.ndarray | None = None,
    threads: int | None = None,
) -> QuantizedMatrix:
    """Return one of the weights' matrices, rounded as `quantized` does it. Errors name the matrix's file."""
    weights.check_files()
    try:
        return quantized(matrix, bits, group_size, row_order, threads)
    except CheckpointError as error:
        raise CheckpointError(f"{weights.path_of(matrix) or 'memory'}: {error}") from None
