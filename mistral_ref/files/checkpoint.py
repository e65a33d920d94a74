"""Open the weights of a model: every tensor is mapped into memory and gets Mistral's own name.

Three layouts are published. This module reads them all:

    consolidated    consolidated.safetensors; tok_embeddings, layers.0.attention.wq, ...; rows of wq, wk interleaved
    huggingface     model.safetensors, or shards with an index; model.embed_tokens, ...; rows of wq, wk in halves
    gguf            a GGUF file, or its shards; token_embd, blk.0.attn_q, ...; rows of wq, wk interleaved: what makes
                    these files of Hugging Face's layout moves the rows

No weights are copied, and no pickle is opened, because a pickle can run code.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mistral_ref.config import RowOrder
from mistral_ref.errors import CheckpointError, short_repr, warn
from mistral_ref.files.gguf import GGUF
from mistral_ref.files.json_file import read_json
from mistral_ref.files.mapped_file import MappedFile
from mistral_ref.files.tensor_file import Tensor, open_tensor_file
from mistral_ref.files.tensor_names import is_unused, mistral_name, name_of_gguf, other_component

Layout = Literal["consolidated", "huggingface", "gguf"]
# The largest model has several times fewer tensors. Without a limit a hostile file could use up the memory, because a
# tensor's object takes more bytes in memory than the tensor's entry takes in the file.
_MAX_TENSORS = 8_000

# The first of these layouts that a directory holds is read. Each comes in one file, or in shards with an index.
_STEMS: dict[Layout, str] = {"consolidated": "consolidated", "huggingface": "model"}
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl")
_SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")
# Ends of names in GGUF files of models whose pass is another one.
_NOT_COMPUTED = {".bias": "is a bias, and ", "rope_freqs.weight": "divides RoPE's frequencies, and "}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The mapped tensors of one model.

    path        the directory, or the GGUF file (the first shard)
    files       the files
    tensors     each Tensor by Mistral's own name; the Tensor keeps the name that it has in its file
    layout      which layout the tensors' names belong to
    ignored     tensors of other parts of the model (vision), and tensors that the forward pass does not use
    metadata    the entries of "__metadata__" of all safetensors files
    """

    path: Path
    files: tuple[MappedFile, ...]
    tensors: dict[str, Tensor]
    layout: Layout
    ignored: tuple[Tensor, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def row_order(self) -> RowOrder:
        """Which rows of wq and wk form RoPE's pairs; it follows from the layout."""
        return "halves" if self.layout == "huggingface" else "interleaved"


def open_checkpoint(directory: Path, layout: Layout | None = None) -> Checkpoint:
    """Map the weights of a directory into memory and return them as a Checkpoint.

    layout      which layout's files are read. None: if the directory holds both, the consolidated one, with a warning

    Raises CheckpointError if there is no safetensors file, if a shard is missing, if a file is broken, or if a tensor
    is unknown or occurs twice.
    """
    paths, expected = _choose_files(directory, weight_files(directory, layout))
    tensors: dict[str, Tensor] = {}
    ignored: list[Tensor] = []
    files: list[MappedFile] = []
    own_names = 0
    metadata: dict[str, str] = {}
    for path in paths:
        opened = open_tensor_file(path)
        metadata |= opened.metadata
        files.append(opened.mapped)
        for tensor in opened:
            if expected is not None and expected.pop(tensor.name, path.name) != path.name:
                raise CheckpointError(f"{path}: {short_repr(tensor.name)} is in another file according to the index")
            if other_component(tensor.name) or is_unused(tensor.name):
                ignored.append(tensor)
                continue
            name = mistral_name(tensor.name)
            if name is None:
                raise CheckpointError(f"{path}: {short_repr(tensor.name)} belongs to no model that is known here")
            if name in tensors:
                raise CheckpointError(f"{path}: {short_repr(tensor.name)} occurs twice, also in {tensors[name].path}")
            if len(tensors) >= _MAX_TENSORS:
                raise CheckpointError(f"{path}: the model has too many tensors; expected at most {_MAX_TENSORS}")
            tensors[name] = tensor
            own_names += name == tensor.name
    if expected:
        missing = next(iter(expected))
        raise CheckpointError(
            f"{directory / expected[missing]}: {short_repr(missing)} is missing; the index places it in this file"
        )
    if 0 < own_names < len(tensors):
        raise CheckpointError(
            f"{directory}: {own_names} of {len(tensors)} tensors have Mistral's own names, the others Hugging Face's"
        )
    if parts := sorted({part for tensor in ignored if (part := other_component(tensor.name))}):
        warn(f"{directory}: only the text model is read, not {', '.join(parts)}")
    found: Layout = "consolidated" if own_names else "huggingface"
    return Checkpoint(directory, tuple(files), tensors, found, tuple(ignored), metadata)


def weight_files(directory: Path, layout: Layout | None = None) -> list[str]:
    """Return the names of the files, or of the indexes of shards, that begin the weights of a directory.

    The first of them is read. A link that leads nowhere counts: opening it raises an error.
    """
    stems = _STEMS.values() if layout is None else [_STEMS[layout]]
    names = [f"{stem}.safetensors{ending}" for stem in stems for ending in ("", ".index.json")]
    return [name for name in names if os.path.lexists(directory / name)]


def gguf_checkpoint(gguf: GGUF) -> Checkpoint:
    """Return the tensors of a GGUF file as a Checkpoint; the experts of a layer, which lie in one tensor, one by one.

    Raises CheckpointError if a tensor is unknown, or has no place in the models that are known here: biases, and
    divisors of RoPE's frequencies.
    """
    tensors: dict[str, Tensor] = {}
    for tensor in gguf.tensors:
        name = name_of_gguf(tensor.name)
        if name is None:
            what = next((what for end, what in _NOT_COMPUTED.items() if tensor.name.endswith(end)), "")
            raise CheckpointError(
                f"{tensor.path}: {short_repr(tensor.name)} {what}belongs to no model that is known here"
            )
        for part_name, part in _experts(name, tensor) if ".experts.w" in name else [(name, tensor)]:
            if part_name in tensors:
                raise CheckpointError(
                    f"{tensor.path}: {short_repr(tensor.name)} and {short_repr(tensors[part_name].name)} are the same"
                )
            if len(tensors) >= _MAX_TENSORS:
                raise CheckpointError(f"{tensor.path}: the model has too many tensors; expected at most {_MAX_TENSORS}")
            tensors[part_name] = part
    return Checkpoint(gguf.path, gguf.files, tensors, "gguf")


def _experts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield each expert of a tensor (E, O, I), with its name."""
    if len(tensor.shape) != 3:
        raise CheckpointError(
            f"{tensor.path}: {short_repr(tensor.name)} has shape {short_repr(tensor.shape)}; expected experts (E, O, I)"
        )
    n_bytes = tensor.raw.nbytes // tensor.shape[0]
    for expert in range(tensor.shape[0]):
        raw = tensor.raw[expert * n_bytes : (expert + 1) * n_bytes]
        part = Tensor(tensor.path, f"{tensor.name}[{expert}]", tensor.dtype, tensor.shape[1:], raw)
        yield name.replace(".experts.", f".experts.{expert}."), part


def _choose_files(directory: Path, names: list[str]) -> tuple[list[Path], dict[str, str] | None]:
    """Return the paths of the files to open, and the index's map from tensor to file name (None without an index)."""
    if not names:
        found = [path.name for path in sorted(directory.glob("*")) if path.suffix in (".safetensors", *PICKLES)]
        raise CheckpointError(
            f"{directory}: found {short_repr(found) if found else 'no weights'}; expected consolidated.safetensors, "
            "model.safetensors, or shards with model.safetensors.index.json (pickles can run code and are never opened)"
        )
    if len(names) > 1:
        warn(f"{directory}: {names[0]} is read, not {' or '.join(names[1:])}")
    path = directory / names[0]
    if path.suffix == ".safetensors":
        return [path], None
    weight_map = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: weight_map is {short_repr(weight_map)}; expected file names of the tensors")
    for tensor, name in weight_map.items():
        if not (isinstance(name, str) and _SHARD.fullmatch(name)):
            raise CheckpointError(
                f"{path}: {short_repr(tensor)} is in {short_repr(name)}; expected a safetensors file in this directory"
            )
    return [directory / name for name in sorted(set(weight_map.values()))], weight_map
