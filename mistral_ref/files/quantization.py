"""Quantize a model: from a directory to a new, smaller directory, or in memory.

The matrices of the layers are rounded, except the routers: a router is small, and an error in it sends tokens to other
experts. The embedding and the head are rounded if their options say so. rounding.py rounds one matrix.

The new directory holds one file of weights, under Mistral's own names and with the rows of wq and wk in Mistral's own
order. quantized_format.py says which tensors and metadata it holds for a rounded matrix; any other matrix is written as
it was. The directory also gets a copy of every small file of the old directory: configuration, tokenizer, licence.
A symbolic link in the old directory may lead to a file that nobody means to pass on, for example a key.
`_may_be_copied` says which links are followed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mistral_ref.config import ModelConfig, tensor_shapes
from mistral_ref.errors import CheckpointError, InputError, Progress, short_repr, warn
from mistral_ref.files.adapters import Source, merged, with_adapters
from mistral_ref.files.build_weights import open_model
from mistral_ref.files.paths import checked_model, is_gguf, local_path
from mistral_ref.files.quantized_format import quantized_metadata, quantized_tensors
from mistral_ref.files.rounding import quantized
from mistral_ref.files.tensor_file import DTYPES, TensorSpec, begin_tensor_file, require_space
from mistral_ref.files.whole_file import whole_directory
from mistral_ref.quantized_matrix import BITS, GROUP_SIZE, GROUP_SIZES, QuantizedMatrix
from mistral_ref.weights import Matrix, Weights, interleaved_rows, matrices, norms, with_matrices

_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pth", ".pt", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack")
_TEXT_FILES = re.compile(
    r"(params|config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json"
    r"|chat_template\.jinja|SYSTEM_PROMPT\.txt|tekken\w*\.json|.+\.model(\.v\d+(m\d+)?)?"
)
_LARGEST_COPY = 2**26  # bytes; larger files are not copied. A tokenizer has at most 20 MB


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


def is_text_file(name: str) -> bool:
    """Return whether this is the name of a small file that belongs to a model: configuration, tokenizer, template."""
    return _TEXT_FILES.fullmatch(name) is not None


def rounded_bytes(weights: Weights, scheme: Scheme) -> int:
    """Return how many bytes of memory the matrices take that a scheme rounds."""
    rounded = ((matrix, scheme.bits_of(matrix.name)) for matrix in matrices(weights))
    specs = (quantized_tensors(*matrix.shape, bits, scheme.group_size) for matrix, bits in rounded if bits is not None)
    return sum(spec.nbytes for tensors in specs for spec in tensors.values())


def quantized_weights(weights: Weights, scheme: Scheme, progress: Progress | None = None) -> Weights:
    """Return the weights, rounded in memory by a scheme. `progress` is called with (weights done, weights in all).

    Raises InputError if the scheme does not fit, and CheckpointError if a weight is not finite.
    """
    scheme.check(weights)
    total, done = sum(matrix.size for matrix in matrices(weights)), 0
    rounded: dict[int, Matrix] = {}

    def change(matrix: Matrix) -> Matrix:
        nonlocal done
        if id(matrix) not in rounded:
            bits = scheme.bits_of(matrix.name)
            rounded[id(matrix)] = matrix if bits is None else _rounded(weights, matrix, bits, scheme.group_size)
            done += matrix.size
            if progress is not None:
                progress(done, total)
        return rounded[id(matrix)]

    return with_matrices(weights, change)


def _rounded(
    weights: Weights, matrix: Matrix, bits: int, group_size: int, row_order: np.ndarray | None = None
) -> QuantizedMatrix:
    """Return one of the weights' matrices, rounded as `quantized` does it. Errors name the matrix's file."""
    weights.check_files()
    try:
        return quantized(matrix, bits, group_size, row_order)
    except CheckpointError as error:
        raise CheckpointError(f"{weights.path_of(matrix) or 'memory'}: {error}") from None


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int = 4,
    *,
    group_size: int = GROUP_SIZE,
    embedding: int | None = 8,
    head: int | None = 8,
    adapters: Iterable[Source | tuple[Source, float]] = (),
    progress: Progress | None = None,
) -> Path:
    """Write a new directory with a model in 8 or 4 bits a weight; return its path. `load` reads it like any model.

    source      directory of the model, or its name in the hub's cache
    target      the new directory
    bits        8 or 4, for the matrices of the layers; routers are not rounded
    group_size  how many neighbours in a row share a scale and a zero: 32, 64 or 128. A scale and a zero take 16 bits
    embedding, head     8 or 4, or None: not rounded. If one matrix is both, the two must be the same
    adapters    paths of adapters, or (path, scale), as in `load`: what they add becomes part of the weights
    progress    called with (weights done, weights in all)

    Only one matrix at a time is in memory. The directory gets its name only when it is complete. Raises InputError if
    it is there already, if the disk has no room, or if the model is quantized already; CheckpointError if a weight is
    not finite, or an adapter does not fit.
    """
    source, target = checked_model(source), local_path(target)
    scheme = Scheme(bits, group_size, embedding, head)
    if os.path.lexists(target):
        raise InputError(f"{target}: exists already; expected the name of a new directory")
    if is_gguf(source):
        raise InputError(f"{source}: a GGUF file; expected a directory with safetensors files")
    config, weights = open_model(source)
    scheme.check(weights)
    weights = merged(*with_adapters(config, weights, adapters))
    specs, kept = _planned(config, weights, scheme)
    with whole_directory(target) as directory, open(directory / "consolidated.safetensors", "xb") as file:
        require_space(target, sum(spec.nbytes for spec in specs.values()))
        for name, content in _small_files(source):
            (directory / name).write_bytes(content)
        write = begin_tensor_file(file, specs, quantized_metadata(_bits(weights, scheme), scheme.group_size))
        for name, array in kept.items():
            write(name, array)
        _write_rounded(write, config, weights, scheme, progress)
    return target


def _small_files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file that goes to the new directory as it is; warn of links not followed."""
    left = []
    for path in sorted(source.iterdir()):
        is_small = os.path.isfile(path) and path.stat().st_size <= _LARGEST_COPY
        if not is_small or path.name.endswith((*_WEIGHTS, ".partial")):
            continue
        if not _may_be_copied(path):
            left.append(path.name)
            continue
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path}: cannot be copied: {error.strerror}") from None
        yield path.name, content
    if left:
        warn(f"{source}: links to files outside this directory are not copied: {', '.join(left[:20])}")


def _may_be_copied(path: Path) -> bool:
    """Return whether a file of a model's directory may be copied, although it may be a link.

    A link is followed to a file in the same directory, and to a file in the hub's cache that the directory is part of:
    there snapshots/COMMIT/NAME is a link to blobs/HASH. Links to other places are followed only if their names are
    those of a configuration or a tokenizer.
    """
    directory, target = path.parent.resolve(), path.resolve()
    blobs = directory.parent.with_name("blobs") if directory.parent.name == "snapshots" else directory
    return is_text_file(path.name) or target.is_relative_to(directory) or target.parent == blobs


def _bits(weights: Weights, scheme: Scheme) -> dict[str, int]:
    """Return the bits of each matrix that is rounded, by its name."""
    return {matrix.name: bits for matrix in matrices(weights) if (bits := scheme.bits_of(matrix.name))}


def _interleaved(matrix: Matrix, config: ModelConfig) -> np.ndarray | None:
    """Return the rows of wq or wk in Mistral's own order, as row numbers in the checkpoint; None if no row moves."""
    if config.rope_row_order == "interleaved" or not matrix.name.endswith((".wq", ".wk")):
        return None
    return interleaved_rows(matrix.shape[0], config.head_dim)


def _planned(
    config: ModelConfig, weights: Weights, scheme: Scheme
) -> tuple[dict[str, TensorSpec], dict[str, np.ndarray]]:
    """Return the tensors of the new file, and the values of those that are not rounded. Norms are float32."""
    every_norm, by_name = norms(weights), {f"{matrix.name}.weight": matrix for matrix in matrices(weights)}
    bits = _bits(weights, scheme)
    specs: dict[str, TensorSpec] = {}
    kept: dict[str, np.ndarray] = {}
    for name, shape in tensor_shapes(config):
        if len(shape) == 1:
            specs[name], kept[name] = TensorSpec("F32", shape), every_norm[name]
            continue
        matrix, stem = by_name[name], name.removesuffix(".weight")
        if stem in bits:
            endings = quantized_tensors(*matrix.shape, bits[stem], scheme.group_size)
            specs |= {f"{stem}.{ending}": spec for ending, spec in endings.items()}
            continue
        specs[name], kept[name] = TensorSpec(DTYPES[matrix.kind], shape), matrix.data
        if matrix.scale is not None:
            specs[f"{stem}.qscale_weight"] = TensorSpec("F32", matrix.scale.shape)
            kept[f"{stem}.qscale_weight"] = matrix.scale
    specs["units"] = TensorSpec("F32", (len(bits),))
    return specs, kept


def _write_rounded(
    write: Callable[[str, np.ndarray], None],
    config: ModelConfig,
    weights: Weights,
    scheme: Scheme,
    progress: Progress | None,
) -> None:
    """Round one matrix after the other by the scheme, and write each."""
    bits, every = _bits(weights, scheme), matrices(weights)
    done, total = 0, sum(matrix.size for matrix in every)
    for matrix in every:
        if matrix.name in bits:
            small = _rounded(weights, matrix, bits[matrix.name], scheme.group_size, _interleaved(matrix, config))
            write(f"{matrix.name}.weight", small.data)
            write(f"{matrix.name}.scales", small.scales)
            write("units", small.unit.reshape(1))
        done += matrix.size
        if progress is not None:
            progress(done, total)
