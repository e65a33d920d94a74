"""The formats of quantized matrices in a safetensors file: the tensors of each matrix, and the metadata.

    NAME.weight     the codes in tile order, uint8
    NAME.scales     8 and 4 bits: a byte for each scale and each zero, uint8. Packed types of GGUF files: what
                    tiled_matrix.py says
    units           8 and 4 bits: the unit of each matrix, float32; all its scales are multiplied by it; in the order of
                    the metadata

Padding fills the last tile of rows and the last group of inputs. Extra rows have scale 0, and their results are
dropped. In a row, extra weights are copies of the last weight, and they are multiplied with inputs of 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_kernels.layout import TILE
from mistral_ref.block_matrix import BLOCK_TYPES
from mistral_ref.errors import CheckpointError, short_repr
from mistral_ref.files.json_file import parse_json
from mistral_ref.files.tensor_file import TensorSpec
from mistral_ref.quantized_matrix import BITS, GROUP_SIZE, GROUP_SIZES
from mistral_ref.tiled_matrix import tiled_shapes
from mistral_ref.weights import BlockKind

FORMAT = "mistral_ref.quantized.v1"  # the key of the metadata's entry with the group size and the bits
TILES = "mistral_ref.tiles.v1"  # that of the entry with the packed types


def quantized_tensors(n_out: int, n_in: int, bits: int, group_size: int) -> dict[str, TensorSpec]:
    """Return the tensors of one matrix (O, I) in a file, by the endings of their names: "weight" and "scales"."""
    n_tiles, n_groups = -(-n_out // TILE), -(-n_in // group_size)
    return {
        "weight": TensorSpec("U8", (n_tiles, n_groups * group_size * bits // 32, TILE, 4)),
        "scales": TensorSpec("U8", (n_tiles, n_groups, 2, TILE)),
    }


def quantized_metadata(bits: Mapping[str, int], group_size: int) -> dict[str, str]:
    """Return the metadata of a file: the bits of each matrix by its name, and the group size of all matrices.

    >>> quantized_metadata({"output": 8}, 32)
    {'mistral_ref.quantized.v1': '{"group_size": 32, "bits": {"output": 8}}'}
    """
    return {FORMAT: json.dumps({"group_size": group_size, "bits": dict(bits)})}


def tiled_tensors(kind: BlockKind, n_out: int, n_in: int) -> dict[str, TensorSpec]:
    """Return the tensors of one matrix (O, I) of a packed type, by the endings of their names."""
    codes, scales = tiled_shapes(kind, n_out, n_in)
    return {"weight": TensorSpec("U8", codes), "scales": TensorSpec("U8", scales)}


def tiled_metadata(kinds: Mapping[str, BlockKind]) -> dict[str, str]:
    """Return the metadata of a file of packed types: the type of each matrix by its name.

    >>> tiled_metadata({"output": "q6_k"})
    {'mistral_ref.tiles.v1': '{"output": "q6_k"}'}
    """
    return {TILES: json.dumps(dict(kinds))}


def kinds_of(metadata: Mapping[str, str], path: Path) -> dict[str, BlockKind]:
    """Return the type of each matrix that is in tile order, by its name, from a file's metadata.

    Raises CheckpointError if the metadata are damaged. `path` is named in the message.
    """
    kinds = _entry(metadata, TILES, path)
    if not isinstance(kinds, dict):
        raise CheckpointError(f"{path}: {TILES} in its metadata is {short_repr(kinds)}; expected a type for each name")
    for name, kind in kinds.items():
        if not isinstance(kind, str) or kind not in BLOCK_TYPES:
            found = f"{TILES} has {short_repr(kind)} for {short_repr(name)}"
            raise CheckpointError(f"{path}: {found}; expected one of {', '.join(BLOCK_TYPES)}")
    return kinds


def _entry(metadata: Mapping[str, str], key: str, path: Path) -> Any:
    """Return an entry of a file's metadata; {} if it is not there."""
    other = [name for name in metadata if name.startswith(f"{key.rpartition('.')[0]}.") and name != key]
    if other:
        raise CheckpointError(f"{path}: its weights have the format {short_repr(other[0])}; expected {key}")
    if key not in metadata:
        return {}
    try:
        return parse_json(metadata[key])
    except ValueError as error:
        raise CheckpointError(f"{path}: {key} in its metadata cannot be read: {error}") from None


def bits_of(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, int], int]:
    """Return the bits of each quantized matrix by its name, and the group size, from a file's metadata.

    A file without quantized matrices has no such entry; the result is then ({}, GROUP_SIZE). Raises CheckpointError if
    the metadata are damaged, or have another version of this format. `path` is named in the message.
    """
    about = _entry(metadata, FORMAT, path)
    if FORMAT not in metadata:
        return {}, GROUP_SIZE
    match about:
        case {"group_size": int(group_size), "bits": dict(bits)} if group_size in GROUP_SIZES:
            wrong = [name for name, found in bits.items() if type(found) is not int or found not in BITS]
            if not wrong:
                return bits, group_size
    raise CheckpointError(
        f"{path}: {FORMAT} in its metadata is {short_repr(about)}; expected a group_size of {GROUP_SIZES}, "
        "and 8 or 4 bits for each matrix"
    )
