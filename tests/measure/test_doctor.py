"""The doctor as a whole, and on files that are not whole: what prevents loading is a finding, and never a traceback."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.checkpoints import write_hf
from support.errors import refused
from support.gguf_files import tekken_fields, write_gguf
from support.hostile import other_bytes
from support.hub_cache import into_cache
from support.patients import assert_finds, assert_healthy, change_json, family, tekken, write_json, write_patient

import mistral_ref
from mistral_ref import doctor
from mistral_ref.errors import InputError
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.text.tekken import tekken_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 42\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a healthy model in Hugging Face's layout, in shards."""
    directory = tmp_path / "model"
    write_patient(directory, consolidated=False)
    (directory / "model.safetensors").unlink()
    write_hf(directory, family(), shards=3)
    assert_healthy(directory)
    return directory


def test_the_demonstration_model_is_healthy() -> None:
    report = assert_healthy(DEMO_MODEL)
    assert report.left_out == ()
    assert {one.partition(":")[0] for one in report.examined} == {path.name for path in DEMO_MODEL.iterdir()}


def test_one_broken_part_does_not_hide_the_others(model: Path) -> None:
    change_json(model / "config.json", lambda content: content.update(hidden_act="gelu"))
    write_json(model / "generation_config.json", {"eos_token_id": 22})
    (model / "tokenizer.json").write_text("{")
    found = {one.file.name for one in doctor.examine(model).findings}
    assert found == {"config.json", "generation_config.json", "tokenizer.json"}


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors", "tekken.json"])
def test_a_pointer_of_git_lfs(model: Path, name: str) -> None:
    (model / name).write_text(POINTER)
    assert_finds(model, "wrong", model / name, "Git LFS")


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors", "tekken.json"])
def test_a_link_that_leads_nowhere(model: Path, name: str) -> None:
    (model / name).unlink()
    (model / name).symlink_to("../../blobs/none")
    assert_finds(model, "wrong", model / name, "../../blobs/none")


def test_a_snapshot_of_the_hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    snapshot = into_cache(tmp_path / "hub", "org/name", model)
    blobs = snapshot.parents[1] / "blobs"
    assert_healthy(Path("org/name"))
    shard = snapshot / "model-00002-of-00003.safetensors"
    content = shard.resolve()
    content.rename(blobs / f"{content.name}.incomplete")
    assert_finds(Path("org/name"), "wrong", shard, os.readlink(shard))
    shard.unlink()
    assert_finds(Path("org/name"), "wrong", snapshot, "download", n=2)
    monkeypatch.chdir(snapshot)
    assert doctor.examine(".").findings[0].what == doctor.examine("org/name").findings[0].what
    with refused(InputError, "org/other"):
        doctor.examine("org/other")


@pytest.mark.parametrize("name", ["model-00001-of-00003.safetensors.aria2", ".cache/huggingface/download/x.incomplete"])
def test_a_download_that_has_not_ended(model: Path, name: str) -> None:
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    (model / name).touch()
    assert_finds(model, "suspicious", model / name, "download")


def test_an_index_and_its_shards(model: Path) -> None:
    index, shard = model / "model.safetensors.index.json", model / "model-00002-of-00003.safetensors"
    size = sum(one.raw.nbytes for one in mistral_ref.files.checkpoint.open_checkpoint(model).tensors.values())
    change_json(index, lambda content: content["metadata"].update(total_size=size + 2))
    assert_finds(model, "suspicious", index, "total_size", size, size + 2)
    change_json(index, lambda content: content["metadata"].update(total_size=size))
    assert_healthy(model)
    shutil.copy(shard, model / "model-00004-of-00004.safetensors")
    assert_finds(model, "suspicious", model / "model-00004-of-00004.safetensors", index.name)
    (model / "model-00004-of-00004.safetensors").unlink()
    write_hf(model, family())
    assert_finds(model, "suspicious", index, "model.safetensors")
    (model / "model.safetensors").unlink()
    shard.rename(model / "elsewhere")
    assert_finds(model, "wrong", shard, "No such file")


def test_a_file_that_is_cut(model: Path) -> None:
    shard = model / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 10)
    assert_finds(model, "wrong", shard, "truncated", shard.stat().st_size)


def test_a_gguf_file_that_is_cut_is_examined_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, family(), tekken_fields(tekken_tokenizer(tekken(), "tekken.json")))
    assert len(assert_healthy(path).examined) == 4
    os.truncate(path, path.stat().st_size - 1000)
    assert_finds(path, "wrong", path, "bytes")
    examined = doctor.examine(path).examined
    assert [any(word in one for one in examined) for word in ("configuration", "Tekken", "weight")] == [
        True,
        True,
        False,
    ]
    os.truncate(path, 100)
    assert_finds(path, "wrong", path, "truncated")
    assert doctor.examine(path).examined == ()


def test_weights_that_are_not_there_are_left_out_unless_pickles_are(tmp_path: Path) -> None:
    write_patient(tmp_path)
    for name in ("model.safetensors", "consolidated.safetensors"):
        (tmp_path / name).unlink()
    assert "weights" in assert_healthy(tmp_path).left_out[0]
    (tmp_path / "pytorch_model.bin").touch()
    assert_finds(tmp_path, "wrong", tmp_path, "pytorch_model.bin", "model.safetensors")


def test_without_a_configuration(tmp_path: Path) -> None:
    write_patient(tmp_path, consolidated=False)
    (tmp_path / "config.json").unlink()
    assert_finds(tmp_path, "wrong", tmp_path, "params.json", "config.json")
    assert len(doctor.examine(tmp_path).examined) == 2  # both files of the tokenizer
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert_finds(tmp_path, "wrong", tmp_path, "params.json", "config.json", n=2)
    assert "weights.safetensors" in doctor.examine(tmp_path).findings[1].what


@pytest.mark.parametrize("name", ["", "notes.txt", "notes.json", "tokenizer.json"])
def test_what_is_no_model(tmp_path: Path, name: str) -> None:
    if name:
        (tmp_path / name).write_text("{}")
    if name == "tokenizer.json":  # a file alone; its directory would be examined
        with refused(InputError, tmp_path / name, "a file"):
            doctor.examine(tmp_path / name)
        return
    with refused(InputError, tmp_path):
        doctor.examine(tmp_path)
    with refused(InputError, tmp_path / "none"):
        doctor.examine(tmp_path / "none")


FILES = ("params.json", "config.json", "tekken.json", "tokenizer.json", "tokenizer_config.json")
FILES += ("generation_config.json", "consolidated.safetensors", "model-00001-of-00002.safetensors")
FILES += ("model.safetensors.index.json", "tiny.gguf")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a healthy model in every layout."""
    directory = tmp_path_factory.mktemp("whole")
    write_patient(directory)
    (directory / "model.safetensors").unlink()
    write_hf(directory, family(), shards=2)
    write_gguf(directory / "tiny.gguf", family())
    assert_healthy(directory)
    return directory


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(name=st.sampled_from(FILES), data=st.data())
def test_changed_files_never_end_in_a_traceback(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("changed")
    for path in whole.iterdir():
        os.link(path, directory / path.name)
    content = data.draw(other_bytes((whole / name).read_bytes()))
    (directory / name).unlink()
    (directory / name).write_bytes(content)
    report = doctor.examine(directory)
    assert all(one.what.isprintable() and len(one.what) < 3000 for one in report.findings)
    for path in (directory / name,) if name in ("params.json", "config.json", "tiny.gguf") else ():
        doctor.examine(path)
    shutil.rmtree(directory)
