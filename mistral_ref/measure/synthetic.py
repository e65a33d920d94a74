"""Checkpoints of random weights in the shapes of published models, for measuring speed and memory.

Speed depends on the shapes of the weights and not on their values. A checkpoint made here is a directory like any
other, with params.json and consolidated.safetensors. It is written a piece at a time, so that a model of any size can
be made in a few MiB of memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import NormalDist
from typing import Any, get_args

import numpy as np

from mistral_ref.config import ModelConfig, tensor_shapes
from mistral_ref.errors import CheckpointError, InputError, Progress, checked_choice, checked_int
from mistral_ref.files.paths import local_path
from mistral_ref.files.quantized_format import quantized_metadata, quantized_tensors
from mistral_ref.files.tensor_file import DTYPES, TensorSpec, begin_tensor_file, open_tensor_file, require_space
from mistral_ref.files.whole_file import whole_file
from mistral_ref.quantized_matrix import GROUP_SIZE, scale_values
from mistral_ref.weights import Kind, Matrix, Weights, bf16_bits, e4m3_values, weights_of

_MADE_HERE = "mistral_ref.synthetic.v1"  # key in a file's metadata; its value is what the file was made from
_PIECE = 2**20  # how many weights are in memory at a time
_N_QUANTILES = 2**16
_FP8_PER_STD = 64.0  # the fp8 number for one standard deviation; the largest weight, 4.3 times this, stays below 448


def encoded(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Return float32 values rounded to the nearest numbers of a kind; bf16 is returned as uint16, fp8 as uint8.

    >>> encoded(np.float32([1.0, -448.0]), "fp8").tolist()
    [56, 254]
    """
    if kind == "bf16":
        return bf16_bits(values)
    if kind == "fp8":
        magnitudes = e4m3_values()[:127]
        codes = np.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, np.abs(values)).astype(np.uint8)
        return codes | np.signbit(values).astype(np.uint8) << 7
    return values.astype(np.float16 if kind == "f16" else np.float32)


@cache
def _quantiles() -> np.ndarray:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / _N_QUANTILES) for i in range(_N_QUANTILES)], np.float32)


def fp8_scale(std: float) -> np.float32:
    """Return the scale that gives random fp8 weights this standard deviation."""
    return np.float32(std / _FP8_PER_STD)


def random_weights(rng: np.random.Generator, n: int, std: float, kind: Kind) -> Iterator[np.ndarray]:
    """Yield n weights of a kind in pieces. Each is one of 65536 quantiles of a normal distribution, all equally likely.

    A type of 8 or 16 bits has no more numbers than that, and a look-up is several times faster than drawing floats.
    """
    table = encoded(_quantiles() * np.float32(_FP8_PER_STD if kind == "fp8" else std), kind)
    for start in range(0, n, _PIECE):
        yield table[rng.integers(0, _N_QUANTILES, min(_PIECE, n - start), dtype=np.uint16)]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    name        its name in the file
    dtype       its dtype, as safetensors spells it
    shape       its shape
    pieces      a function that makes its values, piece by piece
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def spec(self) -> TensorSpec:
        """Its dtype and shape."""
        return TensorSpec(self.dtype, self.shape)


def write_planned(
    path: Path, tensors: Sequence[PlannedTensor], metadata: Mapping[str, str], progress: Progress | None = None
) -> None:
    """Write a safetensors file piece by piece. The file appears at `path` only when it is complete.

    `progress` is called with (bytes written, bytes in all). Raises InputError if the disk has no room.
    """
    written, total = 0, sum(tensor.spec.nbytes for tensor in tensors)
    require_space(path, total)
    with whole_file(path, InputError) as file:
        write = begin_tensor_file(file, {tensor.name: tensor.spec for tensor in tensors}, metadata)
        for tensor in tensors:
            for piece in tensor.pieces():
                write(tensor.name, piece)
                written += piece.nbytes
                if progress is not None:
                    progress(written, total)


def _random_codes(name: str, n_out: int, n_in: int, bits: int, std: float, seed: int) -> Iterator[PlannedTensor]:
    """Yield the tensors of a matrix of 8 or 4 bits: random codes, with one scale that gives the standard deviation."""
    specs, most = quantized_tensors(n_out, n_in, bits, GROUP_SIZE), 2**bits - 1
    scale = np.searchsorted(scale_values(), std / math.sqrt((most + 1) ** 2 / 12)).astype(np.uint8)

    zero = most * 2 ** (8 - bits) // 2

    def pieces() -> Iterator[np.ndarray]:
        rng = np.random.default_rng([seed, *name.encode()])
        for start in range(0, specs["weight"].nbytes, _PIECE):
            yield rng.integers(0, 256, min(_PIECE, specs["weight"].nbytes - start), dtype=np.uint8)

    def scales_and_zeros() -> Iterator[np.ndarray]:
        for _ in range(specs["scales"].shape[0]):
            yield np.broadcast_to(np.array([[scale], [zero]], np.uint8), specs["scales"].shape[1:])

    yield PlannedTensor(f"{name}.weight", *specs["weight"], pieces)
    yield PlannedTensor(f"{name}.scales", *specs["scales"], scales_and_zeros)


def plan(config: ModelConfig, kind: Kind, seed: int) -> list[PlannedTensor]:
    """Return the tensors of a model under Mistral's own names.

    The matrices have standard deviation 1/sqrt(I), and the norms are ones. In an fp8 model the embedding, the output,
    the routers and the norms are bf16, as in published fp8 models. In a model of 8 or 4 bits the routers and the norms
    are bf16, and the embedding and the output have 8 bits, as in models made by `quantize`.
    """
    tensors = list(_plan(config, kind, seed))
    n_rounded = sum(tensor.name.endswith(".scales") for tensor in tensors)
    units = PlannedTensor("units", "F32", (n_rounded,), lambda: [np.ones(n_rounded, np.float32)])
    return [*tensors, units] if n_rounded else tensors


def _plan(config: ModelConfig, kind: Kind, seed: int) -> Iterator[PlannedTensor]:
    plain: Kind = kind if kind in ("f32", "f16") else "bf16"
    around: Kind = "int8" if kind in ("int8", "int4") else plain

    def matrix(name: str, n_out: int, n_in: int, kind: Kind = kind) -> Iterator[PlannedTensor]:
        std = n_in**-0.5
        if kind in ("int8", "int4"):
            yield from _random_codes(name, n_out, n_in, 8 if kind == "int8" else 4, std, seed)
            return

        def pieces() -> Iterator[np.ndarray]:
            rng = np.random.default_rng([seed, *name.encode()])  # one for each tensor, so that none depends on others
            return random_weights(rng, n_out * n_in, std, kind)

        yield PlannedTensor(f"{name}.weight", DTYPES[kind], (n_out, n_in), pieces)
        if kind == "fp8":
            yield PlannedTensor(f"{name}.qscale_weight", "F32", (), lambda: [fp8_scale(std).reshape(1)])

    def norm(name: str) -> PlannedTensor:
        ones = partial(encoded, np.ones(config.dim, np.float32), plain)
        return PlannedTensor(f"{name}.weight", DTYPES[plain], (config.dim,), lambda: [ones()])

    for full_name, shape in tensor_shapes(config):
        name = full_name.removesuffix(".weight")
        if len(shape) == 1:
            yield norm(name)
            continue
        n_out, n_in = shape
        special = {"tok_embeddings": around, "output": around, "gate": plain}
        yield from matrix(name, n_out, n_in, special.get(name.rpartition(".")[2], kind))


def plan_metadata(tensors: Iterable[PlannedTensor], kind: Kind) -> dict[str, str]:
    """Return the metadata that a file with these tensors needs, so that it can be read."""
    if kind not in ("int8", "int4"):
        return {}
    names = (tensor.name.removesuffix(".scales") for tensor in tensors if tensor.name.endswith(".scales"))
    bits = {name: 4 if kind == "int4" and name not in ("tok_embeddings", "output") else 8 for name in names}
    return quantized_metadata(bits, GROUP_SIZE)


def params_json(config: ModelConfig) -> dict[str, Any]:
    """Return the content of params.json for a configuration."""
    names = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "norm_eps")
    file = {name: getattr(config, name) for name in (*names, "rope_theta", "tied_embeddings")}
    optional = {"max_seq_len": config.max_seq_len, "sliding_window": list(config.sliding_window)}
    file |= {name: value for name, value in optional.items() if value not in (None, [None] * config.n_layers)}
    if config.moe is not None:
        file["moe"] = dataclasses.asdict(config.moe)
    if config.query_temperature is not None:
        file["llama_4_scaling"] = dataclasses.asdict(config.query_temperature)
    if (yarn := config.yarn) is not None:
        file["yarn"] = {
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta": yarn.beta_fast,
            "alpha": yarn.beta_slow,
            "apply_scale": yarn.attention_factor != 1,
        }
    return file


def hollow_weights(config: ModelConfig) -> Weights:
    """Return bf16 weights of a configuration that take no memory; costs can be counted with them, nothing computed."""

    def tensor(name: str, shape: tuple[int, ...]) -> Matrix | np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return Matrix(name.removesuffix(".weight"), "bf16", np.broadcast_to(np.uint16(0), shape))

    return weights_of({name: tensor(name, shape) for name, shape in tensor_shapes(config)}, config)


def _made_of(path: Path) -> str | None:
    """Return the metadata entry that says what a file was made from; None for a file that was not made here."""
    try:
        return open_tensor_file(path).metadata.get(_MADE_HERE)
    except CheckpointError:
        return None


def checkpoint_folder(name: str, config: ModelConfig, kind: Kind, parent: Path) -> Path:
    """Return the folder for a checkpoint; there is one for each shape, number of layers and kind of weights."""
    return parent / f"{name}-{config.n_layers}-{kind}"


def checkpoint_bytes(config: ModelConfig, kind: Kind) -> int:
    """Return how many bytes the tensors of a checkpoint take."""
    return sum(tensor.spec.nbytes for tensor in plan(config, kind, seed=0))


def make_checkpoint(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    *,
    kind: Kind = "bf16",
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Make the directory of a model with random weights, and return it.

    If the directory already holds the same weights, they stay. Windows and max_seq_len do not matter for this: they
    only change params.json. Raises InputError if the disk has no room, or if the directory holds weights that were not
    made here, or cannot be written to.
    """
    checked_choice("kind", kind, get_args(Kind))
    directory = local_path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{directory}: cannot be made: {error.strerror}") from None
    path = directory / "consolidated.safetensors"
    fields = dataclasses.asdict(config.replace(sliding_window=(None,) * config.n_layers, max_seq_len=None))
    made_of = json.dumps({"kind": kind, "seed": checked_int("seed", seed, least=0), "config": fields})
    if os.path.lexists(path) and _made_of(path) is None:
        raise InputError(
            f"{path}: these weights were not made here, so they are not overwritten; expected another directory"
        )
    if _made_of(path) != made_of:
        tensors = plan(config, kind, seed)
        write_planned(path, tensors, {_MADE_HERE: made_of} | plan_metadata(tensors, kind), progress)
    with whole_file(directory / "params.json", InputError) as file:
        file.write(json.dumps(params_json(config), indent=2).encode() + b"\n")
    return directory
