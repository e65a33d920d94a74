"""Every command with a model's name, without a network, and the list of what the hub's cache holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import FAMILIES, write_consolidated, write_hf
from support.command import run
from support.errors import assert_complains
from support.gguf_files import sentencepiece_fields, write_gguf
from support.hub_cache import COMMIT, into_cache
from support.paths import ROOT
from support.tiny_tokenizers import tiny_tokenizer

from mistral_ref.cli import _COMMANDS
from mistral_ref.errors import size
from mistral_ref.files.build_weights import open_model
from mistral_ref.weights import matrices

FAMILY = replace(FAMILIES["dense_windowed"], config=FAMILIES["dense_windowed"].config.replace(vocab_size=384))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a cache with a model of each layout, one that cannot be loaded, and half a one."""
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    for name in ("org/consolidated", "org/hf", "org/half"):
        files = tmp_path / name
        files.mkdir(parents=True)
        (write_consolidated if name == "org/consolidated" else write_hf)(files, FAMILY)
        (files / "tokenizer.model").write_bytes(tiny_tokenizer())
        snapshot = into_cache(cache, name, files)
    (snapshot / "model.safetensors").resolve().unlink()
    for file in ("tiny.gguf", "q4/tiny.gguf", "mmproj.gguf"):
        (tmp_path / "ggufs" / file).parent.mkdir(parents=True, exist_ok=True)
        write_gguf(tmp_path / "ggufs" / file, FAMILY, sentencepiece_fields(tiny_tokenizer()))
    into_cache(cache, "org/ggufs", tmp_path / "ggufs", branch="old")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    into_cache(cache, "google/bert", tmp_path / "bert")
    return cache


def test_info_without_a_model_lists_those_of_the_cache(cache: Path) -> None:
    done = run("info")
    assert (done.returncode, done.stderr) == (0, "")
    assert str(cache) in done.stdout
    listed, _, others = done.stdout.partition("cannot be loaded")
    rows = dict(line.split(maxsplit=1) for line in listed.splitlines() if line.startswith("  "))
    layouts = {name: row.partition(",")[0] for name, row in rows.items()}
    assert layouts == {
        "org/consolidated": "consolidated",
        "org/hf": "huggingface",
        f"org/ggufs@{COMMIT}/tiny.gguf": "gguf",
        f"org/ggufs@{COMMIT}/q4/tiny.gguf": "gguf",
    }
    assert [line.split()[0] for line in others.splitlines() if line.startswith("  ")] == ["google/bert", "org/half"]
    for name, row in rows.items():
        shown = run("info", "--model", name)
        assert shown.returncode == 0
        n_weights = sum(matrix.nbytes for matrix in matrices(open_model(name)[1]))
        assert row.endswith(f", {size(n_weights)}")
    assert run("info", "--model", "google/bert").returncode == 2
    assert "--model demo" in done.stdout
    narrow = run("info", columns=40).stdout
    assert max(map(len, narrow.splitlines())) <= 40
    assert "".join(narrow.split()) == "".join(done.stdout.split())
    assert run("info", "--model", "demo").stdout.startswith("architecture")


def test_info_of_no_cache_lists_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "none"))
    done = run("info")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")] == ["none"]
    assert_complains(run("info", "--tensors").stderr, "--tensors", "--model")
    assert_complains(run("info", "--window", 8).stderr, "--window", "--model")


# Runs commands in a process that ends when anything asks for a socket, or for the address of a machine.
WITHOUT_SOCKETS = """
import json, os, sys

def end(event, arguments):
    if event.startswith("socket."):
        os._exit(99)

sys.addaudithook(end)
from support.command import run
from mistral_ref import kernel_choice
from mistral_ref.measure import machine

machine.uncached_bytes = lambda _: 2**20  # bench is quicker
kernel_choice.of_a_model = lambda *_, **__: []  # and warm
commands = json.loads(sys.argv[1])
print(*(run(*command, stdin=stdin).returncode for command, stdin in commands), flush=True)
import socket
socket.socket()  # this, and nothing before, ends the process
"""
NUMPY = ("--model", "org/hf", "--backend", "numpy")
GENERATE = [
    (("generate", *NUMPY, "--max-tokens", 2, "the mill"), ""),
    (("generate", "--model", "org/nowhere", "the mill"), ""),
]
EVERY = [
    *GENERATE,
    (("chat", *NUMPY, "--max-tokens", 2), "the mill"),
    (("step", *NUMPY, "the mill"), "next"),
    (("trace", *NUMPY, "the mill"), ""),
    (("compare", "org/hf", "org/consolidated", "--backend", "numpy", "the mill"), ""),
    (("perplexity", *NUMPY, "--context", 8), "the mill " * 8),
    (("bench", *NUMPY, "-p", 2, "-n", 2, "-r", 1), ""),
    (("warm", "--model", "org/hf"), ""),
    (("info",), ""),
    (("info", "--model", f"org/ggufs@{COMMIT}/tiny.gguf", "--tensors"), ""),
    (("doctor", "org/hf"), ""),
    (("quantize", "org/hf", "small"), ""),
    (("conform", "make", "kit"), ""),
]


@pytest.mark.parametrize("commands", [GENERATE, pytest.param(EVERY, marks=pytest.mark.slow)], ids=["generate", "every"])
def test_no_command_opens_a_socket(cache: Path, tmp_path: Path, commands: list[tuple[tuple[object, ...], str]]) -> None:
    with_sockets = {"download", "explore"}  # explore listens on the loopback
    assert {command[0] for command, _ in EVERY} == {*_COMMANDS} - with_sockets
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SOCKETS, json.dumps(commands)],
        cwd=tmp_path / "work",
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *filter(None, sys.path)])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["2" if "org/nowhere" in command else "0" for command, _ in commands], done.stderr
    assert done.returncode == 99
