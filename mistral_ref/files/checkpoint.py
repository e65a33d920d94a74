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

from mistral_ref.config import RowOrder
from mistral_ref.errors import CheckpointError, InputError, short_repr, warn
from mistral_ref.files.json_file import read_json
from mistral_ref.files.tensor_file import Tensor, open_with_metadata
from mistral_ref.files.tensor_names import is_unused, mistral_name, other_component

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
                raise CheckpointError(f"{path}: {short_repr(tensor.name)} is in another file according to the index")
            if other_component(tensor.name) or is_unused(tensor.name):
                skipped.append(tensor)
                continue
            name = mistral_name(tensor.name)
            if name is None:
                raise CheckpointError(f"{path}: {short_repr(tensor.name)} is a tensor of no model that is known here")
            if name in tensors:
                raise CheckpointError(f"{path}: {short_repr(tensor.name)} is there twice, also in {tensors[name].path}")
            if len(tensors) >= _MAX_TENSORS:
                raise CheckpointError(f"{path}: more than {_MAX_TENSORS} tensors in all; no model has as many")
            tensors[name] = tensor
            own_names += name == tensor.name
    if expected:
        missing = next(iter(expected))
        raise CheckpointError(
            f"{directory / expected[missing]}: {short_repr(missing)} is missing, though the index has it"
        )
    if 0 < own_names < len(tensors):
        raise CheckpointError(f"{directory}: some tensors bear Mistral's own names, some Hugging Face's")
    if parts := sorted({part for tensor in skipped if (part := other_component(tensor.name))}):
        warn(f"{directory}: only the text model is read, not {', '.join(parts)}")
    row_order: RowOrder = "interleaved" if own_names else "halves"
    return Checkpoint(directory, tuple(paths), tensors, row_order, tuple(skipped), metadata)


def _choose_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files to open, and the index's map from tensor to file name where there is an index."""
    names = [name for name in _FILES if os.path.lexists(directory / name)]  # a link that leads nowhere is told later
    if not names:
        found = [path.name for path in sorted(directory.glob("*")) if path.suffix in (".safetensors", *_PICKLES)]
        raise CheckpointError(
            f"{directory}: found {short_repr(found) if found else 'no weights'}; expected consolidated.safetensors, "
            "model.safetensors, or shards with model.safetensors.index.json; pickles can run code and are never opened"
        )
    if len(names) > 1:
        warn(f"{directory}: {names[0]} is read, not {' or '.join(names[1:])}")
    path = directory / names[0]
    if path.suffix == ".safetensors":
        return [path], None
    weight_map = read_json(path, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{path}: weight_map is {short_repr(weight_map)}; expected file names by tensor")
    for tensor, name in weight_map.items():
        if not (isinstance(name, str) and _SHARD.fullmatch(name)):
            raise CheckpointError(
                f"{path}: {short_repr(tensor)} is in {short_repr(name)}; expected a safetensors file beside it"
            )
    return [directory / name for name in sorted(set(weight_map.values()))], weight_map


def checked_directory(path: str | os.PathLike[str]) -> Path:
    """Return the path of a directory; raise InputError if it is none."""
    if not os.path.isdir(path):
        file = os.path.exists(path)
        raise InputError(
            f"{short_repr(os.fspath(path))}: "
            + ("not a directory; give the one that holds it" if file else "no such directory")
        )
    return Path(path)
