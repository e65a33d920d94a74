"""One safetensors file: its tensors by name, mapped, without a byte of them being read; or written, all or nothing.

The safetensors library validates the header. It cannot hand bf16 or fp8 to NumPy (safetensors#598), so the bytes are
mapped here, at the offsets that it has accepted. Format: 8 bytes little-endian header length, JSON header, data.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mistral_ref.errors import CheckpointError, InputError, MistralRefError, printable, short_repr
from mistral_ref.files.json_file import MAX_JSON_BYTES, parse_json
from mistral_ref.files.whole_file import whole_file
from mistral_ref.weights import Kind, Matrix

_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}
_KINDS: dict[str, tuple[Kind, str]] = {
    "F32": ("f32", "<f4"),
    "F16": ("f16", "<f2"),
    "BF16": ("bf16", "<u2"),
    "F8_E4M3": ("fp8", "u1"),
}
DTYPES: dict[Kind, str] = {kind: dtype for dtype, (kind, _) in _KINDS.items()}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of a mapped file: the name, dtype and shape that the header gives, and its bytes."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    raw: np.ndarray

    def mapped(self) -> tuple[Kind, np.ndarray]:
        """Return the kind of number and a read-only view of the file, possibly unaligned: bf16 as uint16, fp8 as uint8.

        Raises CheckpointError for a dtype that is none of the four kinds.
        """
        if self.dtype not in _KINDS:
            raise CheckpointError(
                f"{self.path}: {short_repr(self.name)} is {self.dtype}; expected one of {', '.join(_KINDS)}"
            )
        kind, stored = _KINDS[self.dtype]
        return kind, self.raw.view(stored).reshape(self.shape)

    def floats(self) -> np.ndarray:
        """Return the values as float64 or float32, mapped where they are stored so; fp8 is none of these.

        Raises CheckpointError for a dtype other than F64, F32, F16 and BF16.
        """
        if self.dtype == "F64":
            return np.require(self.raw.view("<f8").reshape(self.shape), requirements="A")
        if self.dtype not in ("F32", "F16", "BF16"):
            raise CheckpointError(f"{self.path}: {self.name} is {self.dtype}; expected F64, F32, F16 or BF16")
        kind, stored = self.mapped()
        return Matrix(self.name, kind, stored.reshape(1, -1)).rows(slice(None), np.float32).reshape(self.shape)


def require_regular_file(path: Path) -> int:
    """Return the size of the file at `path` (links followed); raise CheckpointError if it is not a regular file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: not a regular file")
    return status.st_size


def open_tensor_file(path: Path) -> list[Tensor]:
    """Return the tensors of a safetensors file, mapped read-only.

    Raises CheckpointError if it is no regular file, truncated, or its header is too long, broken or contradicts its
    length: offsets that overlap, leave gaps or leave the file.
    """
    return open_with_metadata(path)[0]


def open_with_metadata(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """Return what `open_tensor_file` does, and the file's metadata, {} where it has none."""
    size = require_regular_file(path)
    try:
        header, start = _read_header(path, size)
        mapped = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    metadata = header.pop("__metadata__", None) or {}  # null is as good as none
    return [_tensor(path, name, entry, mapped[start:]) for name, entry in header.items()], metadata


def write_tensor_file(
    path: str | os.PathLike[str],
    tensors: dict[str, np.ndarray],
    metadata: dict[str, str],
    error: type[MistralRefError] = CheckpointError,
) -> None:
    """Write a safetensors file, which appears under its name only when it is complete; raise `error` if that fails."""
    with whole_file(path, error) as partial:
        save_file(tensors, partial, metadata=metadata)


class TensorSpec(NamedTuple):
    """A tensor of a file to be written: its dtype as safetensors spells it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * _SIZES[self.dtype]


def require_space(path: Path, n_bytes: int) -> None:
    """Raise InputError unless the disk under `path` has room for a file of so many bytes, and 1 GiB besides."""
    free = shutil.disk_usage(path.parent).free
    if n_bytes + 2**30 > free:
        raise InputError(
            f"{path}: {n_bytes / 2**30:.1f} GiB are to be written; expected 1 GiB more than that, "
            f"but the disk has {free / 2**30:.1f} GiB left"
        )


@contextmanager
def pieces_of_tensor_file(
    path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, np.ndarray], None]]:
    """Write a safetensors file of any size piece by piece; it appears under its name only when it is complete.

    Gives the function that puts the next piece of a tensor where it belongs: write(name, array). The largest tensors
    come first in the file, so that those of whole vectors begin where vectors like it.

    Raises InputError if the disk has no room, CheckpointError if writing fails.
    """
    require_space(path, sum(spec.nbytes for spec in specs.values()))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    next_bytes, end = {}, 0
    for name, spec in sorted(specs.items(), key=lambda item: -item[1].nbytes):
        next_bytes[name] = end
        end += spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [next_bytes[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with whole_file(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)

        def write(name: str, piece: np.ndarray) -> None:
            file.seek(start + next_bytes[name])
            np.ascontiguousarray(piece).tofile(file)
            next_bytes[name] += piece.nbytes

        yield write


def _read_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """Return the header of a file of `size` bytes, and where its data starts."""
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            raise CheckpointError(f"{path}: truncated, or not a safetensors file: {size} bytes in all")
        if length > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: its header has {length} bytes; at most {MAX_JSON_BYTES} are read")
        try:
            header = parse_json(file.read(length).decode("utf-8"))
            whole = 8 + length + _data_bytes(header)
            if size >= whole:
                with safe_open(path, framework="np"):
                    return header, 8 + length
        except (SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path}: not a valid safetensors file: {printable(str(error))}") from None
        raise CheckpointError(f"{path}: truncated: {size} bytes, and its header tells of {whole}")


def _data_bytes(header: object) -> int:
    """Return where the last tensor ends that a header tells of, which nobody has checked yet."""
    ends = [0]
    for entry in header.values() if isinstance(header, dict) else ():
        match entry:
            case {"data_offsets": [int(), int(end)]}:
                ends.append(end)
    return max(ends)


def _tensor(path: Path, name: str, entry: object, data: np.ndarray) -> Tensor:
    """Return the tensor that an entry of the header describes. The library has checked its numbers, not its form."""
    match entry:
        case {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}:
            return Tensor(path, name, dtype, tuple(shape), data[begin:end])
    raise CheckpointError(
        f"{path}: {short_repr(name)} is {short_repr(entry)}; expected its dtype, shape and data_offsets"
    )
