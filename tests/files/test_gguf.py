"""GGUF files: what is read of them, and every way in which one may be wrong."""

from __future__ import annotations

import dataclasses
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import FAMILIES, draw_weights
from support.errors import refused
from support.gguf_files import family_tensors, stored, write_gguf
from support.paths import GOLDEN

import mistral_ref
from mistral_ref.errors import CheckpointError, InputError, MistralRefError
from mistral_ref.files.checkpoint import gguf_checkpoint
from mistral_ref.files.gguf import Texts, open_gguf
from mistral_ref.files.gguf_writer import Stored, Typed, config_fields, gguf_bytes
from mistral_ref.files.paths import checked_model

TINY, MIXTURE = FAMILIES["llama"], FAMILIES["mixtral"]
TINY = dataclasses.replace(TINY, config=TINY.config.replace(dim=32))
FIELDS = config_fields(TINY.config)
TENSORS = family_tensors(draw_weights(TINY))
SMALL = {"a.weight": stored(np.arange(6).reshape(2, 3)), "b.weight": stored(np.arange(4))}


def write(path: Path, fields: dict[str, Any] | None = None, tensors: Any = None, **settings: Any) -> Path:
    path.write_bytes(gguf_bytes({} if fields is None else fields, tensors, **settings))
    return path


# ------------------------------------------------------------------------------------------------------ what is there


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [1, 8, 32, 64])
def test_fields_and_tensors(version: int, alignment: int, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "text": "aé\n",
        "broken text": b"a\xff",
        "true": True,
        "one hundred thousandth": 1e-5,
        "numbers": Typed("i16", [-3, 4]),
        "texts": ["", "Ġthe", "é"],
        "none": [],
        "last": Typed("u64", 2**64 - 1),
    }
    for name, value in {"u8": 255, "i8": -1, "u16": 3, "i16": -3, "u32": 4, "i32": -4, "i64": -(2**40)}.items():
        fields[name] = Typed(name, value)
    fields["f64"] = Typed("f64", 0.1)
    gguf = open_gguf(write(tmp_path / "a.gguf", fields, SMALL, version=version, alignment=alignment))
    found = gguf.metadata
    assert {name: found[name] for name in ("text", "broken text", "true")} == {
        "text": "aé\n",
        "broken text": "a\ufffd",
        "true": True,
    }
    assert found["one hundred thousandth"] == 1e-5  # and not 9.99999974e-06, the float32 next to it
    assert found["numbers"].tolist() == [-3, 4]
    assert isinstance(found["texts"], Texts)
    assert [text.decode() for text in found["texts"]] == fields["texts"]
    assert (len(found["none"]), found["last"], found["f64"]) == (0, 2**64 - 1, 0.1)
    assert {name: found[name] for name in ("u8", "i8", "i64")} == {"u8": 255, "i8": -1, "i64": -(2**40)}
    for tensor in gguf.tensors:
        expected = SMALL[tensor.name]
        assert (tensor.dtype, tensor.shape, tensor.raw.tobytes()) == ("F32", expected.shape, expected.raw)
        assert gguf.files[0].holds(tensor.raw)


def test_a_file_without_tensors_ends_with_its_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"a": "b"})
    path.write_bytes(path.read_bytes().rstrip(b"\0"))
    assert open_gguf(path).metadata == {"a": "b"}


def shards_of(folder: Path, n: int, **last: Any) -> list[Path]:
    """Write a tiny model in n shards; `last` are fields of the last one."""
    names, paths = list(TENSORS), []
    for number in range(n):
        fields = FIELDS if number == 0 else {}
        count = {"split.no": Typed("u16", number), "split.count": Typed("u16", n)}
        count["split.tensors.count"] = Typed("i32", len(TENSORS))
        count |= last if number == n - 1 else {}
        part = {name: TENSORS[name] for name in names[number::n]}
        paths.append(write(folder / f"tiny-{number + 1:05}-of-{n:05}.gguf", fields | count, part))
    return paths


def test_shards_are_one_model(tmp_path: Path) -> None:
    paths = shards_of(tmp_path, 3)
    whole = tmp_path / "whole"
    whole.mkdir()
    write(whole / "whole.gguf", FIELDS, TENSORS)
    expected = mistral_ref.load(whole, backend="numpy").forward([1, 2, 3])
    for source in (paths[0], tmp_path):
        model = mistral_ref.load(source, backend="numpy")
        np.testing.assert_array_equal(model.forward([1, 2, 3]), expected)
        assert [file.path for file in model.weights.files] == paths


def test_shards_that_are_wrong(tmp_path: Path) -> None:
    paths = shards_of(tmp_path, 3)
    with refused(CheckpointError, paths[1], 1, "tiny-00001-of-00003.gguf"):
        open_gguf(paths[1])
    renamed = paths[0].rename(tmp_path / "tiny.gguf")
    with refused(CheckpointError, renamed, 0, 3):
        open_gguf(renamed)
    renamed.rename(paths[0])
    paths[2].unlink()
    with refused(CheckpointError, paths[2]):
        open_gguf(paths[0])
    for last in (
        {"split.no": Typed("u16", 1)},
        {"split.count": Typed("u16", 2)},
        {"split.count": Typed("u16", [3, 3])},
        {"split.no": "2"},
    ):
        shards_of(tmp_path, 3, **last)
        with refused(CheckpointError, paths[2], "split.no", "split.count"):
            open_gguf(paths[0])
    shards_of(tmp_path, 3)
    write(paths[2], {"split.no": Typed("u16", 2), "split.count": Typed("u16", 3)}, {})
    with refused(CheckpointError, paths[0], "split.tensors.count", len(TENSORS)):
        open_gguf(paths[0])
    for wrong in ("three", Typed("i16", [1]), Typed("i16", -3)):
        path = write(tmp_path / "wrong.gguf", {"split.count": wrong})
        with refused(CheckpointError, path, "split.count"):
            open_gguf(path)


def test_which_file_of_a_directory_is_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model-Q8_0.gguf", TINY)
    for name in ("mmproj-model-f16.gguf", "README.md"):
        (tmp_path / name).write_bytes(b"GGUF")
    assert checked_model(tmp_path) == tmp_path / "model-Q8_0.gguf"
    shutil.copy(tmp_path / "model-Q8_0.gguf", tmp_path / "a blob")  # told by its content
    assert checked_model(tmp_path / "a blob") == tmp_path / "a blob"
    assert mistral_ref.load(tmp_path / "a blob", backend="numpy").forward([1]).shape == (1, TINY.config.vocab_size)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "model.gguf").symlink_to(tmp_path / "a blob")  # as in the hub's cache
    assert checked_model(tmp_path / "links") == tmp_path / "links" / "model.gguf"
    assert mistral_ref.load(tmp_path / "links", backend="numpy").forward([1]).shape == (1, TINY.config.vocab_size)
    write_gguf(tmp_path / "model-Q4_0.gguf", TINY)
    with refused(InputError, tmp_path, "model-Q4_0.gguf", "model-Q8_0.gguf"):
        mistral_ref.load(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert checked_model(tmp_path) == tmp_path
    (tmp_path / "folder.gguf").mkdir()
    assert checked_model(tmp_path / "folder.gguf") == tmp_path / "folder.gguf"


# --------------------------------------------------------------------------------------------------- what is refused


def lying(**changes: Any) -> bytes:
    """Return a file whose first tensor is not what its header says."""
    tensor = SMALL["a.weight"]._replace(**changes)
    return gguf_bytes({}, {"a.weight": tensor, "b.weight": SMALL["b.weight"]})


WHOLE = gguf_bytes({"general.name": "tiny"}, SMALL)
WRONG: dict[str, tuple[bytes, tuple[object, ...]]] = {
    "empty": (b"", ("empty",)),
    "not GGUF": (b"PK\3\4" + bytes(80), (b"PK\3\4", b"GGUF")),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", ("LFS",)),
    "version 1": (WHOLE[:4] + struct.pack("<I", 1) + WHOLE[8:], (1, 2, 3)),
    "version 4": (WHOLE[:4] + struct.pack("<I", 4) + WHOLE[8:], (4, 2, 3)),
    "big-endian": (WHOLE[:4] + struct.pack(">I", 3) + WHOLE[8:], ("big-endian",)),
    "many tensors": (WHOLE[:8] + struct.pack("<Q", 2**63) + WHOLE[16:], (2**63, "tensors")),
    "many fields": (WHOLE[:16] + struct.pack("<Q", 2**64 - 1) + WHOLE[24:], (2**64 - 1, "fields")),
    "a long name": (WHOLE[:24] + struct.pack("<Q", 2**64 - 1) + WHOLE[32:], ("truncated", len(WHOLE))),
    "a field twice": (
        gguf_bytes({"a": 1, "b": 2}).replace(b"\1\0\0\0\0\0\0\0b", b"\1\0\0\0\0\0\0\0a"),
        ("'a'", "twice"),
    ),
    "a type of field": (gguf_bytes({"a": 1}).replace(b"a\4\0\0\0", b"a\x0d\0\0\0"), ("'a'", 13)),
    "an array of arrays": (
        gguf_bytes({"a": Typed("u32", [7])}).replace(b"a\x09\0\0\0\4", b"a\x09\0\0\0\x09"),
        ("'a'", "array"),
    ),
    "a long array": (
        gguf_bytes({"a": Typed("u32", [7])}).replace(struct.pack("<IQ", 4, 1), struct.pack("<IQ", 4, 2**62)),
        ("truncated",),
    ),
    "many texts": (
        gguf_bytes({"a": ["b"]}).replace(struct.pack("<IQ", 8, 1), struct.pack("<IQ", 8, 2**60)),
        ("texts", 800_000),
    ),
    "texts behind the end": (
        gguf_bytes({"a": ["b"]}).replace(struct.pack("<IQ", 8, 1), struct.pack("<IQ", 8, 700_000)),
        ("truncated",),
    ),
    "a long text": (gguf_bytes({"a": "b" * (4 * 2**20)}), ("texts", 4 * 2**20)),
    "alignment of 3": (gguf_bytes({"general.alignment": 3}), ("general.alignment", 3)),
    "alignment of 0": (gguf_bytes({"general.alignment": 0}), ("general.alignment", 0)),
    "no axes": (lying(shape=()), ("'a.weight'", 0)),
    "five axes": (lying(shape=(1,) * 5), ("'a.weight'", 5)),
    "no rows": (lying(shape=(0, 3)), ("'a.weight'", "(0, 3)")),
    "rows that overflow": (lying(shape=(2**62, 2**62)), ("'a.weight'", len(WHOLE) - 32)),
    "rows that overflow to a little": (lying(shape=(2**62 + 1, 16)), ("'a.weight'",)),
    "part of a block": (lying(dtype="Q4_K", shape=(2, 255)), ("'a.weight'", 255, "Q4_K", 256)),
    "a type that is not read": (lying(dtype=17), ("'a.weight'", "IQ2_XS", "Q4_K")),
    "an unknown type": (lying(dtype=99), ("'a.weight'", 99)),
    "a place that is no multiple": (lying(begin=4), ("'a.weight'", 4, 32)),
    "a place behind the end": (lying(begin=2**63), ("'a.weight'", "bytes")),
    "overlap": (lying(begin=32), ("'a.weight'", "'b.weight'", "overlap")),
    "a tensor twice": (WHOLE.replace(b"b.weight", b"a.weight"), ("'a.weight'", "twice")),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name: str, tmp_path: Path) -> None:
    content, facts = WRONG[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with refused(CheckpointError, path, *facts):
        open_gguf(path)
    with refused(MistralRefError, path, *facts):
        mistral_ref.load(path)


def test_a_file_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path, content = tmp_path / "a.gguf", gguf_bytes({"a": "b", "c": ["d"], "e": Typed("u8", [1])}, SMALL)
    end = len(content) - 16  # behind the last tensor there is padding
    for length in range(1, end):
        path.write_bytes(content[:length])
        with refused(CheckpointError, path):
            open_gguf(path)
    path.write_bytes(content[:end])
    assert len(open_gguf(path).tensors) == 2


@pytest.mark.parametrize("name", ["missing.gguf", "folder.gguf"])
def test_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder.gguf").mkdir()
    with refused(MistralRefError, tmp_path / name):
        mistral_ref.load(tmp_path / name)


STRANGE: dict[str, dict[str, Stored | None]] = {
    "blk.0.attn_q.bias": {"blk.0.attn_q.bias": stored(np.zeros(8))},
    "rope_freqs.weight": {"rope_freqs.weight": stored(np.ones(4))},
    "blk.0.attn_q_norm.weight": {"blk.0.attn_q_norm.weight": stored(np.ones(8))},
    "v.blk.0.attn_q.weight": {"v.blk.0.attn_q.weight": stored(np.ones((2, 2)))},
    "blk.00.attn_q.weight": {"blk.00.attn_q.weight": stored(np.ones((2, 2)))},
    "blk.7.attn_q.weight": {"blk.7.attn_q.weight": TENSORS["blk.0.attn_q.weight"]},
    "blk.1.attn_v.weight": {"blk.1.attn_v.weight": None},
    "output_norm.weight": {"output_norm.weight": stored(np.ones(23))},
    "blk.0.ffn_norm.weight": {"blk.0.ffn_norm.weight": Stored("Q8_0", (32,), bytes(34))},
    "blk.0.ffn_up_exps.weight": {"blk.0.ffn_up_exps.weight": stored(np.ones((2, 3)))},
}


@pytest.mark.parametrize("name", STRANGE)
def test_tensors_that_have_no_place_are_named(name: str, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in (TENSORS | STRANGE[name]).items() if tensor is not None}
    path = write(tmp_path / "a.gguf", FIELDS, tensors)
    with refused(CheckpointError, path, name):
        mistral_ref.load(path)


def test_experts_in_both_ways_are_the_same_tensor(tmp_path: Path) -> None:
    weights = draw_weights(MIXTURE)
    tensors = family_tensors(weights) | family_tensors(weights, stacked=False)
    path = write(tmp_path / "a.gguf", config_fields(MIXTURE.config), tensors)
    with refused(CheckpointError, path, "'blk.0.ffn_gate.0.weight'", "'blk.0.ffn_gate_exps.weight[0]'"):
        gguf_checkpoint(open_gguf(path))


def test_more_experts_than_any_model_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", FIELDS, TENSORS | {"blk.0.ffn_up_exps.weight": stored(np.ones((9000, 1, 1)))})
    with refused(CheckpointError, path, 8_000):
        mistral_ref.load(path)


# ------------------------------------------------------------------------------------------------ numbers of any size


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=3))
def test_a_float_is_the_shortest_decimal_that_is_it(values: list[float]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gguf = open_gguf(write(Path(folder, "a.gguf"), {f"{i}": value for i, value in enumerate(values)}))
    for i, value in enumerate(values):
        found = gguf.metadata[f"{i}"]
        assert np.float32(found) == np.float32(value)
        assert len(repr(found)) <= len(repr(float(np.float32(value))))


def test_the_golden_files_are_version_3() -> None:
    for path in GOLDEN.glob("*.gguf"):
        assert path.read_bytes()[:8] == b"GGUF\3\0\0\0"
