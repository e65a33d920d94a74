"""Weights as they lie in a directory: either layout, every kind of number, nothing copied, and every fault refused."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import pickle
import shutil
import struct
import time
import tracemalloc
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import (
    FAMILIES,
    Family,
    Stored,
    draw_weights,
    fp8_rounded,
    hf_config,
    rows_in_halves,
    write_consolidated,
    write_hf,
    write_tensor_file,
)
from support.errors import refused, warned

import mistral_ref
from mistral_ref.errors import CheckpointError, short_repr
from mistral_ref.files.build_weights import build_weights
from mistral_ref.files.checkpoint import open_checkpoint
from mistral_ref.files.config_files import read_config
from mistral_ref.files.mapped_file import MappedFile
from mistral_ref.files.quantization import Scheme, quantized_weights
from mistral_ref.files.tensor_names import huggingface_name, mistral_name
from mistral_ref.weights import Matrix, Weights, e4m3_values

Write = Callable[[Path, Family], None]

DENSE, TIED, MIXTURE = FAMILIES["bfloat16"], FAMILIES["ministral3"], FAMILIES["mixtral_windowed"]
# Two blocks of 128 each way, the second of which is not full.
BLOCKS = dataclasses.replace(DENSE, config=DENSE.config.replace(dim=136, hidden_dim=260), dtype="f32")
TOKENS = [1, 5, 3, 60, 2, 7, 7, 8, 0]

STORED_AS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
each_layout = pytest.mark.parametrize(
    ("write", "file"),
    [
        pytest.param(write_consolidated, "consolidated.safetensors", id="consolidated"),
        pytest.param(write_hf, "model.safetensors", id="hf"),
    ],
)


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    content = path.read_bytes()
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


def tensors_in(path: Path) -> Stored:
    """Return what a file written by `write_tensor_file` holds."""
    header, data = parts_of(path)
    return {
        name: (dtype, np.frombuffer(data[slice(*entry["data_offsets"])], STORED_AS[dtype]).reshape(entry["shape"]))
        for name, entry in header.items()
        for dtype in [entry["dtype"]]
    }


def write_raw(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    """Write a file with any header, valid or not, given as an object or as text."""
    text = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def load(directory: Path, **options: Any) -> mistral_ref.Model:
    """Load a model without a single warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return mistral_ref.load(directory, backend="numpy", **options)


def refusal(directory: Path, *facts: object) -> str:
    """Return the message with which a directory is refused, which says each of these facts."""
    with refused(CheckpointError, *facts) as caught:
        load(directory)
    return str(caught.value)


def arrays(weights: Weights) -> Iterator[tuple[str, Matrix | np.ndarray]]:
    """Yield every matrix and every norm's weight with the path of attributes that leads to it."""

    def walk(path: str, found: Any) -> Iterator[tuple[str, Matrix | np.ndarray]]:
        if isinstance(found, (Matrix, np.ndarray)):
            yield path, found
        elif isinstance(found, tuple):
            for number, part in enumerate(found):
                yield from walk(f"{path}.{number}", part)
        elif not isinstance(found, (MappedFile, Mapping)):
            for field in dataclasses.fields(found):
                yield from walk(f"{path}.{field.name}".lstrip("."), getattr(found, field.name))

    return walk("", weights)


def values(model: mistral_ref.Model) -> dict[str, np.ndarray]:
    """Return every weight of a model as float32, rows of wq and wk in halves."""
    config = model.config
    heads = {"wq": config.n_heads, "wk": config.n_kv_heads}
    found = {}
    for path, array in arrays(model.weights):
        wide = array.rows(slice(None), np.float32) if isinstance(array, Matrix) else array
        kind = path.rpartition(".")[2]
        if kind in heads and config.rope_row_order == "interleaved":
            wide = rows_in_halves(wide, heads[kind])
        found[path] = wide
    return found


def assert_same(model: mistral_ref.Model, other: mistral_ref.Model) -> None:
    """Check that two models have bit for bit the same weights, and the same logits but for the order of additions."""
    weights, other_weights = values(model), values(other)
    assert weights.keys() == other_weights.keys()
    for path, weight in weights.items():
        np.testing.assert_array_equal(weight, other_weights[path], err_msg=path, strict=True)
    logits = model.forward(TOKENS)
    np.testing.assert_allclose(logits, other.forward(TOKENS), rtol=0, atol=1e-5 * np.abs(logits).max())


# ------------------------------------------------------------------------------------------------------------ layouts


def write_index_of_consolidated(directory: Path, family: Family) -> None:
    """Mistral Large has its consolidated file in shards."""
    write_consolidated(directory, family)
    file = directory / "consolidated.safetensors"
    tensors = tensors_in(file)
    weight_map = {name: f"consolidated-{i % 2}.safetensors" for i, name in enumerate(tensors)}
    for shard in sorted(set(weight_map.values())):
        write_tensor_file(directory / shard, {name: tensors[name] for name in tensors if weight_map[name] == shard})
    file.unlink()
    (directory / "consolidated.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@each_family
@pytest.mark.parametrize("write", [write_hf, partial(write_hf, shards=3), write_index_of_consolidated])
def test_every_layout_holds_the_same_weights(write: Write, family: Family, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    write_consolidated(tmp_path / "own", family)
    write(tmp_path / "other", family)
    assert_same(load(tmp_path / "own"), load(tmp_path / "other"))


@pytest.mark.parametrize("family", [MIXTURE, FAMILIES["mixtral"]], ids=lambda family: family.name)
def test_fused_experts_are_those_that_are_stored_one_by_one(family: Family, tmp_path: Path) -> None:
    (tmp_path / "fused").mkdir()
    write_hf(tmp_path, family)
    write_hf(tmp_path / "fused", family, fused_experts=True)
    assert_same(load(tmp_path), load(tmp_path / "fused"))


@pytest.mark.parametrize(
    ("weights", "configuration"),
    [("consolidated.safetensors", "config.json"), ("model.safetensors", "params.json")],
)
def test_row_order_follows_the_names_of_the_tensors(weights: str, configuration: str, tmp_path: Path) -> None:
    for name, write in (("own", write_consolidated), ("hf", write_hf)):
        (tmp_path / name).mkdir()
        write(tmp_path / name, DENSE)
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in (weights, configuration):
        shutil.copy(next(tmp_path.glob(f"*/{file}")), mixed)
    assert load(mixed).config.rope_row_order == ("halves" if weights.startswith("model") else "interleaved")
    assert_same(load(mixed), load(tmp_path / "own"))


@pytest.mark.parametrize(
    ("write", "part"),
    [
        (partial(write_hf, wrapper="v4"), "vision_tower"),
        (partial(write_hf, wrapper="v5"), "vision_tower"),
        (partial(write_consolidated, vision=True), "vision_encoder"),
    ],
)
@pytest.mark.parametrize("family", [TIED, DENSE], ids=lambda family: family.name)
def test_a_wrapped_checkpoint_gives_its_text_model(write: Write, part: str, family: Family, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    write(tmp_path, family)
    write_consolidated(tmp_path / "plain", family)
    with warned(part):
        wrapped = mistral_ref.load(tmp_path, backend="numpy")
    assert_same(wrapped, load(tmp_path / "plain"))


@each_family
def test_names_of_both_layouts(family: Family, tmp_path: Path) -> None:
    write_hf(tmp_path, family)
    theirs = list(tensors_in(tmp_path / "model.safetensors"))
    ours = list(draw_weights(family))
    assert [mistral_name(name) for name in theirs] == ours
    assert [huggingface_name(name) for name in ours] == theirs
    assert [mistral_name(name) for name in ours] == ours


@pytest.mark.parametrize(
    "name", ["", "weight", "layers.0.\x1b[2J.weight", "layers.x.attention.wq.weight", "model.layers.0.weight", "model."]
)
def test_names_of_neither_layout(name: str) -> None:
    assert mistral_name(name) is None


def test_names_of_fused_experts_and_scales() -> None:
    for name in ("mlp.experts.gate_up_proj", "mlp.experts.down_proj", "self_attn.q_proj.weight_scale_inv"):
        own = mistral_name(f"model.layers.11.{name}")
        assert own is not None
        assert huggingface_name(own) == f"model.layers.11.{name}"


# ---------------------------------------------------------------------------------------------------------- the files


def say_which(directory: Path, read: str, unread: str) -> None:
    with warned(directory, read, unread) as caught:
        mistral_ref.load(directory, backend="numpy")
    assert len(caught) == 1


def test_of_both_layouts_one_is_read_and_said(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for directory in (tmp_path, tmp_path / "own"):
        write_consolidated(directory, DENSE)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(DENSE)))
    (tmp_path / "model.safetensors").write_bytes(b"never opened")
    say_which(tmp_path, "consolidated.safetensors", "model.safetensors")
    with warned(tmp_path, "model.safetensors"):
        assert_same(mistral_ref.load(tmp_path, backend="numpy"), load(tmp_path / "own"))


def test_of_a_whole_file_and_shards_one_is_read_and_said(tmp_path: Path) -> None:
    write_hf(tmp_path, DENSE)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    say_which(tmp_path, "model.safetensors", "model.safetensors.index.json")


@pytest.mark.parametrize("shards", [1, 3])
def test_links_of_a_hubs_cache(shards: int, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0123abcd", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_hf(tmp_path, DENSE, shards=shards)
    expected = load(tmp_path)
    for number, file in enumerate(sorted(tmp_path.glob("*.*"))):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    assert_same(load(snapshot), expected)


@pytest.mark.parametrize("target", ["../../blobs/0123", "model.safetensors"], ids=["broken", "loop"])
def test_a_link_that_leads_nowhere(target: str, tmp_path: Path) -> None:
    write_hf(tmp_path, DENSE)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to(target)
    problem = "Too many levels of symbolic links" if target == "model.safetensors" else "No such file or directory"
    refusal(tmp_path, tmp_path / "model.safetensors", problem)


class _Exploit:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("unpickled"),)


@pytest.mark.parametrize(
    "name", ["consolidated.00.pth", "pytorch_model.bin", "model.safetensors", "consolidated.safetensors"]
)
def test_nothing_is_ever_unpickled(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_consolidated(tmp_path, DENSE)
    (tmp_path / "consolidated.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(_Exploit()))
    refusal(tmp_path, name, "safetensors" if name.endswith("safetensors") else "pickles")
    assert not Path("unpickled").exists()


def test_no_weights(tmp_path: Path) -> None:
    write_consolidated(tmp_path, DENSE)
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    refusal(tmp_path, tmp_path, "model-00001-of-00002.safetensors", "consolidated.safetensors")
    (tmp_path / "model-00001-of-00002.safetensors").unlink()
    refusal(tmp_path, tmp_path, "no weights", "consolidated.safetensors")


# ----------------------------------------------------------------------------------------------------------- shards


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A directory with three shards."""
    write_hf(tmp_path, DENSE, shards=3)
    return tmp_path


def edit_index(directory: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    edit(content)
    index.write_text(json.dumps(content))


def test_a_lost_shard(shards: Path) -> None:
    lost = shards / "model-00002-of-00003.safetensors"
    lost.unlink()
    refusal(shards, lost, "No such file")


def test_a_tensor_that_only_the_index_has(shards: Path) -> None:
    file = shards / "model-00003-of-00003.safetensors"
    tensors = tensors_in(file)
    del tensors["lm_head.weight"]
    write_tensor_file(file, tensors)
    refusal(shards, file, "'lm_head.weight'", "missing", "index")


@pytest.mark.parametrize(("shard", "other"), [(1, 3), (3, 1)])
def test_a_tensor_in_two_shards(shard: int, other: int, shards: Path) -> None:
    file, copy = (shards / f"model-0000{number}-of-00003.safetensors" for number in (shard, other))
    name, stored = next(iter(tensors_in(file).items()))
    write_tensor_file(copy, tensors_in(copy) | {name: stored})
    refusal(shards, copy, repr(name), *((file, "twice") if shard < other else ("another file", "index")))
    edit_index(shards, lambda index: index["weight_map"].pop(name))
    refusal(shards, file, copy, repr(name), "twice")


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors", "/etc/model.safetensors", "deeper/model.safetensors", "..", ".", "", "model.pth",
        "a\nb.safetensors", "a\0.safetensors", "\ud800.safetensors", "\x1b[2J.safetensors", "x" * 5000 + ".safetensors",
        None, 3, ["model.safetensors"],
    ],
)  # fmt: skip
def test_an_index_names_files_beside_it_only(name: object, shards: Path) -> None:
    edit_index(shards, lambda index: index["weight_map"].update({"model.norm.weight": name}))
    refusal(shards, shards / "model.safetensors.index.json", "'model.norm.weight'", short_repr(name), "safetensors")


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        ("{}", ("weight_map", None, "file names")),
        ('{"weight_map": ["model.safetensors"]}', ("weight_map", "['model.safetensors']", "file names")),
        ('{"weight_map": {"a": "b", "a": "c"}}', ("'a'", "twice")),
        ("[]", ("JSON", "[]", "object")),
    ],
)
def test_an_index_that_is_none(index: str, expected: tuple[object, ...], shards: Path) -> None:
    file = shards / "model.safetensors.index.json"
    file.write_text(index)
    refusal(shards, file, *expected)


# ---------------------------------------------------------------------------------------------------------- mapping


def is_mapped(array: np.ndarray) -> bool:
    """Whether an array is a view of a mapped file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


def test_the_check_for_a_mapped_file_sees_a_copy(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(64))
    mapped = MappedFile(tmp_path / "file").bytes
    assert is_mapped(mapped[3:9].view("<u2"))
    assert not is_mapped(np.array(mapped))


@pytest.mark.parametrize(
    ("write", "family"),
    [
        pytest.param(write, family, id=f"{family.name}-{name}")
        for family in (DENSE, FAMILIES["float16"], FAMILIES["dense_windowed"], MIXTURE)
        for name, write in (
            ("consolidated", write_consolidated), ("hf", write_hf), ("shards", partial(write_hf, shards=2))
        )
    ]
    + [
        pytest.param(partial(write_hf, fused_experts=True), MIXTURE, id="fused_experts"),
        pytest.param(partial(write_hf, fp8="block"), BLOCKS, id="fp8"),
    ],
)  # fmt: skip
def test_matrices_are_views_of_the_files(write: Write, family: Family, tmp_path: Path) -> None:
    write(tmp_path, family)
    model = load(tmp_path)
    for path, array in arrays(model.weights):
        if isinstance(array, Matrix):
            assert is_mapped(array.data), path
            assert not array.data.flags.writeable, path
    model.forward(TOKENS)


@each_layout
@pytest.mark.parametrize("family", [DENSE, FAMILIES["float16"], TIED, BLOCKS], ids=lambda family: family.name)
@pytest.mark.parametrize("spaces", [1, 2, 3])
def test_unaligned_tensors(write: Write, file: str, family: Family, spaces: int, tmp_path: Path) -> None:
    write(tmp_path, family, **({"fp8": "tensor"} if family is BLOCKS else {}))  # type: ignore[call-arg]
    expected = load(tmp_path).forward(TOKENS)
    header, data = parts_of(tmp_path / file)
    text = json.dumps(header)
    write_raw(tmp_path / file, text + " " * (-len(text) % 8 + spaces), data)
    model = load(tmp_path)
    if spaces % 2:
        assert not model.weights.tok_embeddings.data.flags.aligned
    assert model.weights.tok_embeddings.rows(slice(None), np.float32).flags.aligned
    np.testing.assert_array_equal(model.forward(TOKENS), expected)


@pytest.mark.parametrize("write", [write_consolidated, partial(write_hf, shards=3)])
def test_a_file_cut_while_it_is_in_use_is_an_error_and_not_the_end(write: Write, tmp_path: Path) -> None:
    write(tmp_path, DENSE)
    model = load(tmp_path)
    cache, tokens = model.new_cache(), model.generate(TOKENS)
    next(tokens)
    path = next(tmp_path.glob("*.safetensors"))
    size = path.stat().st_size
    os.truncate(path, size // 2)
    uses: list[Callable[[], object]] = [
        lambda: model.forward(TOKENS, cache),
        lambda: model.score(TOKENS),
        lambda: model.trace(TOKENS, keep="norm"),
        lambda: next(model.generate(TOKENS)),
        lambda: next(tokens),
        lambda: quantized_weights(model.weights, Scheme(8)),
    ]
    for use in uses:
        with refused(CheckpointError, path, "shorter", size):
            use()
    assert cache.length == 0


def test_a_file_that_is_replaced_or_no_longer_needed_may_be_shorter(tmp_path: Path) -> None:
    write_consolidated(tmp_path, DENSE)
    path = tmp_path / "consolidated.safetensors"
    model = load(tmp_path)
    expected = model.forward(TOKENS)
    (tmp_path / "new").write_bytes(b"shorter")
    (tmp_path / "new").replace(path)
    np.testing.assert_array_equal(model.forward(TOKENS), expected)
    write_consolidated(tmp_path, DENSE)
    in_memory = load(tmp_path, quantize=8)
    expected = in_memory.forward(TOKENS)
    os.truncate(path, 0)
    np.testing.assert_array_equal(in_memory.forward(TOKENS), expected)


def test_loading_reads_and_allocates_next_to_nothing(tmp_path: Path) -> None:
    """An embedding of 2 GiB, in a sparse file: all zeros, and no room on the disk."""
    config = DENSE.config.replace(dim=64, n_layers=1, sliding_window=(None,), tied_embeddings=True)
    write_consolidated(tmp_path, dataclasses.replace(DENSE, config=config))
    file, params = tmp_path / "consolidated.safetensors", tmp_path / "params.json"
    params.write_text(json.dumps(json.loads(params.read_text()) | {"vocab_size": 2**24}))
    tensors = tensors_in(file)
    del tensors["tok_embeddings.weight"]
    write_tensor_file(file, tensors)
    header, data = parts_of(file)
    offsets = [len(data), len(data) + 2**31]
    header["tok_embeddings.weight"] = {"dtype": "BF16", "shape": [2**24, 64], "data_offsets": offsets}
    write_raw(file, header, data)
    os.truncate(file, file.stat().st_size + 2**31)
    load(tmp_path)
    tracemalloc.start()
    try:
        before = time.thread_time()
        model = load(tmp_path)
        seconds = time.thread_time() - before
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seconds < 0.2
    assert peak < 2**20
    assert model.weights.output is model.weights.tok_embeddings
    assert model.weights.tok_embeddings.nbytes == 2**31
    assert not model.weights.tok_embeddings.rows(np.array([0, 2**24 - 1]), np.float32).any()


# -------------------------------------------------------------------------------------------------------------- fp8


def test_e4m3() -> None:
    codes = {0x00: 0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x30: 0.5, 0x38: 1, 0x39: 1.125, 0x40: 2, 0x7E: 448}
    table = e4m3_values()
    assert table.dtype == np.float32
    assert {code: table[code] for code in codes} == codes
    assert np.isnan(table[[0x7F, 0xFF]]).all()
    assert (np.diff(table[:0x7F]) > 0).all()
    np.testing.assert_array_equal(table[0x80:0xFF], -table[:0x7F])
    assert np.signbit(table[0x80])


FP8 = {
    "consolidated": (partial(write_consolidated, fp8=True), None),
    "hf": (partial(write_hf, fp8="tensor"), None),
    "hf_blocks": (partial(write_hf, fp8="block"), 128),
}


@pytest.mark.parametrize(("write", "block"), FP8.values(), ids=FP8)
def test_fp8_holds_the_values_times_their_scales(write: Write, block: int | None, tmp_path: Path) -> None:
    (tmp_path / "widened").mkdir()
    write(tmp_path, BLOCKS)
    write_consolidated(tmp_path / "widened", BLOCKS, fp8_rounded(draw_weights(BLOCKS), block))
    assert_same(load(tmp_path), load(tmp_path / "widened"))
    w1 = load(tmp_path).weights.layers[0].feed_forward.w1  # type: ignore[union-attr]
    assert w1.kind == "fp8"
    assert w1.shape == (260, 136)
    assert w1.scale is not None
    assert w1.scale.shape == ((3, 2) if block else (1, 1))
    some = np.array([259, 127, 128, 0])
    for rows in (some, slice(120, 140), slice(256, 260)):
        np.testing.assert_array_equal(w1.rows(rows, np.float32), w1.rows(slice(None), np.float32)[rows])
    exact = e4m3_values()[w1.data[some]].astype(np.float64)
    scale_of_row = w1.scale[some // 128 if block else 0][..., np.arange(136) // 128 if block else slice(None)]
    np.testing.assert_array_equal(w1.rows(some, np.float64), exact * scale_of_row.astype(np.float64))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_has_any_shape_of_one_number(shape: tuple[int, ...], tmp_path: Path) -> None:
    write_consolidated(tmp_path, BLOCKS, fp8=True)
    expected = load(tmp_path).forward(TOKENS)
    file = tmp_path / "consolidated.safetensors"
    scales = {n: (dtype, scale.reshape(shape)) for n, (dtype, scale) in tensors_in(file).items() if "qscale" in n}
    write_tensor_file(file, tensors_in(file) | scales)
    np.testing.assert_array_equal(load(tmp_path).forward(TOKENS), expected)


@pytest.mark.parametrize(
    ("write", "unused"),
    [
        (write_consolidated, "layers.{}.attention.wq.qscale_act"),
        (write_consolidated, "layers.{}.attention.kv_fake_quantizer.qscale_act"),
        (write_hf, "model.layers.{}.self_attn.q_proj.activation_scale"),
        (write_hf, "model.layers.{}.self_attn.rotary_emb.inv_freq"),
        (write_hf, "model.layers.{}.self_attn.rotary_emb.cos_cached"),
        (write_hf, "layers.{}.rotary_emb.tables.anything"),
        (write_hf, "model.rotary_emb.inv_freq"),
        (write_hf, "model.language_model.rotary_emb.original_inv_freq"),
        (write_hf, "sin_cached"),
        (write_consolidated, "layers.{}.attention.inner_attention.rope.freqs"),
        (write_consolidated, "rope.freqs"),
        (write_consolidated, "freqs_cis"),
    ],
)
def test_what_the_forward_pass_has_no_use_for_is_ignored(write: Write, unused: str, tmp_path: Path) -> None:
    write(tmp_path, BLOCKS, fp8="tensor")  # type: ignore[call-arg]
    expected = load(tmp_path).forward(TOKENS)
    (file,) = tmp_path.glob("*.safetensors")
    added = {unused.format(layer): ("F32", np.full(7, np.nan, np.float32)) for layer in range(BLOCKS.config.n_layers)}
    write_tensor_file(file, tensors_in(file) | added)
    np.testing.assert_array_equal(load(tmp_path).forward(TOKENS), expected)
    assert {tensor.name for tensor in open_checkpoint(tmp_path).ignored} == set(added)


# -------------------------------------------------------------------------------------------------------------- tying


@each_layout
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_tied_embeddings(write: Write, file: str, tied: bool, stored: bool, tmp_path: Path) -> None:
    family = dataclasses.replace(DENSE, config=DENSE.config.replace(tied_embeddings=tied))
    write(tmp_path, family, draw_weights(DENSE))  # type: ignore[call-arg]
    output = "output.weight" if write is write_consolidated else "lm_head.weight"
    tensors = tensors_in(tmp_path / file)
    if not stored:
        del tensors[output]
        write_tensor_file(tmp_path / file, tensors)
    if not stored and not tied:
        refusal(tmp_path, tmp_path, "output.weight", "lm_head.weight", "missing", "tied")
        return
    weights = load(tmp_path).weights
    if stored:
        np.testing.assert_array_equal(weights.output.data, tensors[output][1])
        assert (weights.output.data != weights.tok_embeddings.data).any()
    else:
        assert weights.output is weights.tok_embeddings


@pytest.mark.parametrize("wrapper", ["v4", "v5"])
@pytest.mark.parametrize("said", [True, False, None])
def test_a_wrapper_without_output_is_tied_unless_it_says_no(wrapper: Any, said: bool | None, tmp_path: Path) -> None:
    write_hf(tmp_path, TIED, wrapper=wrapper)
    config = json.loads((tmp_path / "config.json").read_text())
    for level in (config, config["text_config"]):
        del level["tie_word_embeddings"]
    if said is not None:
        config["tie_word_embeddings"] = said
    (tmp_path / "config.json").write_text(json.dumps(config))
    with warned(tmp_path, "vision_tower"):
        checkpoint = open_checkpoint(tmp_path)
    if said is False:
        with refused(CheckpointError, "output.weight", "missing"):
            build_weights(checkpoint, read_config(tmp_path))
    else:
        weights = build_weights(checkpoint, read_config(tmp_path))
        assert weights.output is weights.tok_embeddings


# ------------------------------------------------------------------------------------------------------------- faults

Q_SHAPE = (DENSE.config.n_heads * DENSE.config.head_dim, DENSE.config.dim)
D = DENSE.config.dim
KINDS = ("F32", "F16", "BF16", "F8_E4M3")
IN_LAYER_1 = {
    "consolidated.safetensors": {
        "wq": "layers.1.attention.wq", "norm": "layers.1.ffn_norm", "scale": "qscale_weight"
    },
    "model.safetensors": {
        "wq": "model.layers.1.self_attn.q_proj", "norm": "model.layers.1.post_attention_layernorm",
        "scale": "weight_scale_inv",
    },
}  # fmt: skip


def zeros(dtype: str, *shape: int) -> tuple[str, np.ndarray]:
    kinds = STORED_AS | {"I64": "<i8", "F64": "<f8", "I32": "<i4", "U8": "u1"}
    return dtype, np.zeros(shape, kinds[dtype])


@each_layout
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"{wq}.weight": zeros("F32", D, D)}, ("{wq}.weight", (D, D), Q_SHAPE)),
        ({"{wq}.weight": zeros("F32", *Q_SHAPE, 1)}, ("{wq}.weight", (*Q_SHAPE, 1), Q_SHAPE)),
        ({"{wq}.weight": zeros("F32")}, ("{wq}.weight", (), Q_SHAPE)),
        ({"{norm}.weight": zeros("F32", 1, D)}, ("{norm}.weight", (1, D), (D,))),
        ({"{wq}.weight": zeros("I64", *Q_SHAPE)}, ("'{wq}.weight'", "I64", *KINDS)),
        ({"{wq}.weight": zeros("F64", *Q_SHAPE)}, ("'{wq}.weight'", "F64", *KINDS)),
        ({"{wq}.weight": zeros("U8", *Q_SHAPE)}, ("'{wq}.weight'", "U8", *KINDS)),
        ({"{norm}.weight": zeros("F64", D)}, ("'{norm}.weight'", "F64", *KINDS)),
        ({"{wq}.weight": zeros("F8_E4M3", *Q_SHAPE)}, ("{wq}.weight", "fp8", "without its scale")),
        ({"{norm}.weight": zeros("F8_E4M3", D)}, ("{norm}.weight", "fp8", "without its scale")),
        ({"{wq}.{scale}": zeros("F32")}, ("{wq}.weight", "BF16", "scale")),
        ({"{norm}.{scale}": zeros("F32")}, ("'{norm}.{scale}'", "3 layers", "without experts")),
        ({"{wq}.bias": zeros("F32", 56)}, ("'{wq}.bias'", "no model")),
        ({"{wq}\n\x1b.weight": zeros("F32")}, (r"'{wq}\n\x1b.weight'", "no model")),
        ({"x" * 5000: zeros("F32")}, (short_repr("x" * 5000), "no model")),
    ],
)  # fmt: skip
def test_a_fault_in_a_tensor(
    write: Write, file: str, changes: Mapping[str, tuple[str, np.ndarray]], expected: tuple[object, ...], tmp_path: Path
) -> None:
    write(tmp_path, DENSE)
    names = IN_LAYER_1[file]
    changed = {name.format(**names): stored for name, stored in changes.items()}
    write_tensor_file(tmp_path / file, tensors_in(tmp_path / file) | changed)
    message = refusal(tmp_path, tmp_path / file, *(str(fact).format(**names) for fact in expected))
    assert len(message) < 400


@each_layout
@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (zeros("F32", 2), ("F32", (2,), "one float", (1, 1))),
        (zeros("F32", 56, 1), ("F32", (56, 1), "one float", (1, 1))),
        (zeros("F32", 0), ("F32", (0,), "one float", (1, 1))),
        (zeros("F8_E4M3", 1), ("F8_E4M3", (1,), "one float", (1, 1))),
        (zeros("I32", 1), ("I32", *KINDS)),
    ],
)
def test_a_fault_in_a_scale(
    write: Write, file: str, scale: tuple[str, np.ndarray], expected: tuple[object, ...], tmp_path: Path
) -> None:
    write(tmp_path, DENSE)
    names = IN_LAYER_1[file]
    changes = {f"{names['wq']}.weight": zeros("F8_E4M3", *Q_SHAPE), f"{names['wq']}.{names['scale']}": scale}
    write_tensor_file(tmp_path / file, tensors_in(tmp_path / file) | changes)
    refusal(tmp_path, tmp_path / file, "{wq}.{scale}".format(**names), *expected)


@each_layout
@pytest.mark.parametrize("family", [DENSE, MIXTURE], ids=lambda family: family.name)
def test_every_tensor_is_missed(write: Write, file: str, family: Family, tmp_path: Path) -> None:
    write(tmp_path, family)
    tensors = tensors_in(tmp_path / file)
    for name in tensors:
        write_tensor_file(tmp_path / file, {other: stored for other, stored in tensors.items() if other != name})
        refusal(tmp_path, tmp_path, name, "missing")


@pytest.mark.parametrize("lost", ["gate_up_proj", "down_proj"])
def test_half_of_the_fused_experts(lost: str, tmp_path: Path) -> None:
    write_hf(tmp_path, MIXTURE, fused_experts=True)
    tensors = tensors_in(tmp_path / "model.safetensors")
    del tensors[f"model.layers.0.mlp.experts.{lost}"]
    write_tensor_file(tmp_path / "model.safetensors", tensors)
    named = "mlp.experts.down_proj" if lost == "down_proj" else "block_sparse_moe.experts.0.w1.weight"
    refusal(tmp_path, tmp_path, f"model.layers.0.{named}", "missing")


@pytest.mark.parametrize("fused", ["gate_up_proj", "down_proj"])
def test_fused_experts_in_fp8_have_no_scales(fused: str, tmp_path: Path) -> None:
    write_hf(tmp_path, MIXTURE, fused_experts=True)
    file, name = tmp_path / "model.safetensors", f"model.layers.0.mlp.experts.{fused}"
    tensors = tensors_in(file)
    write_tensor_file(file, tensors | {name: zeros("F8_E4M3", *tensors[name][1].shape)})
    refusal(tmp_path, file, name, "fp8", "without its scale", "F32", "F16", "BF16")


@each_layout
@pytest.mark.parametrize("family", [DENSE, MIXTURE], ids=lambda family: family.name)
def test_tensors_that_have_no_place(write: Write, file: str, family: Family, tmp_path: Path) -> None:
    own, layers = write is write_consolidated, family.config.n_layers
    strangers = [f"layers.{layers}.attention_norm" if own else f"model.layers.{layers}.input_layernorm"]
    experts = "layers.0.feed_forward.experts" if own else "model.layers.0.block_sparse_moe.experts"
    strangers.append(f"{experts}.5.w1")
    write(tmp_path, family)
    tensors = tensors_in(tmp_path / file)
    for name in strangers:
        write_tensor_file(tmp_path / file, tensors | {f"{name}.weight": zeros("F32", 4, 4)})
        experts_or_not = f"with{'out' if family is DENSE else ''} experts"
        refusal(tmp_path, tmp_path / file, f"'{name}.weight'", f"{layers} layers", experts_or_not)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    write_hf(tmp_path, DENSE)
    file = tmp_path / "model.safetensors"
    write_tensor_file(file, tensors_in(file) | {"model.language_model.norm.weight": zeros("F32", D)})
    refusal(tmp_path, file, "'model.language_model.norm.weight'", "twice")


def test_names_of_both_layouts_in_one_file(tmp_path: Path) -> None:
    write_hf(tmp_path, DENSE)
    file = tmp_path / "model.safetensors"
    tensors = tensors_in(file)
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    write_tensor_file(file, tensors)
    refusal(tmp_path, tmp_path, "Mistral", "Hugging Face")


def entry(begin: int, end: int, shape: object = None, dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


WHOLE = json.dumps(entry(0, 4))
BROKEN: dict[str, tuple[Any, bytes]] = {
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
    "the same bytes": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)),
    "a gap": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "out of range": ({"a": entry(0, 400)}, bytes(40)),
    "far out of range": ({"a": entry(0, 2**63, [2**61])}, bytes(40)),
    "past 64 bits": ({"a": entry(0, 2**64, [2**62])}, bytes(40)),
    "product past 64 bits": ({"a": entry(0, 0, [2**32, 2**32])}, b""),
    "backwards": ({"a": entry(8, 4, [1])}, bytes(8)),
    "negative": ({"a": entry(-4, 4, [2])}, bytes(8)),
    "fraction": ({"a": entry(0, 4, [1.0])}, bytes(4)),
    "other size than shape": ({"a": entry(0, 8, [1])}, bytes(8)),
    "bytes that belong to nobody": ({"a": entry(0, 4)}, bytes(8)),
    "dtype that does not exist": ({"a": entry(0, 4, dtype="F33\n\x1b[2J")}, bytes(4)),
    "dtype of another type": ({"a": entry(0, 4, dtype=32)}, bytes(4)),
    "entry as a list": ({"a": ["F32", [1], [0, 4]]}, bytes(4)),
    "no offsets": ({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
    "the same name twice": (f'{{"a": {WHOLE}, "a": {WHOLE}}}', bytes(4)),
    "metadata that is no text": ({"__metadata__": {"format": 1}, "a": entry(0, 4)}, bytes(4)),
    "long number beside the rest": (f'{{"a": {WHOLE}, "y": {"1" * 5000}}}', bytes(4)),
    "nested a thousand times": ("[" * 1000, b""),
    "a list": ([], b""),
    "no JSON": ("never written", b""),
    "not UTF-8": ("\xff", b""),
    "empty": ("", b""),
}


PAST_THE_END = {"out of range", "far out of range", "past 64 bits"}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header(case: str, tmp_path: Path) -> None:
    header, data = BROKEN[case]
    write_consolidated(tmp_path, DENSE)
    file = tmp_path / "consolidated.safetensors"
    write_raw(file, header, data)
    facts: tuple[object, ...] = ("safetensors file",)
    if case in PAST_THE_END:
        facts = ("truncated", f"{file.stat().st_size} bytes")
    elif case == "entry as a list":
        facts = ("'a'", "['F32', [1], [0, 4]]")
    assert len(refusal(tmp_path, file, *facts)) < 400


@pytest.mark.parametrize("kept", [0, 7, 8, 9, 1000, -1])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    write_consolidated(tmp_path, DENSE)
    file = tmp_path / "consolidated.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    found = (f"{len(whole) - 1} bytes", len(whole)) if kept == -1 else (f"{kept} bytes",)
    refusal(tmp_path, file, "truncated", *found)


def test_a_header_longer_than_the_file_or_any_header(tmp_path: Path) -> None:
    write_consolidated(tmp_path, DENSE)
    file = tmp_path / "consolidated.safetensors"
    write_raw(file, {}, length=2**64 - 1)
    refusal(tmp_path, file, "truncated", "10 bytes")
    write_raw(file, " " * 600_000)
    refusal(tmp_path, file, "header", "600000 bytes", 524288)


@pytest.mark.parametrize("kind", ["directory", "pipe", "device"])
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_what_is_no_regular_file_is_not_opened(kind: str, name: str, tmp_path: Path) -> None:
    write_hf(tmp_path, DENSE)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / name
    {"directory": file.mkdir, "pipe": partial(os.mkfifo, file), "device": partial(file.symlink_to, "/dev/zero")}[kind]()
    refusal(tmp_path, file, "regular file")
