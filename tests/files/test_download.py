"""Downloads: what is chosen of a repository, and the transfer from a hub on the loopback."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import FAMILIES, write_consolidated, write_hf
from support.command import run
from support.errors import assert_complains, refused
from support.fake_hub import COMMIT, FakeHub, Repository, fake_hub
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref.errors import CheckpointError, InputError, size
from mistral_ref.files.download import chosen, plan

FAMILY = replace(FAMILIES["dense_windowed"], config=FAMILIES["dense_windowed"].config.replace(vocab_size=384))

# ---------------------------------------------------------------------------------------------------- what is chosen

BOTH = {
    "README.md": 1, "params.json": 2, "consolidated.safetensors": 3, "tekken.json": 4, "config.json": 5,
    "model.safetensors.index.json": 6, "model-00001-of-00002.safetensors": 7, "model-00002-of-00002.safetensors": 8,
    "tokenizer.json": 9, "chat_template.jinja": 10, "pytorch_model.bin": 11, "consolidated.00.pth": 12,
    "onnx/model.safetensors": 13, "generation_config.json": 14, "SYSTEM_PROMPT.txt": 15, "model.fp32.safetensors": 16,
}  # fmt: skip
GGUFS = {
    "config.json": 1, "a-Q4_K_M.gguf": 2**30, "a-Q4_K_S.gguf": 2, "mmproj-a.gguf": 3,
    "q8/a-Q8_0-00001-of-00002.gguf": 4, "q8/a-Q8_0-00002-of-00002.gguf": 2**20,
}  # fmt: skip
SMALL = {
    "params.json",
    "config.json",
    "tekken.json",
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
    "SYSTEM_PROMPT.txt",
}


def test_one_layout_is_chosen_and_the_small_files() -> None:
    own = {"consolidated.safetensors"}
    theirs = {*(name for name in BOTH if name.startswith("model") and "fp32" not in name)}
    assert {*chosen(BOTH, "a/b")} == {*chosen(BOTH, "a/b", layout="mistral")} == own | SMALL
    assert {*chosen(BOTH, "a/b", layout="hf")} == theirs | SMALL
    assert {*chosen({name: 1 for name in BOTH if name not in own}, "a/b")} == theirs | SMALL
    strange = {"../a.model": 1, "sub/tekken.json": 1, "x/../../b.gguf": 1}
    assert {*chosen(BOTH | strange, "a/b")} == own | SMALL
    assert chosen({"a.gguf": 1} | strange, "a/b") == ["a.gguf"]


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("Q4_K_M", ["a-Q4_K_M.gguf"]),
        ("a-q4_k_s.gguf", ["a-Q4_K_S.gguf"]),
        ("*_S*", ["a-Q4_K_S.gguf"]),
        ("Q8_0", ["q8/a-Q8_0-00001-of-00002.gguf", "q8/a-Q8_0-00002-of-00002.gguf"]),
        ("q8/a-Q8_0-00001-of-00002.gguf", ["q8/a-Q8_0-00001-of-00002.gguf", "q8/a-Q8_0-00002-of-00002.gguf"]),
    ],
)
def test_one_gguf_file_is_chosen_with_its_shards(file: str, expected: list[str]) -> None:
    assert chosen(GGUFS, "a/b", file=file) == expected


def test_several_gguf_files_are_listed_with_their_sizes() -> None:
    with refused(InputError, "a/b", "--file", "a-Q4_K_M.gguf (1.00 GiB)", "00001-of-00002.gguf (1.00 MiB)") as caught:
        chosen(GGUFS, "a/b")
    assert "mmproj" not in str(caught.value)
    with refused(InputError, "'Q4'", "several", "a-Q4_K_M.gguf (1.00 GiB)", "a-Q4_K_S.gguf (2 bytes)") as caught:
        chosen(GGUFS, "a/b", file="Q4")
    assert "Q8_0" not in str(caught.value)
    with refused(InputError, "'Q5'", "none", "a-Q4_K_M.gguf", "Q8_0"):
        chosen(GGUFS, "a/b", file="Q5")
    assert chosen({"a.gguf": 1, "b.txt": 1}, "a/b") == ["a.gguf"]


def test_a_layout_that_is_not_there_is_told_with_those_that_are() -> None:
    with refused(InputError, "a/b", "gguf", "mistral or hf"):
        chosen(BOTH, "a/b", layout="gguf")
    with refused(InputError, "a/b", "no weights", "safetensors", "GGUF"):
        chosen({"README.md": 1, "pytorch_model.bin": 1, "config.json": 1}, "a/b")
    with refused(InputError, "a/b", "layout mistral", "expected gguf"):
        chosen({"consolidated.safetensors": 1, "a.gguf": 1}, "a/b", layout="mistral")


def test_names_and_options_that_contradict_each_other() -> None:
    for name in ("name", "a/b/c", "../a", "a/b@"):
        with refused(InputError, repr(name), "ORG/NAME"):
            plan(name)
    with refused(InputError, "'v1'", "'v2'"):
        plan("a/b@v1", revision="v2")
    with refused(InputError, "'c.gguf'", "'d.gguf'"):
        plan("a/b/c.gguf", file="d.gguf")
    with refused(InputError, "'c.gguf'", "hf", "gguf"):
        plan("a/b/c.gguf", layout="hf")


# ------------------------------------------------------------------------------------------------------- the transfer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Return a hub with a model of both layouts, and one in GGUF files; its cache is empty."""
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed")
    from huggingface_hub import constants  # noqa: PLC0415

    files = tmp_path / "files"
    files.mkdir()
    write_hf(files, FAMILY)
    write_consolidated(files, FAMILY)
    both = {path.name: path.read_bytes() for path in files.iterdir()} | {"tokenizer.model": tiny_tokenizer()}
    both |= {"README.md": b"a model", "pytorch_model.bin": b"a pickle", "notes.txt": b""}
    ggufs = {"a-Q4_K_M.gguf": b"GGUF" + bytes(5000), "a-Q8_0.gguf": b"GGUF"}
    repositories = {
        "org/both": Repository(both, ("main", "v1")),
        "org/ggufs": Repository(ggufs),
        "org/gated": Repository(both, is_gated=True),
    }
    with fake_hub(repositories) as hub:
        for name, value in {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "hub"), "NO_PROXY": "*"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
        monkeypatch.chdir(tmp_path)
        yield hub


def fetched(hub: FakeHub) -> set[str]:
    return {path.rpartition("/")[2] for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}


def test_a_model_is_fetched_into_the_cache_and_found_there_by_its_name(hub: FakeHub) -> None:
    done = run("download", "org/both")
    assert done.returncode == 0, done.stderr
    assert done.stdout == 'mistral-ref generate --model org/both "Once upon a time"\n'
    names = {"params.json", "config.json", "consolidated.safetensors", "tokenizer.model"}
    assert names <= fetched(hub) <= {*names, "generation_config.json", "tokenizer_config.json"}
    n_bytes = sum(len(hub.repositories["org/both"].files[name]) for name in fetched(hub))
    for fact in (size(n_bytes), COMMIT[:12], *names):
        assert fact in done.stderr
    model = mistral_ref.load("org/both", backend="numpy")
    assert model.tokenizer is not None
    hub.asked.clear()
    again = run("download", "org/both")
    assert (again.stdout, fetched(hub)) == (done.stdout, set())


def test_a_revision_and_a_layout_into_a_directory(hub: FakeHub) -> None:
    done = run("download", "org/both@v1", "--layout", "hf", "--to", "my model")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "mistral-ref generate --model 'my model' \"Once upon a time\"\n"
    assert "model.safetensors" in fetched(hub)
    assert "consolidated.safetensors" not in fetched(hub)
    assert mistral_ref.load("my model", backend="numpy").config.n_layers == FAMILY.config.n_layers
    assert not os.path.exists("hub")


def test_one_gguf_file_is_named_afterwards(hub: FakeHub) -> None:
    assert_complains(run("download", "org/ggufs").stderr, "--file", "a-Q4_K_M.gguf (4.89 KiB)", "a-Q8_0.gguf (4 bytes)")
    done = run("download", "org/ggufs", "--file", "Q8")
    assert done.stdout == 'mistral-ref generate --model org/ggufs/a-Q8_0.gguf "Once upon a time"\n'
    assert fetched(hub) == {"a-Q8_0.gguf"}
    done = run("download", "org/ggufs/a-Q4_K_M.gguf", "--to", "files")
    assert done.stdout == 'mistral-ref generate --model files/a-Q4_K_M.gguf "Once upon a time"\n'


@pytest.mark.parametrize("to", [None, "there"])
def test_a_download_that_was_interrupted_goes_on_where_it_stopped(hub: FakeHub, to: str | None) -> None:
    download = plan("org/ggufs", file="Q4_K_M", to=to)

    def interrupt(done: int, total: int) -> None:
        assert total == 5004
        if done >= 3000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download.run(interrupt)
    download = plan("org/ggufs", file="Q4_K_M", to=to)
    assert download.missing == ("a-Q4_K_M.gguf",)
    hub.asked.clear()
    seen: list[int] = []
    download.run(lambda done, _: seen.append(done))
    assert [start for method, path, start in hub.asked if method == "GET" and "/cdn/" in path] == [2000]
    assert seen[0] == 2000
    assert seen == sorted(seen)
    assert seen[-1] == 5004
    assert plan("org/ggufs", file="Q4_K_M", to=to).missing == ()
    assert not [*Path().rglob("*.incomplete")]


def test_a_connection_that_breaks_off_is_taken_up_again(hub: FakeHub) -> None:
    hub.breaks_after = 2500
    assert run("download", "org/ggufs", "--file", "Q4", "--to", "there").returncode == 0
    assert Path("there/a-Q4_K_M.gguf").read_bytes() == hub.repositories["org/ggufs"].files["a-Q4_K_M.gguf"]
    assert any(start > 0 for _, _, start in hub.asked)


@pytest.mark.parametrize("to", [None, "there"])
def test_a_file_that_is_not_as_listed_is_told_and_not_kept(hub: FakeHub, to: str | None) -> None:
    hub.lists["a-Q8_0.gguf"] = 5
    with refused(InputError, "a-Q8_0.gguf", 5):
        plan("org/ggufs", file="Q8", to=to).run()
    hub.changes = True
    with refused(CheckpointError, ".incomplete", "hash"):
        plan("org/ggufs", file="Q4", to=to).run()
    hub.changes = False
    plan("org/ggufs", file="Q4", to=to).run()
    assert plan("org/ggufs", file="Q4", to=to).missing == ()


def test_a_full_disk_is_noticed_first(hub: FakeHub) -> None:
    hub.lists["a-Q8_0.gguf"] = 2**60
    with refused(InputError, "x/y", "1073741824.00 GiB", "disk"):
        plan("org/ggufs", file="Q8", to="x/y").run()
    assert not os.path.exists("x")
    assert fetched(hub) == set()


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["org/gated"], ["org/gated", "licence", "/org/gated", "hf auth login"]),
        (["org/none"], ["org/none", "no such model", "hf auth login"]),
        (["org/both", "--revision", "v9"], ["org/both", "'v9'"]),
        (["org/both@v9"], ["org/both", "'v9'"]),
        (["org/both", "--layout", "gguf"], ["gguf", "mistral or hf"]),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: FakeHub, arguments: list[str], facts: list[str]) -> None:
    done = run("download", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert_complains(done.stderr.splitlines()[-1] + "\n", *facts)


def test_without_a_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants  # noqa: PLC0415

    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert_complains(run("download", "org/both").stderr, "org/both", "http://127.0.0.1:9", "cannot be reached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_complains(run("download", "org/both").stderr, "org/both", "HF_HUB_OFFLINE")


def test_without_the_package_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert_complains(run("download", "org/name").stderr, "pip install -U huggingface_hub")


def test_another_revision_replaces_files_of_the_same_size(hub: FakeHub) -> None:
    plan("org/ggufs", file="Q4", to="there").run()
    hub.repositories["org/ggufs"].files["a-Q4_K_M.gguf"] = b"GGUF" + bytes(4999) + b"1"
    hub.repositories["org/ggufs"].files["a-Q8_0.gguf"] = b"GGUG"
    for file in ("Q4", "Q8"):
        plan("org/ggufs", file=file, to="there").run()
        assert plan("org/ggufs", file=file, to="there").missing == ()
    assert Path("there/a-Q4_K_M.gguf").read_bytes()[-1:] == b"1"
    assert Path("there/a-Q8_0.gguf").read_bytes() == b"GGUG"
