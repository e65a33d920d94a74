"""Models by name, from the hub's cache: which files a name means, what is said of what is not there."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import FAMILIES, write_consolidated, write_hf
from support.errors import refused
from support.gguf_files import sentencepiece_fields, write_gguf
from support.hub_cache import COMMIT, into_cache
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref.errors import InputError, TokenizerError
from mistral_ref.files.hub import cache_folder
from mistral_ref.files.paths import model_path
from mistral_ref.text import find_tokenizer, load_tokenizer

FAMILY = replace(FAMILIES["dense_windowed"], config=FAMILIES["dense_windowed"].config.replace(vocab_size=384))
OTHER = "fedcba98" * 5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an empty cache; the working directory is another empty one."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a directory with a tiny model and its tokenizer."""
    directory = tmp_path / "files"
    directory.mkdir()
    write_hf(directory, FAMILY)
    (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
    return directory


def dots(cache: Path, name: str, commit: str = COMMIT, branch: str | None = "main") -> Path:
    """Put a model of one file into the cache, of which only the path counts."""
    directory = cache.parent / "one file"
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text("{}")
    return into_cache(cache, name, directory, commit, branch)


def test_a_name_loads_what_its_snapshot_holds(cache: Path, files: Path, tmp_path: Path) -> None:
    expected = mistral_ref.load(files, backend="numpy").complete("the mill", max_tokens=4)
    snapshot = into_cache(cache, "org/name", files)
    (snapshot / "picture.png").symlink_to("../../blobs/none")  # nobody reads it
    model = mistral_ref.load("org/name", backend="numpy")
    assert model.complete("the mill", max_tokens=4) == expected
    assert load_tokenizer("org/name").encode("the mill") == load_tokenizer(snapshot).encode("the mill")
    assert find_tokenizer("org/name") == snapshot / "tokenizer.model"
    mistral_ref.quantize("org/name", tmp_path / "small")
    assert mistral_ref.load(tmp_path / "small", backend="numpy").tokenizer is not None


def test_a_gguf_file_has_the_name_of_its_repository_before_its_own(cache: Path, tmp_path: Path) -> None:
    for file in ("tiny.gguf", "folder/tiny.gguf", "folder/other.gguf"):
        (tmp_path / "files" / file).parent.mkdir(parents=True, exist_ok=True)
        write_gguf(tmp_path / "files" / file, FAMILY, sentencepiece_fields(tiny_tokenizer()))
    expected = mistral_ref.load(tmp_path / "files" / "tiny.gguf", backend="numpy").complete("the mill", max_tokens=4)
    snapshot = into_cache(cache, "org/name", tmp_path / "files")
    for name in ("org/name/tiny.gguf", "org/name/folder/other.gguf", f"org/name@{COMMIT}/tiny.gguf", "org/name"):
        assert mistral_ref.load(name, backend="numpy").complete("the mill", max_tokens=4) == expected
        assert load_tokenizer(name).encode("the mill")
    with refused(InputError, snapshot / "none.gguf", "`mistral-ref download org/name/none.gguf`"):
        mistral_ref.load("org/name/none.gguf")


@pytest.mark.parametrize("revision", ["old", "v1.0", "refs/pr/1", "feature/windows", OTHER, OTHER[:7]])
def test_a_revision_is_a_branch_a_tag_or_a_commit(cache: Path, revision: str) -> None:
    main = dots(cache, "org/name")
    assert model_path("org/name") == model_path("org/name@main") == main
    other = dots(cache, "org/name", OTHER, revision if not OTHER.startswith(revision) else None)
    assert model_path(f"org/name@{revision}") == other
    assert model_path("org/name") == main


def test_a_commit_that_is_ambiguous_or_too_short_is_no_revision(cache: Path) -> None:
    dots(cache, "org/name")
    dots(cache, "org/name", f"{COMMIT[:-1]}f", None)
    for revision in (COMMIT[:10], "0123", "none"):
        with refused(InputError, revision, cache, f"`mistral-ref download org/name@{revision}`"):
            model_path(f"org/name@{revision}")


def test_an_existing_path_wins(cache: Path, files: Path) -> None:
    dots(cache, "org/name")
    Path("org").mkdir()
    files.rename("org/name")
    assert model_path("org/name") == Path("org/name")
    assert mistral_ref.load("org/name", backend="numpy").tokenizer is not None


def test_what_is_not_in_the_cache_is_told_with_the_command_that_fetches_it(cache: Path) -> None:
    with refused(InputError, "org/name", "no such directory", cache, "`mistral-ref download org/name`"):
        mistral_ref.load("org/name")
    with refused(InputError, "`mistral-ref download org/name@v1/a.gguf`"):
        mistral_ref.load("org/name@v1/a.gguf")
    with refused(InputError, "org/name", "no such directory"):
        mistral_ref.quantize("org/name", "small")
    for use in (load_tokenizer, find_tokenizer):
        with refused(TokenizerError, "org/name", cache, "`mistral-ref download org/name`"):
            use("org/name")


def test_a_model_without_its_branch_main_names_the_commit_that_is_there(cache: Path) -> None:
    snapshot = dots(cache, "org/name", branch="v1")
    with refused(InputError, "'main'", f"org/name@{COMMIT}"):
        model_path("org/name")
    assert model_path(f"org/name@{COMMIT}") == model_path("org/name@v1") == snapshot


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.model"])
def test_half_a_model_is_told_by_the_file_that_is_missing(cache: Path, files: Path, file: str) -> None:
    snapshot = into_cache(cache, "org/name", files)
    (snapshot / file).resolve().unlink()
    with refused(InputError, snapshot / file, "`mistral-ref download org/name`"):
        mistral_ref.load("org/name")


@pytest.mark.parametrize("there", [(), ("model-00001-of-00002.safetensors",), ("a-00002-of-00003.gguf",)])
def test_a_download_that_has_not_ended_is_told(cache: Path, tmp_path: Path, there: tuple[str, ...]) -> None:
    (tmp_path / "files").mkdir()
    for name in ("config.json", *there):
        (tmp_path / "files" / name).write_text("{}")
    snapshot = into_cache(cache, "org/name", tmp_path / "files")
    assert model_path("org/name") == snapshot
    unfinished = cache / "models--org--name" / "blobs" / "0123.incomplete"
    unfinished.touch()
    with refused(InputError, snapshot, "`mistral-ref download org/name`"):
        mistral_ref.load("org/name")


def test_an_old_download_that_never_ended_is_in_nobodys_way(cache: Path, files: Path) -> None:
    snapshot = into_cache(cache, "org/name", files)
    (cache / "models--org--name" / "blobs" / "0123.incomplete").touch()
    assert model_path("org/name") == snapshot


@pytest.mark.parametrize("name", ["a/b/c", "a", "../b", "a/..", "a/b@", "a/b@../../c", "/a/b", "a--b/c", "a/b/c.bin"])
def test_what_is_no_name_is_a_path(cache: Path, name: str) -> None:
    dots(cache, "a/b", branch="../../c")
    assert model_path(name) == Path(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "home/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface/hub"),
        ({"XDG_CACHE_HOME": "xdg", "HF_HOME": "~/hf"}, "home/hf/hub"),
        ({"HF_HOME": "hf", "HF_HUB_CACHE": "$HOME/cache"}, "home/cache"),
        ({"HF_HOME": "", "HF_HUB_CACHE": ""}, "home/.cache/huggingface/hub"),
    ],
)
def test_where_the_cache_is(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "home")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_files_in_place_of_links_are_read_too(cache: Path, files: Path) -> None:
    snapshot = cache / "models--org--name" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    files.rename(snapshot)
    os.makedirs(cache / "models--org--name" / "refs")
    (cache / "models--org--name" / "refs" / "main").write_text(COMMIT)
    assert mistral_ref.load("org/name", backend="numpy").tokenizer is not None


def test_consolidated_files_are_a_snapshot_too(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    write_consolidated(tmp_path / "files", FAMILY)
    into_cache(cache, "org/name", tmp_path / "files")
    assert mistral_ref.load("org/name", backend="numpy").config.n_layers == FAMILY.config.n_layers
