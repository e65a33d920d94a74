"""Checkpoints of random weights in the shapes of published models, for measuring: speed does not ask what weights say.

They are real directories, params.json and consolidated.safetensors, written a piece at a time, so that a model of any
size can be made in a few MiB of memory.
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
from safetensors import SafetensorError, safe_open

from mistral_ref.config import ModelConfig, tensor_shapes
from mistral_ref.errors import InputError, Progress, checked_int, short_repr
from mistral_ref.files.quantized_format import quantized_metadata, quantized_tensors
from mistral_ref.files.tensor_file import DTYPES, TensorSpec, pieces_of_tensor_file
from mistral_ref.files.whole_file import whole_file
from mistral_ref.quantized_matrix import GROUP_SIZE, scale_values
from mistral_ref.weights import Kind, Matrix, Weights, bf16_bits, e4m3_values, weights_of

_MADE_HERE = "mistral_ref.synthetic.v1"  # the entry in a file's metadata that says what it was made of
_PIECE = 2**20  # weights in memory at a time
_N_QUANTILES = 2**16
_FP8_PER_STD = 64.0  # an fp8 weight of one standard deviation; the largest of all, 4.3 of them, stays below 448


def encoded(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Return float32 values rounded to the nearest numbers of a kind, as files hold them: bf16 as uint16, fp8 as uint8.

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
    """Return what random fp8 weights are multiplied by to have this standard deviation."""
    return np.float32(std / _FP8_PER_STD)


def random_weights(rng: np.random.Generator, n: int, std: float, kind: Kind) -> Iterator[np.ndarray]:
    """Yield n weights of a kind in pieces: drawn evenly from 65536 quantiles of a normal distribution.

    Numbers of 8 and 16 bits hold no more than that, and looking them up is several times faster than drawing floats.
    """
    table = encoded(_quantiles() * np.float32(_FP8_PER_STD if kind == "fp8" else std), kind)
    for start in range(0, n, _PIECE):
        yield table[rng.integers(0, _N_QUANTILES, min(_PIECE, n - start), dtype=np.uint16)]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written: name, dtype as safetensors spells it, shape, and a function that makes it in pieces."""

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
    """Write a safetensors file piece by piece; it appears under its name only when it is complete.

    `progress` is called with (bytes written, bytes in all). Raises InputError if the disk has no room.
    """
    written, total = 0, sum(tensor.spec.nbytes for tensor in tensors)
    with pieces_of_tensor_file(path, {tensor.name: tensor.spec for tensor in tensors}, metadata) as write:
        for tensor in tensors:
            for piece in tensor.pieces():
                write(tensor.name, piece)
                written += piece.nbytes
                if progress is not None:
                    progress(written, total)


def _random_codes(name: str, n_out: int, n_in: int, bits: int, std: float, seed: int) -> Iterator[PlannedTensor]:
    """Yield the tensors of a matrix of 8 or 4 bits: any codes, all scales such as give the standard deviation."""
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
    """Return the tensors of a model under Mistral's own names: matrices of standard deviation 1/sqrt(I), norms of ones.

    In an fp8 model embedding, output, routers and norms are bf16, as they are in published ones. In one of 8 or 4 bits
    routers and norms are bf16, embedding and output have 8 bits, as `quantize` makes them.
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
            rng = np.random.default_rng([seed, *name.encode()])  # of its own, so that no tensor depends on others
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
    """Return the metadata that a file of these tensors needs to be read."""
    if kind not in ("int8", "int4"):
        return {}
    names = (tensor.name.removesuffix(".scales") for tensor in tensors if tensor.name.endswith(".scales"))
    bits = {name: 4 if kind == "int4" and name not in ("tok_embeddings", "output") else 8 for name in names}
    return quantized_metadata(bits, GROUP_SIZE)


def params_json(config: ModelConfig) -> dict[str, Any]:
    """Return what params.json says of a configuration."""
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
    """Return bf16 weights of a configuration's shape that take no memory, to be counted and not computed with."""

    def tensor(name: str, shape: tuple[int, ...]) -> Matrix | np.ndarray:
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        return Matrix(name.removesuffix(".weight"), "bf16", np.broadcast_to(np.uint16(0), shape))

    return weights_of({name: tensor(name, shape) for name, shape in tensor_shapes(config)}, config)


def _made_of(path: Path) -> str | None:
    """Return what a file made here says it was made of; None for any other file."""
    try:
        with safe_open(path, framework="np") as file:
            return (file.metadata() or {}).get(_MADE_HERE)
    except (OSError, SafetensorError):
        return None


def checkpoint_folder(name: str, config: ModelConfig, kind: Kind, parent: Path) -> Path:
    """Return the folder for a checkpoint of a shape by its name: one for each number of layers and kind of weights."""
    return parent / f"{name}-{config.n_layers}-{kind}"


def checkpoint_bytes(config: ModelConfig, kind: Kind) -> int:
    """Return the bytes of a checkpoint's tensors."""
    return sum(tensor.spec.nbytes for tensor in plan(config, kind, seed=0))


def make_checkpoint(
    directory: str | os.PathLike[str],
    config: ModelConfig,
    *,
    kind: Kind = "bf16",
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Make the directory of a model with random weights, or leave the weights that are there if they are the same.

    Windows and the longest sequence are no part of the weights: they only change params.json. Raises InputError if the
    disk has no room, or if the directory holds weights that were not made here.
    """
    if kind not in get_args(Kind):
        raise InputError(f"kind is {short_repr(kind)}; expected one of {', '.join(get_args(Kind))}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "consolidated.safetensors"
    fields = dataclasses.asdict(config.replace(sliding_window=(None,) * config.n_layers, max_seq_len=None))
    made_of = json.dumps({"kind": kind, "seed": checked_int("seed", seed, least=0), "config": fields})
    if os.path.lexists(path) and _made_of(path) is None:
        raise InputError(f"{path}: weights that were not made here are not overwritten; expected another directory")
    if _made_of(path) != made_of:
        tensors = plan(config, kind, seed)
        write_planned(path, tensors, {_MADE_HERE: made_of} | plan_metadata(tensors, kind), progress)
    with whole_file(directory / "params.json", InputError) as partial:
        partial.write_text(json.dumps(params_json(config), indent=2) + "\n", encoding="utf-8")
    return directory
