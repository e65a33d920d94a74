"""The format of quantized matrices in a safetensors file: the tensors of each matrix, and the metadata.

    NAME.weight     the codes in tile order, uint8
    NAME.scales     a byte for each scale and each zero, uint8
    units           the unit of each matrix, float32; all its scales are multiplied by it; in the order of the metadata

Padding fills the last tile of rows and the last group of inputs. Extra rows have scale 0, and their results are
dropped. In a row, extra weights are copies of the last weight, and they are multiplied with inputs of 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mistral_kernels.layout import TILE
from mistral_ref.errors import CheckpointError, short_repr
from mistral_ref.files.json_file import parse_json
from mistral_ref.files.tensor_file import TensorSpec
from mistral_ref.quantized_matrix import BITS, GROUP_SIZE, GROUP_SIZES

FORMAT = "mistral_ref.quantized.v1"  # the key of the metadata's entry with the group size and the bits


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


def bits_of(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, int], int]:
    """Return the bits of each quantized matrix by its name, and the group size, from a file's metadata.

    A file without quantized matrices has no such entry; the result is then ({}, GROUP_SIZE). Raises CheckpointError if
    the metadata are damaged, or have another version of this format. `path` is named in the message.
    """
    other = [key for key in metadata if key.startswith(FORMAT.rpartition(".")[0]) and key != FORMAT]
    if other:
        raise CheckpointError(f"{path}: its weights have the format {short_repr(other[0])}; expected {FORMAT}")
    if FORMAT not in metadata:
        return {}, GROUP_SIZE
    try:
        about = parse_json(metadata[FORMAT])
    except ValueError as error:
        raise CheckpointError(f"{path}: {FORMAT} in its metadata cannot be read: {error}") from None
    match about:
        case {"group_size": int(group_size), "bits": dict(bits)} if group_size in GROUP_SIZES:
            wrong = [name for name, found in bits.items() if type(found) is not int or found not in BITS]
            if not wrong:
                return bits, group_size
    raise CheckpointError(
        f"{path}: {FORMAT} in its metadata is {short_repr(about)}; expected a group_size of {GROUP_SIZES}, "
        "and 8 or 4 bits for each matrix"
    )
