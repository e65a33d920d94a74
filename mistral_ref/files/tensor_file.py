"""Read and write one safetensors file. Reading maps the tensors into memory; only the header is read.

Format: 8 bytes with the length of the header (little-endian), the header as JSON, the data of the tensors. The
safetensors library checks the header. It cannot hand bf16 or fp8 to NumPy (safetensors#598), so this module maps the
data itself, at the offsets that the library has checked.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from mistral_ref.block_matrix import BLOCK_TYPES
from mistral_ref.errors import CheckpointError, InputError, MistralRefError, printable, short_repr, size
from mistral_ref.files.json_file import MAX_JSON_BYTES, parse_json
from mistral_ref.files.mapped_file import MappedFile, require_regular_file
from mistral_ref.files.paths import refuse_pointer
from mistral_ref.files.whole_file import whole_file
from mistral_ref.weights import BlockKind, Kind, Matrix

_SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}
_SPELLED = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "<i8": "I64", "<i4": "I32", "|u1": "U8"}
_KINDS: dict[str, tuple[Kind, str]] = {
    "F32": ("f32", "<f4"),
    "F16": ("f16", "<f2"),
    "BF16": ("bf16", "<u2"),
    "F8_E4M3": ("fp8", "u1"),
}
BLOCKS: dict[str, BlockKind] = {kind.upper(): kind for kind in BLOCK_TYPES}  # types of GGUF files
DTYPES: dict[Kind | BlockKind, str] = {kind: dtype for dtype, (kind, _) in _KINDS.items()}
DTYPES |= {kind: dtype for dtype, kind in BLOCKS.items()}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a mapped file.

    path    the file
    name, dtype, shape  as in the file; dtype is spelled as safetensors and GGUF spell it: "F32", "BF16", "Q4_K", ...
    raw     the tensor's bytes, a read-only view of the file
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: np.ndarray

    def mapped(self) -> tuple[Kind, np.ndarray]:
        """Return the kind of number, and the tensor as a read-only view of the file: bf16 as uint16, fp8 as uint8.

        The view may be unaligned. Raises CheckpointError unless the dtype is F32, F16, BF16 or F8_E4M3.
        """
        if self.dtype not in _KINDS:
            raise CheckpointError(
                f"{self.path}: {short_repr(self.name)} is {self.dtype}; expected one of {', '.join(_KINDS)}"
            )
        kind, stored = _KINDS[self.dtype]
        return kind, self.raw.view(stored).reshape(self.shape)

    def blocks(self) -> np.ndarray:
        """Return a matrix of a packed type (BLOCKS) as a read-only view of the file: uint8 (O, blocks, bytes)."""
        return self.raw.reshape(self.shape[0], -1, BLOCK_TYPES[BLOCKS[self.dtype]].bytes)

    def floats(self) -> np.ndarray:
        """Return the values as float64 (F64) or float32 (F32, F16 and BF16). F64 and F32 stay mapped if aligned.

        Raises CheckpointError for any other dtype, fp8 too.
        """
        if self.dtype == "F64":
            return np.require(self.raw.view("<f8").reshape(self.shape), requirements="A")
        if self.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"{self.path}: {self.name} is {self.dtype}; expected F64, F32, F16 or BF16")
        kind, stored = self.mapped()
        return Matrix(self.name, kind, stored.reshape(1, -1)).rows(slice(None), np.float32).reshape(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """The contents of a file: its tensors, its metadata ({} without metadata), and the mapping that holds the data.

    Iterate over it to get the tensors.
    """

    tensors: list[Tensor]
    metadata: dict[str, str]
    mapped: MappedFile

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)


def open_tensor_file(path: Path) -> TensorFile:
    """Return the contents of a safetensors file, mapped read-only.

    Raises CheckpointError if it is not a regular file, if it is truncated, or if its header is too long or broken.
    Offsets that overlap, leave gaps or lie outside the file count as broken.
    """
    size = require_regular_file(path)
    try:
        header, start = _read_header(path, size)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    mapped = MappedFile(path)
    if len(mapped.bytes) != size:
        raise CheckpointError(f"{path}: it had {size} bytes and now has {len(mapped.bytes)}; another program writes it")
    metadata = header.pop("__metadata__", None) or {}  # the value may be null
    data = mapped.bytes[start:]
    return TensorFile([_tensor(path, name, entry, data) for name, entry in header.items()], metadata, mapped)


def write_tensor_file(
    path: str | os.PathLike[str],
    tensors: dict[str, np.ndarray],
    metadata: dict[str, str],
    error: type[MistralRefError] = CheckpointError,
) -> None:
    """Write a safetensors file. It gets its name only when it is complete. Raises `error` if writing fails."""
    with whole_file(path, error) as file:
        specs = {name: TensorSpec(_SPELLED[array.dtype.str], array.shape) for name, array in tensors.items()}
        write = begin_tensor_file(file, specs, metadata)
        for name, array in tensors.items():
            write(name, array)


class TensorSpec(NamedTuple):
    """The dtype, as safetensors spells it, and the shape of a tensor of a file."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes in the file."""
        return math.prod(self.shape) * _SIZES[self.dtype]


def require_space(path: Path, n_bytes: int) -> None:
    """Raise InputError unless the disk that `path` will be on has room for `n_bytes` bytes and 1 GiB more."""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(there).free
    if n_bytes + 2**30 > free:
        raise InputError(
            f"{path}: needs {size(n_bytes)}; expected that and 1 GiB more, but the disk has {size(free)} left"
        )


def begin_tensor_file(
    file: BinaryIO, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> Callable[[str, np.ndarray], None]:
    """Write the header of a safetensors file of any size, and return a function write(name, array) for its data.

    The function writes the next piece of a tensor behind the tensor's earlier pieces. Tensors whose sizes are multiples
    of 64 bytes come first in the file. So they begin at multiples of 64 bytes, which vector instructions prefer. Each
    other tensor begins at a multiple of the size of its numbers.
    """

    def order(item: tuple[str, TensorSpec]) -> tuple[bool, int]:
        spec = item[1]
        return spec.nbytes % 64 != 0, -_SIZES[spec.dtype]

    header: dict[str, object] = {"__metadata__": dict(metadata)}
    next_bytes, end = {}, 0
    for name, spec in sorted(specs.items(), key=order):
        next_bytes[name] = end
        end += spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [next_bytes[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    start = file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(start + end)

    def write(name: str, piece: np.ndarray) -> None:
        file.seek(start + next_bytes[name])
        next_bytes[name] += file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)

    return write


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header of a file of `size` bytes, and the offset at which its data starts."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        refuse_pointer(path, prefix + file.read(64), CheckpointError)
        file.seek(8)
        if length > size - 8:
            raise CheckpointError(f"{path}: truncated, or not a safetensors file: it has only {size} bytes")
        if length > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: its header has {length} bytes; expected at most {MAX_JSON_BYTES}")
        try:
            header = parse_json(file.read(length).decode("utf-8"))
            whole = 8 + length + _data_bytes(header)
            if size >= whole:
                with safe_open(path, framework="np"):
                    return header, 8 + length
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: not a valid safetensors file: {printable(str(error))}") from None
        raise CheckpointError(f"{path}: truncated: it has {size} bytes; expected {whole}, as in its header")


def _data_bytes(header: object) -> int:
    """Return the offset at which the last tensor of a header ends. The header need not have been checked."""
    ends = [0]
    for entry in header.values() if isinstance(header, dict) else ():
        match entry:
            case {"data_offsets": [int(), int(end)]}:
                ends.append(end)
    return max(ends)


def _tensor(path: Path, name: str, entry: object, data: np.ndarray) -> Tensor:
    """Return the tensor that an entry of the header describes.

    The library has checked the numbers of the entry. The form of the entry is checked here.
    """
    match entry:
        case {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}:
            return Tensor(path, name, dtype, tuple(shape), data[begin:end])
    raise CheckpointError(
        f"{path}: {short_repr(name)} is {short_repr(entry)}; expected an object of dtype, shape and data_offsets"
    )
