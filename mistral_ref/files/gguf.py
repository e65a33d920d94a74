"""Open a GGUF file, or all shards of one: its metadata, and its tensors, mapped into memory.

A file of version 2 or 3, little-endian: the four letters GGUF, the version, the numbers of tensors and of fields, then

    fields      for each its name, its type and its value: a number, a text, or an array of these
    tensors     for each its name, its shape (inputs first), its type, and where its data begin
    data        the tensors, each at a multiple of general.alignment bytes

A length or a number in the file may be a lie. So none is used before it is compared with the bytes that are left.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.block_matrix import BLOCK_TYPES
from mistral_ref.errors import CheckpointError, short_repr
from mistral_ref.files.mapped_file import MappedFile
from mistral_ref.files.paths import refuse_pointer
from mistral_ref.files.tensor_file import BLOCKS, Tensor

MAGIC = b"GGUF"
# Published files have some 60 fields, 1,100 tensors, and 400,000 texts in arrays: tokens and merges.
_MAX_FIELDS, _MAX_TENSORS, _MAX_LISTED = 1_000, 8_000, 800_000
_MAX_TEXT_BYTES = 4 * 2**20  # of all names and texts that are no part of an array
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1"}
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _FLOAT32, _TEXT, _ARRAY = 7, 6, 8, 9
_TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K"}
_TYPES |= {12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16"}
_OTHER_TYPES = {9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S"}
_OTHER_TYPES |= {22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M"}
_OTHER_TYPES |= {34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"}
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_SHARD = re.compile(r"(.*-)(\d{5})(-of-\d{5}\.gguf)", re.DOTALL)


@dataclass(frozen=True, eq=False, repr=False)
class Texts:
    """An array of texts in a mapped file. Iterate over it to get the bytes of each.

    data    the bytes of the file
    start   where the first text begins
    n       number of texts
    """

    data: np.ndarray
    start: int
    n: int

    def __repr__(self) -> str:
        return f"<{self.n} texts>"

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[bytes]:
        at = self.start
        data = memoryview(self.data)  # type: ignore[arg-type]
        for _ in range(self.n):
            (length,) = _U64.unpack_from(data, at)
            yield data[at + 8 : at + 8 + length].tobytes()
            at += 8 + length


@dataclass(frozen=True, eq=False)
class GGUF:
    """The contents of a GGUF file, or of all its shards.

    path        the file, or the first shard
    files       the mapped files
    metadata    the fields of the first file: int, float, bool, str, a NumPy array of numbers, or Texts. A float32 is
                the shortest decimal number that rounds to it: 1e-5
    tensors     the tensors of all files
    """

    path: Path
    files: tuple[MappedFile, ...]
    metadata: dict[str, Any]
    tensors: list[Tensor]


_U64 = struct.Struct("<Q")


def open_gguf(path: Path) -> GGUF:
    """Return the contents of a GGUF file, mapped read-only. `path` is the file, or the first of its shards.

    Raises CheckpointError if a file is missing, broken, truncated, of another version or of big-endian numbers, if a
    tensor's type is not supported, if tensors overlap, or if a name occurs twice.
    """
    opened = _read_file(path)
    n_shards, number = (opened.metadata.get(f"split.{name}", 0) for name in ("count", "no"))
    if type(n_shards) is not int or type(number) is not int:
        raise CheckpointError(f"{path}: split.count and split.no are no whole numbers; expected whole numbers")
    if n_shards in (0, 1):
        return opened
    name = _SHARD.fullmatch(path.name)
    if name is None or name[3] != f"-of-{n_shards:05}.gguf" or number != 0 or name[2] != "00001":
        expected = "NAME-00001-of-00003.gguf" if name is None else f"{name[1]}00001{name[3]}"
        raise CheckpointError(
            f"{path}: split.no is {short_repr(number)} and split.count is {short_repr(n_shards)}; "
            f"expected the first shard, a file named as {expected}"
        )
    shards = [opened]
    n_tensors = len(opened.tensors)
    for number in range(1, n_shards):
        shard = _read_file(path.with_name(f"{name[1]}{number + 1:05}{name[3]}"), _MAX_TENSORS - n_tensors)
        found = [shard.metadata.get(f"split.{name}") for name in ("no", "count")]
        if any(type(one) is not int for one in found) or found != [number, n_shards]:
            problem = f"split.no and split.count are {short_repr(found)}; expected {[number, n_shards]}"
            raise CheckpointError(f"{shard.path}: {problem}")
        shards.append(shard)
        n_tensors += len(shard.tensors)
    said = opened.metadata.get("split.tensors.count", n_tensors)
    if type(said) is not int or said != n_tensors:
        raise CheckpointError(f"{path}: split.tensors.count is {short_repr(said)}; its shards have {n_tensors} tensors")
    files = tuple(file for shard in shards for file in shard.files)
    return GGUF(path, files, opened.metadata, [tensor for shard in shards for tensor in shard.tensors])


def gguf_header(path: Path) -> GGUF:
    """Return what the header of one file says, even if the tensors' data are not there; the tensors have no bytes.

    Raises CheckpointError if the header is broken or cut.
    """
    mapped, metadata, entries, _ = _read_header(path, _MAX_TENSORS)
    tensors = [Tensor(path, one.name, _TYPES.get(one.type, ""), one.shape, mapped.bytes[:0]) for one in entries]
    return GGUF(path, (mapped,), metadata, tensors)


def raw_fields(path: Path) -> dict[str, bytes]:
    """Return the fields of a file by their names, each with its name and its type, as the bytes in the file."""
    reader = _Reader(path, MappedFile(path).bytes)
    _, n_fields = reader.beginning(_MAX_TENSORS)
    return {field.name: reader.data[field.place].tobytes() for field in reader.fields(n_fields)}


def _read_file(path: Path, most_tensors: int = _MAX_TENSORS) -> GGUF:
    """Return the contents of one file."""
    mapped, metadata, entries, end = _read_header(path, most_tensors)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {short_repr(alignment)}; expected a power of two")
    start = -(-end // alignment) * alignment
    tensors = [entry.tensor(path, mapped.bytes[start:], start, alignment) for entry in entries]
    _check_overlap(path, entries)
    return GGUF(path, (mapped,), metadata, tensors)


def _read_header(path: Path, most_tensors: int) -> tuple[MappedFile, dict[str, Any], list[_Entry], int]:
    """Return a file, the fields and the list of tensors in its header, and where the header ends."""
    mapped = MappedFile(path)
    reader = _Reader(path, mapped.bytes)
    n_tensors, n_fields = reader.beginning(most_tensors)
    metadata = {field.name: field.value for field in reader.fields(n_fields)}
    return mapped, metadata, [reader.tensor() for _ in range(n_tensors)], reader.at


class _Field(NamedTuple):
    """A field of the header, and the bytes in the file in which it lies, with its name."""

    name: str
    value: Any
    place: slice


class _Reader:
    """Reads the header of a file from its beginning. `at` is the next byte."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        self.path, self.data, self.at = path, data, 0
        self.text_bytes = self.n_listed = 0

    def take(self, n_bytes: int) -> np.ndarray:
        """Return the next bytes; raise CheckpointError if the file ends before."""
        if n_bytes > len(self.data) - self.at:
            raise self.cut()
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def cut(self) -> CheckpointError:
        """Return the error about a header that goes on behind the end of the file."""
        return CheckpointError(f"{self.path}: truncated, or broken: its header ends behind its {len(self.data)} bytes")

    def numbers(self, dtype: str, n: int) -> np.ndarray:
        """Return the next n numbers."""
        return self.take(n * np.dtype(dtype).itemsize).view(dtype)

    def number(self, dtype: str) -> Any:
        """Return the next number as a Python number."""
        return self.numbers(dtype, 1)[0].item()

    def count(self, what: str, most: int) -> int:
        """Return the next number of 8 bytes, which counts something; raise CheckpointError if it is above `most`."""
        found: int = self.number("<u8")
        if found > most:
            raise CheckpointError(f"{self.path}: has {found} {what}; expected at most {most}")
        return found

    def beginning(self, most_tensors: int) -> tuple[int, int]:
        """Read up to the fields; return the numbers of tensors and of fields."""
        beginning = self.data[:64].tobytes()
        refuse_pointer(self.path, beginning, CheckpointError)
        if not beginning.startswith(MAGIC):
            raise CheckpointError(f"{self.path}: begins with {short_repr(beginning[:4])}; expected {MAGIC!r}")
        self.take(4)
        version = self.number("<u4")
        if version not in (2, 3):
            big = " (a file of big-endian numbers)" if version in (2 << 24, 3 << 24) else ""
            raise CheckpointError(f"{self.path}: GGUF version is {version}{big}; expected 2 or 3")
        return self.count("tensors", most_tensors), self.count("fields", _MAX_FIELDS)

    def text(self) -> str:
        """Return the next text. Bytes that are not UTF-8 become U+FFFD."""
        text = self.take(self.number("<u8"))
        self.text_bytes += len(text)
        if self.text_bytes > _MAX_TEXT_BYTES:
            raise CheckpointError(f"{self.path}: has texts of over {_MAX_TEXT_BYTES} bytes in its header, the maximum")
        return text.tobytes().decode(errors="replace")

    def fields(self, n: int) -> Iterator[_Field]:
        """Yield the next n fields. Raises CheckpointError if a name occurs twice."""
        names = set()
        for _ in range(n):
            start, name = self.at, self.text()
            if name in names:
                raise CheckpointError(f"{self.path}: field {short_repr(name)} occurs twice")
            names.add(name)
            yield _Field(name, self.value(name), slice(start, self.at))

    def value(self, name: str) -> Any:
        """Return the value of a field, which begins with its type."""
        kind = self.number("<u4")
        if kind == _TEXT:
            return self.text()
        if kind == _ARRAY:
            return self.array(name)
        number = self.number(self.dtype(name, kind))
        return bool(number) if kind == _BOOL else float(str(np.float32(number))) if kind == _FLOAT32 else number

    def array(self, name: str) -> np.ndarray | Texts:
        """Return an array, which begins with the type of its members and their number."""
        kind, n = self.number("<u4"), self.number("<u8")
        if kind != _TEXT:
            return self.numbers(self.dtype(name, kind), n)
        self.n_listed += n
        if self.n_listed > _MAX_LISTED:
            raise CheckpointError(f"{self.path}: has over {_MAX_LISTED} texts in its arrays, the maximum")
        start = at = self.at
        data: Any = memoryview(self.data)  # type: ignore[arg-type]
        last, length_at = len(self.data) - 8, _U64.unpack_from
        for _ in range(n):  # hundreds of thousands in a file
            if at > last:
                raise self.cut()
            at += 8 + length_at(data, at)[0]
        self.take(at - start)
        return Texts(self.data, start, n)

    def dtype(self, name: str, kind: int) -> str:
        """Return NumPy's name of a type of numbers."""
        if kind not in _NUMBERS:
            found = "an array of arrays" if kind == _ARRAY else f"of type {kind}"
            raise CheckpointError(f"{self.path}: field {short_repr(name)} is {found}; expected numbers or texts")
        return _NUMBERS[kind]

    def tensor(self) -> _Entry:
        """Return the next entry of the list of tensors."""
        name, n_axes = self.text(), self.number("<u4")
        if not 1 <= n_axes <= 4:
            raise CheckpointError(f"{self.path}: {short_repr(name)} has {n_axes} axes; expected 1 to 4")
        shape = tuple(self.numbers("<u8", n_axes)[::-1].tolist())
        return _Entry(name, shape, self.number("<u4"), self.number("<u8"))


@dataclass
class _Entry:
    """A tensor in the header: its type's number, and the distance of its data from the first tensor's."""

    name: str
    shape: tuple[int, ...]
    type: int
    begin: int
    end: int = 0

    def tensor(self, path: Path, data: np.ndarray, start: int, alignment: int) -> Tensor:
        """Return the tensor. `data` are the bytes of the file from byte `start` on."""
        where = f"{path}: {short_repr(self.name)}"
        dtype = _TYPES.get(self.type)
        if dtype is None:
            found = _OTHER_TYPES.get(self.type, f"of type {self.type}")
            raise CheckpointError(f"{where} is {found}; expected one of {', '.join(_TYPES.values())}")
        block = BLOCK_TYPES[BLOCKS[dtype]] if dtype in BLOCKS else None
        n_weights, n_bytes = (1, _FLOAT_BYTES[dtype]) if block is None else (block.weights, block.bytes)
        n_blocks, rest = divmod(self.shape[-1], n_weights)
        if rest or 0 in self.shape:
            raise CheckpointError(
                f"{where} has rows of {self.shape[-1]} weights, shape {short_repr(self.shape)}, in {dtype}; "
                f"expected multiples of {n_weights}"
            )
        self.end = self.begin + math.prod(self.shape[:-1]) * n_blocks * n_bytes
        if self.begin % alignment:
            raise CheckpointError(f"{where} begins at {self.begin}; expected a multiple of {alignment}")
        if self.end > len(data):
            raise CheckpointError(
                f"{where} ends at byte {short_repr(start + self.end)}, but the file has {start + len(data)} bytes; "
                "expected a whole file"
            )
        return Tensor(path, self.name, dtype, self.shape, data[self.begin : self.end])


def _check_overlap(path: Path, entries: list[_Entry]) -> None:
    """Raise CheckpointError if two tensors share a name or a byte."""
    names = set()
    for entry in entries:
        if entry.name in names:
            raise CheckpointError(f"{path}: {short_repr(entry.name)} occurs twice")
        names.add(entry.name)
    in_order = sorted(entries, key=lambda entry: entry.begin)
    for first, second in pairwise(in_order):
        if second.begin < first.end:
            raise CheckpointError(f"{path}: {short_repr(first.name)} and {short_repr(second.name)} overlap")
