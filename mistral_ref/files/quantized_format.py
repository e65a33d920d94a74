"""Quantized matrices in a safetensors file: which tensors hold one, and what the metadata say of all.

    NAME.weight     the codes in tile order, uint8
    NAME.scales     codes of scales and zeros, uint8
    units           what the scales of each matrix are multiplied by, float32, in the order of the metadata

Rows beyond O, which make whole tiles, have scales of 0, and nothing is kept of what they give. Inputs beyond I, which
make whole groups, have the codes that the row's last weight repeated gets, and meet inputs of 0.
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

FORMAT = "mistral_ref.quantized.v1"  # the entry in a file's metadata that says how its matrices are rounded


def quantized_tensors(n_out: int, n_in: int, bits: int, group_size: int) -> dict[str, TensorSpec]:
    """Return what a file holds of a matrix: codes, and scales and zeros, by the endings of their names."""
    n_tiles, n_groups = -(-n_out // TILE), -(-n_in // group_size)
    return {
        "weight": TensorSpec("U8", (n_tiles, n_groups * group_size * bits // 32, TILE, 4)),
        "scales": TensorSpec("U8", (n_tiles, n_groups, 2, TILE)),
    }


def quantized_metadata(bits: Mapping[str, int], group_size: int) -> dict[str, str]:
    """Return the metadata of a file with these matrices: the bits of each, and the groups of all.

    >>> quantized_metadata({"output": 8}, 32)
    {'mistral_ref.quantized.v1': '{"group_size": 32, "bits": {"output": 8}}'}
    """
    return {FORMAT: json.dumps({"group_size": group_size, "bits": dict(bits)})}


def bits_of(metadata: Mapping[str, str], path: Path) -> tuple[dict[str, int], int]:
    """Return the bits of each matrix that a file's metadata tells of, and their group size; none where it tells none.

    Raises CheckpointError if the metadata is damaged, or of another version.
    """
    other = [key for key in metadata if key.startswith(FORMAT.rpartition(".")[0]) and key != FORMAT]
    if other:
        raise CheckpointError(f"{path}: its weights are {short_repr(other[0])}; this version reads {FORMAT}")
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
