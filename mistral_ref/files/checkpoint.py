"""From a directory to mapped tensors under Mistral's own names, whichever of the two published layouts it has.

    consolidated    consolidated.safetensors; tok_embeddings, layers.0.attention.wq, ...; rows of wq, wk interleaved
    huggingface     model.safetensors, or shards with an index; model.embed_tokens, ...; rows of wq, wk in halves

Nothing is copied, unpickled or executed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mistral_ref.config import ModelConfig, RowOrder
from mistral_ref.errors import CheckpointError, InputError, shown, warn
from mistral_ref.files.config_files import read_config
from mistral_ref.files.json_file import read_json
from mistral_ref.files.tensor_file import Tensor, open_with_metadata
from mistral_ref.files.tensor_names import huggingface_name, is_unused, mistral_name, other_part
from mistral_ref.quantized_matrix import QuantizedMatrix, bits_of, quantized_parts
from mistral_ref.weights import FP8_BLOCK, ExpertFeedForward, FeedForward, Kind, Layer, Matrix, Weights

# Several times what any model has. A tensor costs more in memory than its entry in a header does in a file.
_MAX_TENSORS = 8_000

# In order of preference: either layout in one file, or in shards with an index.
_FILES = tuple(f"{stem}.safetensors{ending}" for stem in ("consolidated", "model") for ending in ("", ".index.json"))
_PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The mapped tensors of one directory.

    tensors     by Mistral's own names; each Tensor keeps the name it has in its file
    row_order   which rows of wq and wk form RoPE's pairs, by whose names the tensors bear
    skipped     tensors that belong to other parts (vision), or that the forward pass has no use for
    metadata    what the files say of themselves
    """

    directory: Path
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    row_order: RowOrder
    skipped: tuple[Tensor, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """By whose names the tensors bear: "consolidated" is Mistral's own layout, the other is "huggingface"."""
        return "consolidated" if self.row_order == "interleaved" else "huggingface"


def open_checkpoint(directory: Path) -> Checkpoint:
    """Map the weights of a directory and name every tensor.

    Where both layouts are present the consolidated one is read, with a warning. Raises CheckpointError if there are no
    safetensors, a shard is missing, a file is broken, or a tensor is unknown or named twice.
    """
    paths, expected = _choose_files(directory)
    tensors: dict[str, Tensor] = {}
    skipped: list[Tensor] = []
    own_names = 0
    metadata: dict[str, str] = {}
    for path in paths:
        stored, about = open_with_metadata(path)
        metadata |= about
        for tensor in stored:
            if expected is not None and expected.pop(tensor.name, path.name) != path.name:
                raise CheckpointError(f"{path}: {shown(tensor.name)} is in another file according to the index")
            if other_part(tensor.name) or is_unused(tensor.name):
                skipped.append(tensor)
                continue
            name = mistral_name(tensor.name)
            if name is None:
                raise CheckpointError(f"{path}: {shown(tensor.name)} is a tensor of no model that is known here")
            if name in tensors:
                raise CheckpointError(f"{path}: {shown(tensor.name)} is there twice, also in {tensors[name].path}")
            if len(tensors) >= _MAX_TENSORS:
                raise CheckpointError(f"{path}: more than {_MAX_TENSORS} tensors in all; no model has as many")
            tensors[name] = tensor
            own_names += name == tensor.name
    if expected:
        missing = next(iter(expected))
        raise CheckpointError(f"{directory / expected[missing]}: {shown(missing)} is missing, though the index has it")
    if 0 < own_names < len(tensors):
        raise CheckpointError(f"{directory}: some tensors bear Mistral's own names, some Hugging Face's")
    if parts := sorted({part for tensor in skipped if (part := other_part(tensor.name))}):
        warn(f"{directory}: only the text model is read, not {', '.join(parts)}")
    row_order: RowOrder = "interleaved" if own_names else "halves"
    return Checkpoint(directory, tuple(paths), tensors, row_order, tuple(skipped), metadata)


def _choose_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files to open, and the index's map from tensor to file name where there is an index."""
    names = [name for name in _FILES if os.path.lexists(directory / name)]  # a link that leads nowhere is told later
    if not names:
        found = [path.name for path in sorted(directory.glob("*")) if path.suffix in (".safetensors", *_PICKLES)]
        raise CheckpointError(
            f"{directory}: found {shown(found) if found else 'no weights'}; expected consolidated.safetensors, "
            "model.safetensors, or shards with model.safetensors.index.json; pickles can run code and are never opened"
        )
    if len(names) > 1:
        warn(f"{directory}: {names[0]} is read, not {' or '.join(names[1:])}")
    path = directory / names[0]
    if path.suffix == ".safetensors":
        return [path], None
    weight_map = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: weight_map is {shown(weight_map)}; expected file names by tensor")
    for tensor, name in weight_map.items():
        if not (isinstance(name, str) and _SHARD.fullmatch(name)):
            raise CheckpointError(f"{path}: {shown(tensor)} is in {shown(name)}; expected a safetensors file beside it")
    return [directory / name for name in sorted(set(weight_map.values()))], weight_map


class _Shelf:
    """The tensors of a checkpoint that nobody has taken yet; taking one checks its dtype and shape."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.left = dict(checkpoint.tensors)
        self.bits, self.group_size = bits_of(checkpoint.metadata, checkpoint.directory)
        self.units = self._units() if self.bits else {}

    def _take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.left.pop(name, None)
        if tensor is None:
            name = name if self.checkpoint.row_order == "interleaved" else huggingface_name(name)
            raise CheckpointError(f"{self.checkpoint.directory}: {name} is missing; expected shape {shape}")
        if tensor.shape != shape:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} has shape {shown(tensor.shape)}; expected {shape} by the configuration"
            )
        return tensor

    def _floats(self, name: str, shape: tuple[int, ...]) -> tuple[Kind, np.ndarray]:
        tensor = self._take(name, shape)
        if tensor.dtype == "F8_E4M3":
            raise CheckpointError(f"{tensor.path}: {tensor.name} is fp8 without its scale; expected F32, F16 or BF16")
        return tensor.mapped()

    def vector(self, name: str, n: int) -> np.ndarray:
        """Take a norm's weight (n,), widened to float32."""
        kind, data = self._floats(f"{name}.weight", (n,))
        return Matrix(name, kind, data[np.newaxis]).rows(slice(None), np.float32)[0]

    def matrix(self, name: str, n_out: int, n_in: int) -> Matrix:
        """Take a matrix (n_out, n_in), with its scale if it is fp8, or its scales if it has codes."""
        if f"{name}.scales" in self.left:
            return self._quantized(name, n_out, n_in)
        tensor = self._take(f"{name}.weight", (n_out, n_in))
        kind, data = tensor.mapped()
        scale = self.left.pop(f"{name}.qscale_weight", None)
        if (scale is None) == (kind == "fp8"):
            problem = "fp8 without its scale" if scale is None else f"{tensor.dtype} with a scale"
            raise CheckpointError(f"{tensor.path}: {tensor.name} is {problem}")
        return Matrix(name, kind, data, None if scale is None else _fp8_scale(scale, n_out, n_in))

    def _quantized(self, name: str, n_out: int, n_in: int) -> QuantizedMatrix:
        """Take a matrix that `quantize` wrote."""
        if name not in self.bits:
            raise CheckpointError(f"{self.checkpoint.directory}: the metadata does not tell how {name} is quantized")
        bits = self.bits[name]
        found = {}
        for ending, part in quantized_parts(n_out, n_in, bits, self.group_size).items():
            tensor = self._take(f"{name}.{ending}", part.shape)
            if tensor.dtype != part.dtype:
                raise CheckpointError(f"{tensor.path}: {tensor.name} is {tensor.dtype}; expected {part.dtype}")
            found[ending] = tensor.raw.reshape(tensor.shape)
        kind: Kind = "int8" if bits == 8 else "int4"
        codes, scales = found["weight"], found["scales"]
        return QuantizedMatrix(name, kind, codes, scales=scales, unit=self.units[name], n_out=n_out, n_in=n_in)

    def _units(self) -> dict[str, np.float32]:
        """Take the units of all matrices that `quantize` wrote."""
        tensor = self._take("units", (len(self.bits),))
        if tensor.dtype != "F32":
            raise CheckpointError(f"{tensor.path}: units is {tensor.dtype}; expected F32")
        units = tensor.mapped()[1]
        if not (np.isfinite(units) & (units > 0) & (np.frexp(units)[0] == 0.5)).all():
            raise CheckpointError(f"{tensor.path}: units are {shown(units.tolist())}; expected powers of two")
        return dict(zip(self.bits, map(np.float32, units), strict=True))

    def experts(self, layer: str, config: ModelConfig) -> ExpertFeedForward:
        """Take a layer's router, and its experts' networks, stored one by one or all in two tensors."""
        assert config.moe is not None
        n, dim, hidden = config.moe.num_experts, config.dim, config.hidden_dim
        names = [f"{layer}.experts.{expert}" for expert in range(n)]
        gate = self.matrix(f"{layer}.gate", n, dim)
        if f"{layer}.experts.w1_w3" not in self.left:
            return ExpertFeedForward(gate, tuple(self.feed_forward(name, config) for name in names))
        kind, w1_w3 = self._floats(f"{layer}.experts.w1_w3", (n, 2 * hidden, dim))
        kind_w2, w2 = self._floats(f"{layer}.experts.w2", (n, dim, hidden))
        fused = (
            FeedForward(
                Matrix(f"{name}.w1", kind, w1_w3[expert, :hidden]),
                Matrix(f"{name}.w2", kind_w2, w2[expert]),
                Matrix(f"{name}.w3", kind, w1_w3[expert, hidden:]),
            )
            for expert, name in enumerate(names)
        )
        return ExpertFeedForward(gate, tuple(fused))

    def feed_forward(self, name: str, config: ModelConfig) -> FeedForward:
        return FeedForward(
            self.matrix(f"{name}.w1", config.hidden_dim, config.dim),
            self.matrix(f"{name}.w2", config.dim, config.hidden_dim),
            self.matrix(f"{name}.w3", config.hidden_dim, config.dim),
        )


def _fp8_scale(tensor: Tensor, n_out: int, n_in: int) -> np.ndarray:
    """Return the scale of an fp8 matrix as float32 (1, 1) or (ceil(n_out/128), ceil(n_in/128))."""
    blocks = (-(-n_out // FP8_BLOCK), -(-n_in // FP8_BLOCK))
    if tensor.dtype == "F8_E4M3" or tensor.shape not in ((), (1,), (1, 1), blocks):
        raise CheckpointError(
            f"{tensor.path}: {tensor.name} is {tensor.dtype} of shape {shown(tensor.shape)}; "
            f"expected one float, or {blocks} of them"
        )
    kind, data = tensor.mapped()
    shape = (1, 1) if data.size == 1 else blocks
    return Matrix(tensor.name, kind, data.reshape(shape)).rows(slice(None), np.float32)


def build_weights(checkpoint: Checkpoint, config: ModelConfig) -> Weights:
    """Return the tensors of a model, every dtype and shape checked, and none left over.

    An output matrix in the files is used. Where there is none the embedding takes its place if the configuration says
    that the two are tied; otherwise it is an error, since a lost shard must not become a tied model.
    """
    shelf = _Shelf(checkpoint)
    tok_embeddings = shelf.matrix("tok_embeddings", config.vocab_size, config.dim)
    layers = tuple(_layer(shelf, f"layers.{number}", config) for number in range(config.n_layers))
    norm = shelf.vector("norm", config.dim)
    if "output.weight" in shelf.left:
        output = shelf.matrix("output", config.vocab_size, config.dim)
    elif config.tied_embeddings:
        output = tok_embeddings
    else:
        raise CheckpointError(
            f"{checkpoint.directory}: output.weight (lm_head.weight) is missing, and not tied by the configuration"
        )
    for tensor in shelf.left.values():
        raise CheckpointError(
            f"{tensor.path}: {shown(tensor.name)} has no place in a model of {config.n_layers} layers"
            f" with{'' if config.moe else 'out'} experts"
        )
    return Weights(tok_embeddings, layers, norm, output)


def _layer(shelf: _Shelf, name: str, config: ModelConfig) -> Layer:
    q_out, kv_out = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    feed_forward = shelf.feed_forward if config.moe is None else shelf.experts
    return Layer(
        attention_norm=shelf.vector(f"{name}.attention_norm", config.dim),
        wq=shelf.matrix(f"{name}.attention.wq", q_out, config.dim),
        wk=shelf.matrix(f"{name}.attention.wk", kv_out, config.dim),
        wv=shelf.matrix(f"{name}.attention.wv", kv_out, config.dim),
        wo=shelf.matrix(f"{name}.attention.wo", config.dim, q_out),
        ffn_norm=shelf.vector(f"{name}.ffn_norm", config.dim),
        feed_forward=feed_forward(f"{name}.feed_forward", config),
    )


def checked_directory(path: str | os.PathLike[str]) -> Path:
    """Return the path of a directory; raise InputError if it is none."""
    if not os.path.isdir(path):
        file = os.path.exists(path)
        raise InputError(
            f"{shown(os.fspath(path))}: "
            + ("not a directory; give the one that holds it" if file else "no such directory")
        )
    return Path(path)


def open_model(path: str | os.PathLike[str]) -> tuple[ModelConfig, Weights]:
    """Return the configuration of the model in a directory, completed by what its files are like, and its weights."""
    directory = checked_directory(path)
    config, checkpoint = read_config(directory), open_checkpoint(directory)
    config = config.replace(rope_row_order=checkpoint.row_order)
    weights = build_weights(checkpoint, config)
    return config.replace(tied_embeddings=weights.output is weights.tok_embeddings), weights
