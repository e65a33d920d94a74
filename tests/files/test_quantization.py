"""quantize: from any directory that loads to a smaller one that loads like any, or nothing at all; and what is refused.

How a matrix is rounded, test_quantized_matrix.py asks; how products with it come out,
kernels/test_quantized_products.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FAMILIES, Family, draw_weights, to_fp8, write_consolidated, write_hf, write_tensor_file
from support.command import start
from support.errors import refused, warned
from support.hostile import Files, attempt, fill, header_of, other_bytes, other_json, tensor_file
from support.marks import slow_but
from support.tiny import BACKENDS, tokens_for
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref import CheckpointError, InputError, MistralRefError, Model
from mistral_ref.config import MixtureOfExperts, ModelConfig
from mistral_ref.errors import short_repr
from mistral_ref.files.json_file import MAX_JSON_BYTES
from mistral_ref.files.quantized_format import FORMAT, quantized_tensors
from mistral_ref.files.tensor_file import open_tensor_file
from mistral_ref.measure.synthetic import make_checkpoint, plan, plan_metadata
from mistral_ref.quantized_matrix import GROUP_SIZES
from mistral_ref.weights import Matrix, matrices

Write = Callable[[Path], None]

WEIGHTS = "consolidated.safetensors"
DENSE, TIED, MIXTURE = FAMILIES["dense_windowed"], FAMILIES["ministral3"], FAMILIES["mixtral_windowed"]
# Two blocks of 128 each way, the second of which is not full, and more than one group.
BLOCKS = dataclasses.replace(
    FAMILIES["bfloat16"], config=FAMILIES["bfloat16"].config.replace(dim=136, hidden_dim=260), dtype="f32"
)
TOKENS = [1, 5, 3, 60, 2, 7, 7, 8, 0]

each_bits = pytest.mark.parametrize("bits", [8, 4])
each_backend = pytest.mark.parametrize("backend", BACKENDS)

# fmt: off
SOURCES: dict[str, Write] = {
    **{f"consolidated {name}": partial(write_consolidated, family=family) for name, family in FAMILIES.items()},
    **{f"hf {name}": partial(write_hf, family=family) for name, family in FAMILIES.items()},
    "hf in shards": partial(write_hf, family=FAMILIES["nemo"], shards=3),
    "hf with fused experts": partial(write_hf, family=MIXTURE, fused_experts=True),
    "hf with fused experts in shards": partial(write_hf, family=MIXTURE, fused_experts=True, shards=2),
    "hf in fp8": partial(write_hf, family=BLOCKS, fp8="tensor"),
    "hf in blocks of fp8": partial(write_hf, family=BLOCKS, fp8="block", shards=2),
    "hf beside a vision tower": partial(write_hf, family=TIED, wrapper="v5"),
    "consolidated in fp8": partial(write_consolidated, family=BLOCKS, fp8=True),
    "consolidated beside a vision encoder": partial(write_consolidated, family=DENSE, vision=True),
}
# fmt: on


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Return the directory of a small dense model, alone in a folder of its own."""
    directory = tmp_path / "models" / "source"
    directory.mkdir(parents=True)
    write_consolidated(directory, DENSE)
    return directory


def load(directory: Path, backend: str = "numpy", **options: Any) -> Model:
    return mistral_ref.load(directory, backend=backend, threads=1, **options)


def distance(logits: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, as a part of the largest logit."""
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def header_in(directory: Path) -> dict[str, Any]:
    return header_of((directory / WEIGHTS).read_bytes())[0]


def assert_short(caught: pytest.ExceptionInfo[MistralRefError]) -> None:
    assert len(str(caught.value)) < 700


# ------------------------------------------------------------------------------------------------- what is written


@each_bits
@pytest.mark.parametrize("write", slow_but(["consolidated dense_windowed", "hf ministral3", "hf in fp8"], SOURCES))
def test_a_quantized_directory_is_what_quantizing_in_memory_gives(write: Write, bits: int, tmp_path: Path) -> None:
    """To the bit with compiled kernels, which compute each row by itself, wherever it stands: files of Hugging Face's
    get another order of rows. In float64, where inputs are not rounded, NumPy agrees as well as its sums allow.
    """
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write(source)
    assert mistral_ref.quantize(source, target, bits) == target
    for backend, options in (("numba", {}), ("numba", {"quantized_inputs": "int8"}), ("numpy", {"dtype": "float64"})):
        expected = load(source, backend, quantize=bits, **options)
        found = load(target, backend, **options)
        assert found.config == expected.config.replace(rope_row_order="interleaved")
        tokens = [token % found.config.vocab_size for token in TOKENS]
        ours, theirs = found.forward(tokens), expected.forward(tokens)
        if backend == "numba":
            np.testing.assert_array_equal(ours, theirs)
        else:
            assert distance(ours, theirs) < 1e-12
    exact = load(source, dtype="float64").forward(tokens)
    assert distance(ours, exact) < (0.2 if bits == 8 else 2)  # of models so small and sharp that bits matter much
    assert distance(ours, exact) > 1e-4


@pytest.mark.parametrize("write", SOURCES.values(), ids=SOURCES)
def test_what_is_not_rounded_is_as_it_was(write: Write, tmp_path: Path) -> None:
    """Routers and norms, and each matrix's name; the others have the bits that were asked for, and the same weights."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write(source)
    mistral_ref.quantize(source, target, 4, group_size=64)
    before, after = load(source), load(target)
    pairs = list(zip(matrices(before.weights), matrices(after.weights), strict=True))
    heads = {"wq": before.config.n_heads, "wk": before.config.n_kv_heads}
    for old, new in pairs:
        assert (old.name, old.shape) == (new.name, new.shape)
        kind = old.name.rpartition(".")[2]
        if kind == "gate":
            assert (new.kind, type(new)) == (old.kind, Matrix)
            np.testing.assert_array_equal(new.data, old.data)
            continue
        assert (new.kind, new.group_size) == ("int8" if kind in ("tok_embeddings", "output") else "int4", 64)
        rows, rounded = (matrix.rows(slice(None), np.float64) for matrix in (old, new))
        if kind in heads and before.config.rope_row_order == "halves":
            rows = rows.reshape(heads[kind], 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
        # a wrong row would be off by as much as the rows are large
        assert np.abs(rounded - rows).max() < (0.02 if new.bits == 8 else 0.25) * np.abs(rows).max()
    for old, new in zip(before.weights.layers, after.weights.layers, strict=True):
        np.testing.assert_array_equal(new.attention_norm, old.attention_norm)
        np.testing.assert_array_equal(new.ffn_norm, old.ffn_norm)
    np.testing.assert_array_equal(after.weights.norm, before.weights.norm)


@each_bits
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_the_file_says_exactly_what_it_holds(bits: int, group_size: int, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_consolidated(source, MIXTURE)
    mistral_ref.quantize(source, target, bits, group_size=group_size, embedding=4, head=None)
    header, expected = header_in(target), {}
    for matrix in matrices(load(source).weights):
        if not matrix.name.endswith("gate") and matrix.name != "output":
            expected[matrix.name] = 4 if matrix.name == "tok_embeddings" else bits
    assert header.pop("__metadata__").keys() == {FORMAT}
    metadata = json.loads(header_in(target)["__metadata__"][FORMAT])
    assert metadata == {"group_size": group_size, "bits": expected}
    for name, its_bits in expected.items():
        of_name = next(matrix for matrix in matrices(load(source).weights) if matrix.name == name)
        for ending, part in quantized_tensors(*of_name.shape, its_bits, group_size).items():
            entry = header.pop(f"{name}.{ending}")
            assert (entry["dtype"], tuple(entry["shape"])) == part
    assert header.pop("units")["shape"] == [len(expected)]
    kept = {name: entry["dtype"] for name, entry in header.items()}
    expected_kept = {"norm.weight": "F32", "output.weight": "BF16"}
    for layer in range(MIXTURE.config.n_layers):
        expected_kept |= {f"layers.{layer}.{norm}.weight": "F32" for norm in ("attention_norm", "ffn_norm")}
        expected_kept[f"layers.{layer}.feed_forward.gate.weight"] = "BF16"
    assert kept == expected_kept


@pytest.mark.parametrize(("embedding", "head"), [(8, 8), (4, 8), (8, 4), (None, 8), (8, None), (None, None)])
def test_embedding_and_head_get_the_bits_that_are_asked_for(
    embedding: int | None, head: int | None, source: Path, tmp_path: Path
) -> None:
    mistral_ref.quantize(source, tmp_path / "target", 4, embedding=embedding, head=head)
    weights = load(tmp_path / "target").weights
    kinds = {None: "f32", 8: "int8", 4: "int4"}
    assert (weights.tok_embeddings.kind, weights.output.kind) == (kinds[embedding], kinds[head])
    assert {layer.wq.kind for layer in weights.layers} == {"int4"}
    if embedding is None:
        np.testing.assert_array_equal(weights.tok_embeddings.data, load(source).weights.tok_embeddings.data)


@pytest.mark.parametrize("bits", [8, 4, None])
def test_one_matrix_for_embedding_and_head_is_rounded_once(bits: int | None, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_hf(source, TIED)
    mistral_ref.quantize(source, target, embedding=bits, head=bits)
    weights = load(target).weights
    assert weights.output is weights.tok_embeddings
    assert not any(name.startswith(("output", "lm_head")) for name in header_in(target))
    for other in {8, 4, None} - {bits}:
        with refused(InputError, "embedding", bits, "head", other, "both") as caught:
            mistral_ref.quantize(source, tmp_path / "other", embedding=bits, head=other)
        assert_short(caught)
    assert names_in(tmp_path) == ["source", "target"]


def test_a_head_beside_a_tied_embedding_is_one_of_its_own(tmp_path: Path) -> None:
    """The configuration says that they are tied, and the files hold both: those are believed, before and after."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    weights = draw_weights(TIED)
    write_hf(source, TIED, weights | {"output.weight": weights["tok_embeddings.weight"][::-1].copy()})
    mistral_ref.quantize(source, target, 8, embedding=4, head=8)
    model = load(target)
    assert (model.weights.tok_embeddings.kind, model.weights.output.kind) == ("int4", "int8")
    assert not model.config.tied_embeddings


def test_a_head_in_fp8_stays_so_with_its_scale(source: Path, tmp_path: Path) -> None:
    """No published model has one; but what is not rounded is as it was."""
    tensors = {tensor.name: (tensor.dtype, tensor.mapped()[1]) for tensor in open_tensor_file(source / WEIGHTS)}
    codes, scale = to_fp8(draw_weights(DENSE)["output.weight"])
    tensors |= {"output.weight": ("F8_E4M3", codes), "output.qscale_weight": ("F32", scale)}
    (tmp_path / "fp8").mkdir()
    shutil.copy(source / "params.json", tmp_path / "fp8")
    write_tensor_file(tmp_path / "fp8" / WEIGHTS, tensors)
    mistral_ref.quantize(tmp_path / "fp8", tmp_path / "target", head=None)
    before, after = load(tmp_path / "fp8").weights.output, load(tmp_path / "target").weights.output
    assert (after.kind, after.shape) == (before.kind, before.shape) == ("fp8", codes.shape)
    np.testing.assert_array_equal(after.data, before.data)
    np.testing.assert_array_equal(after.scale, before.scale)


def test_small_files_come_along_and_no_weights(tmp_path: Path) -> None:
    """As they are, links to them as files of their own; so that text goes in and comes out as before."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    family = dataclasses.replace(DENSE, config=DENSE.config.replace(vocab_size=384))
    write_hf(source, family, shards=2)
    small = {
        "LICENSE": b"licence",
        "generation_config.json": b'{"eos_token_id": 2}',
        "tokenizer.model": tiny_tokenizer(),
    }
    fill(source, small | {".hidden": b"", "README.md": "\N{LATIN SMALL LETTER E WITH ACUTE}".encode()})
    for name in ("pytorch_model.bin", "consolidated.00.pth", "old.gguf", "tf_model.h5", "x.ckpt", "other.safetensors"):
        (source / name).write_bytes(b"weights")
    with open(source / "video.mp4", "wb") as file:
        file.truncate(2**26 + 1)
    (source / "folder").mkdir()
    (source / "folder" / "file").touch()
    (source / "link").symlink_to(source / "LICENSE")
    (source / "nowhere").symlink_to(source / "missing")
    mistral_ref.quantize(source, target)
    copied = [*small, ".hidden", "README.md", "config.json", "link"]
    assert names_in(target) == sorted([*copied, WEIGHTS])
    for name in copied:
        assert (target / name).read_bytes() == (source / name).read_bytes()
        assert not (target / name).is_symlink()
    before, after = load(source), load(target)
    assert after.tokenizer.encode("a b") == before.tokenizer.encode("a b")
    assert after.eos_ids == before.eos_ids == {2}
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_links_to_files_elsewhere_are_followed_by_name_only(source: Path, tmp_path: Path) -> None:
    """Who passes a quantized model on does not pass on what a link in a downloaded model leads to."""
    (tmp_path / "id_rsa").write_text("secret")
    (tmp_path / "shared.model").write_bytes(tiny_tokenizer())
    (source / "folder").mkdir()
    (source / "folder" / "LICENSE").write_text("licence")
    (source / "README.md").symlink_to(tmp_path / "id_rsa")
    (source / "NOTICE").symlink_to("../../id_rsa")
    (source / "LICENSE").symlink_to("folder/LICENSE")
    (source / "tokenizer.model.v3").symlink_to(tmp_path / "shared.model")
    with warned(source, "README.md", "NOTICE", "not copied"):
        mistral_ref.quantize(source, tmp_path / "target")
    assert names_in(tmp_path / "target") == sorted([WEIGHTS, "LICENSE", "params.json", "tokenizer.model.v3"])
    assert (tmp_path / "target" / "LICENSE").read_text() == "licence"


def test_a_snapshot_of_the_hubs_cache_is_copied_whole(source: Path, tmp_path: Path) -> None:
    """Every file there is a link into blobs; a blob that is a link itself is not followed."""
    repository = tmp_path / "models--org--name"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (WEIGHTS, "params.json"):
        shutil.move(source / name, blobs / name)
    (blobs / "README").write_text("read me")
    (tmp_path / "id_rsa").write_text("secret")
    (blobs / "LICENSE").symlink_to(tmp_path / "id_rsa")
    for name in (WEIGHTS, "params.json", "README", "LICENSE"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    with warned(snapshot, "LICENSE", "not copied"):
        mistral_ref.quantize(snapshot, tmp_path / "target")
    assert names_in(tmp_path / "target") == ["README", WEIGHTS, "params.json"]


def test_paths_may_be_relative_and_lie_within_the_source(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    assert mistral_ref.quantize(".", "q4") == Path("q4")
    assert names_in(source / "q4") == [WEIGHTS, "params.json"]
    monkeypatch.chdir(source / "q4")
    assert load(Path(".")).weights.output.kind == "int8"


def test_the_file_is_as_small_as_it_should_be(tmp_path: Path) -> None:
    """4.5 bits a weight, and 8.5, with groups of 32; 4.125 with groups of 128."""
    source = tmp_path / "source"
    source.mkdir()
    config = DENSE.config.replace(dim=256, hidden_dim=512, head_dim=64, n_heads=4, n_kv_heads=2, vocab_size=64)
    write_consolidated(source, dataclasses.replace(DENSE, config=config))
    for bits, group_size, expected in ((4, 32, 4.5), (8, 32, 8.5), (4, 128, 4.125), (8, 64, 8.25)):
        target = tmp_path / f"{bits} {group_size}"
        mistral_ref.quantize(source, target, bits, group_size=group_size, embedding=bits, head=bits)
        all_matrices = matrices(load(target).weights)
        n_bytes, size = sum(matrix.nbytes for matrix in all_matrices), sum(matrix.size for matrix in all_matrices)
        assert 8 * n_bytes / size == expected
        assert 0 < (target / WEIGHTS).stat().st_size - n_bytes < 16_000  # header and norms


def test_progress_goes_up_to_all_weights(source: Path, tmp_path: Path) -> None:
    total = sum(matrix.size for matrix in matrices(load(source).weights))
    for run in (
        lambda progress: mistral_ref.quantize(source, tmp_path / "target", progress=progress),
        lambda progress: load(source, quantize=4, progress=progress),
    ):
        reports: list[tuple[int, int]] = []
        run(lambda done, total, reports=reports: reports.append((done, total)))
        assert {of for _, of in reports} == {total}
        done = [done for done, _ in reports]
        assert done == sorted(set(done))
        assert done[0] > 0
        assert done[-1] == total
        assert len(done) == len(matrices(load(source).weights))


# ------------------------------------------------------------------------------------------- what is refused, or ends


@pytest.mark.parametrize("kind", ["file", "empty directory", "directory", "dangling link", "the source itself"])
def test_a_target_that_is_there_is_left_alone(kind: str, source: Path, tmp_path: Path) -> None:
    target = source if kind == "the source itself" else tmp_path / "target"
    if kind == "file":
        target.write_text("kept")
    elif "directory" in kind:
        target.mkdir()
        if kind == "directory":
            (target / "kept").touch()
    elif "link" in kind:
        target.symlink_to(tmp_path / "nowhere")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    with refused(InputError, target, "already", "new directory") as caught:
        mistral_ref.quantize(source, target)
    assert_short(caught)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_a_folder_that_is_missing_or_none_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "missing", tmp_path / "file"):
        with refused(InputError, folder / "target", folder, "no directory") as caught:
            mistral_ref.quantize(source, folder / "target")
        assert_short(caught)
    assert names_in(tmp_path) == ["file", "models"]


@pytest.mark.parametrize("missing", ["nowhere", "file", "empty"])
def test_a_source_that_is_no_model_is_refused(missing: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    with refused(MistralRefError, missing) as caught:
        mistral_ref.quantize(tmp_path / missing, tmp_path / "target")
    assert_short(caught)
    assert names_in(tmp_path) == ["empty", "file"]


BAD = [
    *({"bits": bad} for bad in (5, 0, 16, "4", 4.0, True, np.float32(4), [4], "\n" * 900)),
    *({"group_size": bad} for bad in (0, 31, 33, 16, 256, "32", 32.0, None, True)),
    *({"embedding": bad} for bad in (5, "8", True, 8.0)),
    *({"head": bad} for bad in (3, "8", False, 8.0)),
]


@pytest.mark.parametrize("options", BAD, ids=lambda options: repr(options)[:30])
def test_arguments_are_checked(options: dict[str, Any], source: Path, tmp_path: Path) -> None:
    (name,) = options
    with refused(InputError, name, short_repr(options[name])) as caught:
        mistral_ref.quantize(source, tmp_path / "target", **options)
    assert_short(caught)
    assert names_in(tmp_path) == ["models"]


@pytest.mark.parametrize("bad", [5, "8", True, 8.0, 0, [4]], ids=repr)
def test_what_load_is_asked_to_round_to_is_checked(bad: object, source: Path) -> None:
    with refused(InputError, "quantize", repr(bad), 8, 4) as caught:
        load(source, quantize=bad)
    assert_short(caught)


class Stopped(Exception):  # noqa: N818 (it is none)
    """What a caller's own function may raise."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stopped, SystemExit])
@pytest.mark.parametrize("after", [1, 7, "all"])
def test_whatever_ends_it_nothing_is_left(error: type[BaseException], after: int | str, source: Path) -> None:
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == after or (after == "all" and done == total):
            raise error

    before = names_in(source.parent)
    with pytest.raises(error):
        mistral_ref.quantize(source, source.parent / "target", progress=progress)
    assert calls > 0
    assert names_in(source.parent) == before
    mistral_ref.quantize(source, source.parent / "target")  # and nothing is in the way


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["tok_embeddings", "layers.2.feed_forward.w2", "output"])
def test_weights_that_cannot_be_rounded_leave_nothing(bad: float, name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    weights = draw_weights(DENSE)
    weights[f"{name}.weight"][3, 5] = bad
    write_consolidated(source, DENSE, weights)
    with refused(CheckpointError, source / WEIGHTS, name, bad, "codes") as caught:
        mistral_ref.quantize(source, tmp_path / "target")
    assert_short(caught)
    assert names_in(tmp_path) == ["source"]
    with refused(CheckpointError, source / WEIGHTS, name, bad, "codes"):
        load(source, quantize=4)


def test_a_file_that_cannot_be_copied_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as a fault of the target."""
    (source / "LICENSE").touch()

    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", fail)
    with refused(InputError, source / "LICENSE", "copied", "Input/output error") as caught:
        mistral_ref.quantize(source, source.parent / "target")
    assert_short(caught)
    assert names_in(source.parent) == ["source"]


def test_a_name_that_is_taken_meanwhile_is_left_to_who_took_it(source: Path) -> None:
    target = source.parent / "target"

    def progress(done: int, total: int) -> None:
        if done == total:
            target.mkdir()
            (target / "other").touch()

    with refused(InputError, target, "written", "exists", "another program") as caught:
        mistral_ref.quantize(source, target, progress=progress)
    assert_short(caught)
    assert names_in(target) == ["other"]
    assert names_in(source.parent) == ["source", "target"]


def test_a_disk_without_room_is_told_before_anything_is_written(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**29, 2**29))
    with refused(InputError, source.parent / "target", "1 GiB", "512.00 MiB", "disk") as caught:
        mistral_ref.quantize(source, source.parent / "target")
    assert_short(caught)
    assert names_in(source.parent) == ["source"]


LIMITED = """
import resource, sys
import mistral_ref
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    mistral_ref.quantize(sys.argv[1], sys.argv[2])
except mistral_ref.MistralRefError as error:
    print(error)
"""


def test_a_write_that_fails_leaves_nothing(source: Path) -> None:
    """A limit on the size of files stands for a disk that gets full; small files can still be copied."""
    command = [sys.executable, "-c", LIMITED, str(source), str(source.parent / "target")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot be written: " in done.stdout
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert names_in(source.parent) == ["source"]


INTERRUPTED = """
import sys
import mistral_ref
mistral_ref.quantize(sys.argv[1], sys.argv[2], progress=lambda done, total: print(done, total, flush=True))
"""


@pytest.mark.slow
def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """A signal, while weights are rounded on several threads: the first matrix is done, and others take seconds."""
    source = tmp_path / "source"
    config = DENSE.config.replace(dim=1024, hidden_dim=8192, vocab_size=64, sliding_window=(None,) * 3)
    make_checkpoint(source, config)
    with start(sys.executable, "-c", INTERRUPTED, source, tmp_path / "target", text=True) as process:
        done, total = map(int, process.stdout.readline().split())
        assert [name for name in names_in(tmp_path) if name.endswith(".partial")]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert done < total
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert names_in(tmp_path) == ["source"]


@each_bits
def test_a_quantized_model_is_not_quantized_again(bits: int, source: Path) -> None:
    target = source.parent / "target"
    mistral_ref.quantize(source, target, bits)
    with refused(InputError, target / WEIGHTS, "tok_embeddings", "quantized already", "float weights") as caught:
        mistral_ref.quantize(target, source.parent / "again", 8)
    assert_short(caught)
    assert names_in(source.parent) == ["source", "target"]
    with refused(InputError, target / WEIGHTS, "tok_embeddings", "quantized already"):
        load(target, quantize=bits)


# ----------------------------------------------------------------------------------------------------- what is loaded


def test_what_inputs_are_rounded_to_can_be_chosen(source: Path) -> None:
    logits = {}
    for backend, options, expected in (
        ("numpy", {}, "int16"),
        ("numpy", {"dtype": "float64"}, "float"),
        ("numpy", {"quantized_inputs": "float"}, "float"),
        ("numpy", {"quantized_inputs": "int8"}, "int8"),
        ("numpy", {"quantized_inputs": "int16", "dtype": "float64"}, "int16"),
        ("numba", {}, "int16"),
        ("numba", {"quantized_inputs": "int16"}, "int16"),
        ("numba", {"quantized_inputs": "int8"}, "int8"),
        ("numba", {"bf16_inputs": "bfloat16"}, "int16"),
        ("numpy", {"bf16_inputs": "bfloat16", "dtype": "float64"}, "float"),
        ("numba", {"bf16_inputs": "bfloat16", "quantized_inputs": "int8"}, "int8"),
    ):
        model = load(source, backend, quantize=8, **options)
        assert model.ops.quantized_inputs == expected
        logits.setdefault(expected, []).append(model.forward(TOKENS))
    for other in logits["float"][1:]:
        assert distance(other, logits["float"][0]) < 1e-4
    for other in logits["int16"][1:]:
        assert distance(other, logits["int16"][0]) < 1e-3
    for other in logits["int16"][3:]:
        np.testing.assert_array_equal(other, logits["int16"][2])
    assert 1e-6 < distance(logits["int16"][1], logits["float"][0]) < 3e-3
    assert 1e-3 < distance(logits["int8"][0], logits["float"][0]) < 0.3


@each_backend
@pytest.mark.parametrize(
    ("name", "bad", "expected"),
    [
        *(("quantized_inputs", bad, ("int16", "int8", "float")) for bad in ("int4", "Int8", "", 8, "bfloat16", True)),
        *(("bf16_inputs", bad, ("float32", "bfloat16")) for bad in ("float", "int8", "", 8, None, ["bfloat16"])),
    ],
)
def test_what_inputs_are_rounded_to_is_checked(
    backend: str, name: str, bad: object, expected: tuple[str, ...], source: Path
) -> None:
    with refused(InputError, name, repr(bad), *expected) as caught:
        load(source, backend, **{name: bad})
    assert_short(caught)


def test_compiled_kernels_round_inputs_always(source: Path) -> None:
    with refused(InputError, "quantized_inputs", "'float'", "backend='numpy'", "'int16'") as caught:
        load(source, "numba", quantized_inputs="float")
    assert_short(caught)


def test_numpy_alone_reads_quantized_weights_without_numba(source: Path) -> None:
    target = source.parent / "target"
    code = f"""
import sys
import mistral_ref
mistral_ref.quantize({str(source)!r}, {str(target)!r})
logits = mistral_ref.load({str(target)!r}, backend="numpy").forward([1, 2])
mistral_ref.load({str(source)!r}, dtype="float64", quantize=8).forward([1, 2])
assert not {{"numba", "llvmlite"}} & {{name.partition(".")[0] for name in sys.modules}}
print(logits.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"(2, {DENSE.config.vocab_size})\n"


@each_backend
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("family", [DENSE, TIED, MIXTURE], ids=lambda family: family.name)
def test_synthetic_models_of_few_bits_load_and_compute(family: Family, kind: str, backend: str, tmp_path: Path) -> None:
    config = family.config.replace(dim=160, hidden_dim=200)
    model = load(make_checkpoint(tmp_path / "model", config, kind=kind), backend)
    kinds = {matrix.kind for matrix in matrices(model.weights)}
    assert kinds == {"int8", kind} | ({"bf16"} if config.moe else set())
    assert (model.config.moe, model.config.tied_embeddings) == (config.moe, config.tied_embeddings)
    w1 = matrices(model.weights.layers[0].feed_forward)[-1].rows(slice(None), np.float64)
    assert 0.8 < w1.std() * w1.shape[1] ** 0.5 < 1.3  # the scale, of four bits, is rounded up
    assert abs(w1.mean()) < 0.15 * w1.std()  # half a step of 4 bits is 0.11
    logits = model.forward(tokens_for(config, 9))
    assert np.isfinite(logits).all()
    assert logits.std() > 0.1


# ------------------------------------------------------------------------------------------------------- hostile files


@cache
def valid(bits: int = 4) -> Files:
    """Return the files of a quantized directory that loads, by name."""
    small = dataclasses.replace(MIXTURE, config=MIXTURE.config.replace(dim=40, hidden_dim=12))
    with tempfile.TemporaryDirectory() as made:
        source, target = Path(made) / "source", Path(made) / "target"
        source.mkdir()
        write_consolidated(source, small)
        mistral_ref.quantize(source, target, bits)
        return {file.name: file.read_bytes() for file in target.iterdir()}


def with_header(change: Callable[[dict[str, Any]], None]) -> Files:
    header, data = header_of(valid()[WEIGHTS])
    change(header)
    return {WEIGHTS: tensor_file(header, data)}


def with_metadata(content: object) -> Files:
    text = content if isinstance(content, str) else json.dumps(content)
    return with_header(lambda header: header.update(__metadata__={FORMAT: text}))


def about(**changes: object) -> dict[str, Any]:
    """Return what the metadata says, with some of it replaced."""
    return json.loads(header_of(valid()[WEIGHTS])[0]["__metadata__"][FORMAT]) | changes


def with_bits(name: str, bits: object) -> Files:
    return with_metadata(about(bits=about()["bits"] | {name: bits}))


def without_bits(name: str) -> Files:
    bits = about()["bits"]
    del bits[name]
    return with_metadata(about(bits=bits))


def with_entry(name: str, **changes: object) -> Files:
    return with_header(lambda header: header[name].update(changes))


def with_unit(unit: float) -> Files:
    header, data = header_of(valid()[WEIGHTS])
    _, end = header["units"]["data_offsets"]
    return {WEIGHTS: tensor_file(header, data[: end - 4] + np.float32(unit).tobytes() + data[end:])}


def renamed(old: str, new: str) -> Files:
    return with_header(lambda header: header.update({new: header.pop(old)}))


def without_metadata(header: dict[str, Any]) -> None:
    del header["__metadata__"]


def flat(name: str) -> list[int]:
    """Return a shape of as many bytes as a tensor has, and of as many dimensions."""
    begin, end = header_of(valid()[WEIGHTS])[0][name]["data_offsets"]
    return [1, 1, 1, end - begin]


WQ = "layers.0.attention.wq"
EXPERT = "layers.1.feed_forward.experts.2.w1"

REFUSED: dict[str, tuple[Callable[[], Files], tuple[object, ...]]] = {
    "no metadata": (lambda: with_header(without_metadata), ("metadata", "tok_embeddings")),
    "other metadata": (
        lambda: with_header(lambda header: header.update(__metadata__={"format": "pt"})),
        ("metadata", "tok_embeddings"),
    ),
    "another version": (
        lambda: with_header(lambda header: header.update(__metadata__={"mistral_ref.quantized.v2": "{}"})),
        ("'mistral_ref.quantized.v2'", FORMAT),
    ),
    "another version beside": (
        lambda: with_header(lambda header: header["__metadata__"].update({"mistral_ref.quantized.v10": "{}"})),
        ("'mistral_ref.quantized.v10'", FORMAT),
    ),
    "no JSON": (lambda: with_metadata("{"), (FORMAT, "Expecting property name")),
    "nothing": (lambda: with_metadata(""), (FORMAT, "Expecting value")),
    "nested JSON": (lambda: with_metadata("[" * 15_000), (FORMAT, "nested")),
    "too much JSON": (lambda: with_metadata("[]," * 30_000), ("safetensors file", 20000)),
    "a key twice": (lambda: with_metadata('{"bits": {}, "bits": {}}'), (FORMAT, "'bits'", "twice")),
    **{
        f"metadata {content!r}"[:40]: (
            lambda content=content: with_metadata(content),
            (FORMAT, short_repr(None if content == "null" else content), "group_size"),
        )
        for content in ([], {}, 8, None, "null", {"group_size": 32}, {"bits": {}}, {"group_size": 32, "bits": []})
    },
    **{
        f"groups of {size!r}": (
            lambda size=size: with_metadata(about(group_size=size)),
            (FORMAT, f"'group_size': {size!r}"),
        )
        for size in (7, 0, -32, 32.0, "32", None, True, 2**70, [32])
    },
    **{
        f"{bits!r} bits": (
            lambda bits=bits: with_bits(WQ, bits),
            (FORMAT, f"'{WQ}': {'[...]' if bits == [4] else repr(bits)}", 8, 4),
        )
        for bits in (5, 0, 16, 4.0, "4", None, True, [4], {})
    },
    "bits of another": (lambda: with_bits(WQ, 8), (f"{WQ}.weight", (4, 8, 8, 4), (4, 16, 8, 4))),
    "groups of another": (
        lambda: with_metadata(about(group_size=64)),
        ("tok_embeddings.scales", (9, 2, 2, 8), (9, 1, 2, 8)),
    ),
    "a matrix that is not told of": (lambda: without_bits(EXPERT), ("units", (40,), (39,))),
    "codes of another dtype": (lambda: with_entry(f"{WQ}.weight", dtype="F8_E4M3"), (f"{WQ}.weight", "F8_E4M3")),
    "scales of another dtype": (lambda: with_entry(f"{WQ}.scales", dtype="I8"), (f"{WQ}.scales", "I8", "U8")),
    "codes of another shape": (
        lambda: with_entry(f"{WQ}.weight", shape=flat(f"{WQ}.weight")),
        (f"{WQ}.weight", (1, 1, 1, 1024), (4, 8, 8, 4)),
    ),
    "scales of another shape": (
        lambda: with_entry(f"{WQ}.scales", shape=flat(f"{WQ}.scales")),
        (f"{WQ}.scales", (1, 1, 1, 128), (4, 2, 2, 8)),
    ),
    "scales without codes": (lambda: renamed(f"{WQ}.weight", f"{WQ}x.weight"), (f"{WQ}.weight", "missing")),
    "codes without scales": (
        lambda: renamed(f"{WQ}.scales", f"{WQ}x.scales"),
        (f"{WQ}.weight", (4, 8, 8, 4), (32, 40)),
    ),
    "scales of a norm": (lambda: renamed(f"{WQ}.scales", "norm.scales"), (f"{WQ}.weight", (4, 8, 8, 4), (32, 40))),
    "scales beside a router": (
        lambda: renamed(f"{WQ}.scales", "layers.0.feed_forward.gate.scales"),
        (f"{WQ}.weight", (4, 8, 8, 4), (32, 40)),
    ),
    **{
        f"a unit of {unit}": (lambda unit=unit: with_unit(unit), ("units", float(np.float32(unit)), "powers of two"))
        for unit in (0.0, -1.0, 3.0, float("nan"), float("inf"), 2.0**-149 * 3)
    },
    "units of another dtype": (lambda: with_entry("units", dtype="I32"), ("units", "I32", "F32")),
    "no units": (lambda: renamed("units", "norms.weight"), ("norms.weight", "no model")),
    "too few units": (lambda: with_metadata(about(bits={WQ: 4})), ("units", (40,), (1,))),
    "a truncated file": (lambda: {WEIGHTS: valid()[WEIGHTS][:-1]}, ("truncated", "bytes")),
    "a file cut in the middle": (
        lambda: {WEIGHTS: valid()[WEIGHTS][: -len(valid()[WEIGHTS]) // 2]},
        ("truncated", "bytes"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_quantized_files_are_refused(name: str, tmp_path: Path) -> None:
    make, expected = REFUSED[name]
    fill(tmp_path, valid() | make())
    file = str(tmp_path) if "missing" in expected else tmp_path / WEIGHTS
    with refused(CheckpointError, file, *expected) as caught:
        load(tmp_path)
    assert_short(caught)
    assert attempt(tmp_path) == str(caught.value)


@each_bits
def test_the_files_are_valid_before_they_are_changed(bits: int, tmp_path: Path) -> None:
    fill(tmp_path, valid(bits))
    assert attempt(tmp_path) == ""
    assert {tensor.dtype for tensor in open_tensor_file(tmp_path / WEIGHTS)} == {"U8", "F32", "BF16"}


@st.composite
def hostile_weights(draw: st.DrawFn) -> bytes:
    """Draw a file of quantized weights whose header, or what its metadata says, or any of its bytes are others."""
    content = valid(draw(st.sampled_from([8, 4])))[WEIGHTS]
    what = draw(st.sampled_from(["header", "metadata", "bytes"]))
    if what == "bytes":
        return draw(other_bytes(content))
    header, data = header_of(content)
    if what == "header":
        return tensor_file(draw(other_json(header)), data)
    said = json.loads(header["__metadata__"][FORMAT])
    header["__metadata__"][FORMAT] = json.dumps(draw(other_json(said)))
    return tensor_file(header, data)


@settings(max_examples=int(os.environ.get("MISTRAL_REF_EXAMPLES", "60")))
@given(hostile_weights())
def test_any_hostile_quantized_file(content: bytes) -> None:
    """It loads, or is refused in one line, in bounded time and memory."""
    with tempfile.TemporaryDirectory() as directory:
        fill(Path(directory), valid() | {WEIGHTS: content})
        attempt(Path(directory))


def test_a_header_of_the_largest_mixture_is_not_too_long_to_be_read() -> None:
    """Mixtral 8x22B has 1,568 matrices in layers: two tensors for each, and its name in the metadata once more."""
    config = ModelConfig(
        dim=6144,
        n_layers=56,
        n_heads=48,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=16384,
        vocab_size=32768,
        norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=(None,) * 56,
        rope_row_order="interleaved",
        moe=MixtureOfExperts(num_experts=8, num_experts_per_tok=2),
    )
    planned, end = list(plan(config, "int4", 0)), 0
    header: dict[str, Any] = {"__metadata__": plan_metadata(planned, "int4")}
    for tensor in planned:
        begin, end = end, end + tensor.spec.nbytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, end]}
    assert len(header) > 3000
    assert len(json.dumps(header)) < MAX_JSON_BYTES
