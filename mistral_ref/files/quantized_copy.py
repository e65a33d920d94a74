"""quantize: write a model of smaller weights, or the packed weights of a GGUF file in tile order.

The new directory holds one file of weights, under Mistral's own names and with the rows of wq and wk in Mistral's own
order. quantized_format.py says which tensors and metadata it holds for a matrix that is rounded or in tile order; any
other matrix is written as it was.

Of a directory, the new one also gets a copy of every small file: configuration, tokenizer, licence. A symbolic link in
the old directory may lead to a file that nobody means to pass on, for example a key. `_may_be_copied` says which links
are followed. Of a GGUF file it gets the header, without the tensors: metadata.gguf.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mistral_ref.block_matrix import BlockMatrix
from mistral_ref.config import ModelConfig, tensor_shapes
from mistral_ref.errors import InputError, Progress, warn
from mistral_ref.files.adapters import Source, merged, with_adapters
from mistral_ref.files.build_weights import open_model
from mistral_ref.files.gguf_writer import without_tensors
from mistral_ref.files.paths import METADATA, checked_model, is_gguf, local_path
from mistral_ref.files.quantization import Scheme, rounded_matrix
from mistral_ref.files.quantized_format import quantized_metadata, quantized_tensors, tiled_metadata, tiled_tensors
from mistral_ref.files.tensor_file import DTYPES, TensorSpec, begin_tensor_file, require_space
from mistral_ref.files.whole_file import whole_directory
from mistral_ref.quantized_matrix import GROUP_SIZE
from mistral_ref.tiled_matrix import tiled
from mistral_ref.weights import Matrix, Weights, interleaved_rows, matrices, norms

_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pth", ".pt", ".ckpt", ".pkl", ".gguf", ".h5", ".msgpack")
_TEXT_FILES = re.compile(
    r"(params|config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template)\.json"
    r"|chat_template\.jinja|SYSTEM_PROMPT\.txt|tekken\w*\.json|.+\.model(\.v\d+(m\d+)?)?"
)
_LARGEST_COPY = 2**26  # bytes; larger files are not copied. A tokenizer has at most 20 MB


def is_text_file(name: str) -> bool:
    """Return whether this is the name of a small file that belongs to a model: configuration, tokenizer, template."""
    return _TEXT_FILES.fullmatch(name) is not None


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    bits: int | None = None,
    *,
    group_size: int = GROUP_SIZE,
    embedding: int | None = 8,
    head: int | None = 8,
    adapters: Iterable[Source | tuple[Source, float]] = (),
    progress: Progress | None = None,
) -> Path:
    """Write a new directory with a model in 8 or 4 bits a weight; return its path. `load` reads it like any model.

    Or bring the packed weights of a GGUF file into tile order, which kernels read faster. No weight changes.

    source      directory of the model, or a GGUF file, or its name in the hub's cache
    target      the new directory
    bits        8 or 4, for the matrices of the layers; routers are not rounded. None: 4, or tile order if the source is
                a GGUF file of packed weights, which cannot be rounded again
    group_size  how many neighbours in a row share a scale and a zero: 32, 64 or 128. A scale and a zero take 16 bits
    embedding, head     8 or 4, or None: not rounded. If one matrix is both, the two must be the same
    adapters    paths of adapters, or (path, scale), as in `load`: what they add becomes part of the weights
    progress    called with (weights done, weights in all)

    Only one matrix at a time is in memory. The directory gets its name only when it is complete. Raises InputError if
    it is there already, if the disk has no room, or if the model is quantized already; CheckpointError if a weight is
    not finite, or an adapter does not fit.
    """
    source, target = checked_model(source), local_path(target)
    scheme = Scheme(4 if bits is None else bits, group_size, embedding, head)
    if os.path.lexists(target):
        raise InputError(f"{target}: exists already; expected the name of a new directory")
    config, weights = open_model(source)
    packed = is_gguf(source) and any(isinstance(matrix, BlockMatrix) for matrix in matrices(weights))
    if packed and bits is None:
        adapters = tuple(adapters)
        if scheme != Scheme(4) or adapters:
            raise InputError(
                f"{source}: its weights are packed, and are only brought into tile order; expected no group size, "
                "embedding, head or adapters: `load` and `generate` add adapters to packed weights, too"
            )
        form = _in_tile_order(weights)
    else:
        if packed:
            raise InputError(f"{source}: its weights are packed; without bits, they are brought into tile order")
        scheme.check(weights)
        weights = merged(*with_adapters(config, weights, adapters))
        form = _rounded(config, weights, scheme)
    small_files = [(METADATA, without_tensors(source, config))] if is_gguf(source) else _small_files(source)
    _write(target, small_files, config, weights, form, progress)
    return target


class _Form(NamedTuple):
    """How a copy holds matrices.

    tensors     tensors(matrix) returns the tensors of a matrix by the endings of their names; None: as it is
    arrays      arrays(matrix) returns their values, and pieces of the tensors that all matrices share
    shared      the tensors that all matrices share, by their names
    metadata    of the file
    """

    tensors: Callable[[Matrix], dict[str, TensorSpec] | None]
    arrays: Callable[[Matrix], dict[str, np.ndarray]]
    metadata: Mapping[str, str]
    shared: Mapping[str, TensorSpec] = {}


def _rounded(config: ModelConfig, weights: Weights, scheme: Scheme) -> _Form:
    """Return the form of matrices that are rounded by a scheme."""
    bits = {matrix.name: bits for matrix in matrices(weights) if (bits := scheme.bits_of(matrix.name))}

    def tensors(matrix: Matrix) -> dict[str, TensorSpec] | None:
        return quantized_tensors(*matrix.shape, bits[matrix.name], scheme.group_size) if matrix.name in bits else None

    def arrays(matrix: Matrix) -> dict[str, np.ndarray]:
        rows = _interleaved(matrix, config)
        small = rounded_matrix(weights, matrix, bits[matrix.name], scheme.group_size, rows)
        return {"weight": small.data, "scales": small.scales, "units": small.unit.reshape(1)}

    return _Form(
        tensors, arrays, quantized_metadata(bits, scheme.group_size), {"units": TensorSpec("F32", (len(bits),))}
    )


def _in_tile_order(weights: Weights) -> _Form:
    """Return the form of packed matrices in tile order."""
    kinds = {matrix.name: matrix.kind for matrix in matrices(weights) if isinstance(matrix, BlockMatrix)}

    def tensors(matrix: Matrix) -> dict[str, TensorSpec] | None:
        return tiled_tensors(matrix.kind, *matrix.shape) if isinstance(matrix, BlockMatrix) else None

    def arrays(matrix: Matrix) -> dict[str, np.ndarray]:
        assert isinstance(matrix, BlockMatrix)
        weights.check_files()
        in_tiles = tiled(matrix)
        return {"weight": in_tiles.data, "scales": in_tiles.scales}

    return _Form(tensors, arrays, tiled_metadata(kinds))


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


def _interleaved(matrix: Matrix, config: ModelConfig) -> np.ndarray | None:
    """Return the rows of wq or wk in Mistral's own order, as row numbers in the checkpoint; None if no row moves."""
    if config.rope_row_order == "interleaved" or not matrix.name.endswith((".wq", ".wk")):
        return None
    return interleaved_rows(matrix.shape[0], config.head_dim)


def _planned(
    config: ModelConfig, weights: Weights, form: _Form
) -> tuple[dict[str, TensorSpec], dict[str, np.ndarray], list[Matrix]]:
    """Return the tensors of the new file, the values of those that stay as they are, and the matrices that do not.

    Norms are float32.
    """
    every_norm, by_name = norms(weights), {f"{matrix.name}.weight": matrix for matrix in matrices(weights)}
    specs: dict[str, TensorSpec] = {}
    kept: dict[str, np.ndarray] = {}
    changed = [matrix for matrix in matrices(weights) if form.tensors(matrix) is not None]
    for name, shape in tensor_shapes(config):
        if len(shape) == 1:
            specs[name], kept[name] = TensorSpec("F32", shape), every_norm[name]
            continue
        matrix, stem = by_name[name], name.removesuffix(".weight")
        if (tensors := form.tensors(matrix)) is not None:
            specs |= {f"{stem}.{ending}": spec for ending, spec in tensors.items()}
            continue
        specs[name], kept[name] = TensorSpec(DTYPES[matrix.kind], shape), matrix.data
        if matrix.scale is not None:
            specs[f"{stem}.qscale_weight"] = TensorSpec("F32", matrix.scale.shape)
            kept[f"{stem}.qscale_weight"] = matrix.scale
    return {**specs, **form.shared}, kept, changed


def _write(
    target: Path, small_files: Iterable[tuple[str, bytes]], config: ModelConfig, weights: Weights, form: _Form,
    progress: Progress | None,
) -> None:  # fmt: skip
    """Write a model to a new directory, one matrix after the other."""
    specs, kept, changed = _planned(config, weights, form)
    total = sum(matrix.size for matrix in matrices(weights))
    done = total - sum(matrix.size for matrix in changed)
    with whole_directory(target) as directory, open(directory / "consolidated.safetensors", "xb") as file:
        require_space(target, sum(spec.nbytes for spec in specs.values()))
        for name, content in small_files:
            (directory / name).write_bytes(content)
        write = begin_tensor_file(file, specs, form.metadata)
        for name, array in kept.items():
            write(name, array)
        for matrix in changed:
            for ending, array in form.arrays(matrix).items():
                write(ending if ending in form.shared else f"{matrix.name}.{ending}", array)
            done += matrix.size
            if progress is not None:
                progress(done, total)
