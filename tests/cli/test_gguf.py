"""Every command with a GGUF file: the same as with the weights that the file holds."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import FAMILIES
from support.command import run
from support.errors import assert_complains
from support.gguf_files import sentencepiece_fields, write_gguf
from support.paths import GOLDEN
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref.weights import matrices

TYPES = GOLDEN / "gguf_types.gguf"


@pytest.fixture(scope="module")
def talking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with a tokenizer."""
    family = FAMILIES["mixtral"]
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    family = replace(family, config=family.config.replace(vocab_size=384))
    write_gguf(path, family, sentencepiece_fields(tiny_tokenizer()))
    return path


def test_generate_from_a_file_and_its_directory(talking: Path) -> None:
    options = ("--backend", "numpy", "--temperature", 0, "--max-tokens", 4)
    text = mistral_ref.load(talking, backend="numpy").complete("the mill", max_tokens=4)
    for path in (talking, talking.parent):
        found = run("generate", "--model", path, *options, "the mill")
        assert (found.returncode, found.stdout, found.stderr) == (0, f"the mill{text}\n", "")


def test_info_shows_types_bits_metadata_and_both_names(talking: Path) -> None:
    shown = run("info", "--model", TYPES, "--tensors").stdout
    lines = {tuple(line.split()[:2]): line.split() for line in shown.splitlines()}
    assert ("layout", "gguf") in lines
    assert ("bits", "a") in lines
    every = matrices(mistral_ref.load(TYPES, backend="numpy").weights)
    n_bits, n_weights = 8 * sum(matrix.nbytes for matrix in every), sum(matrix.size for matrix in every)
    assert f"{n_bits / n_weights:.2f}" in shown
    assert "IQ4_XS (" in shown
    assert lines["llama.block_count", "3"]
    tensor = lines["layers.0.attention.wo.weight", "blk.0.attn_output.weight"]
    assert tensor[2:] == ["Q8_0", "256x64", "gguf_types.gguf"]
    shown = run("info", "--model", talking, "--window", 7).stdout
    assert "7 keys in every layer" in shown
    assert "384 texts" in shown
    assert "layers.0" not in shown


def test_trace_compare_and_perplexity(talking: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.safetensors"
    run("trace", "--model", TYPES, "--backend", "numpy", "--ids", "1,2,3", "-o", trace)
    logits = mistral_ref.load(TYPES, backend="numpy").forward([1, 2, 3])
    np.testing.assert_array_equal(mistral_ref.Trace.load(trace).steps["logits"].value, logits)
    found = run("compare", TYPES, trace, "--backend", "numpy")
    assert "all 54 steps are equal" in found.stdout
    assert run("compare", TYPES, TYPES, "--ids", "1,2,3", "--backend", "numpy", "--window", 2).returncode == 0
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the mill stood where the river bends " * 8)
    assert "perplexity" in run("perplexity", "--model", talking, "--backend", "numpy", "--context", 32, corpus).stdout


@pytest.mark.slow
def test_bench() -> None:
    done = run("bench", "--model", TYPES, "--quick", "-p", 8, "-n", 2, "-t", 1, "--backend", "numpy", "-r", 1)
    assert done.returncode == 0
    assert "gguf_types.gguf" in done.stdout


def test_a_file_is_brought_into_tile_order(tmp_path: Path) -> None:
    done = run("quantize", TYPES, tmp_path / "tiles")
    assert (done.returncode, "bits a weight" in done.stdout) == (0, True)
    options = [
        "--ids",
        "1,2,3",
        "--backend",
        "numpy",
        "--temperature",
        0,
        "--max-tokens",
        4,
        "--quantized-inputs",
        "float",
    ]
    texts = [run("generate", "--model", model, *options).stdout for model in (TYPES, tmp_path / "tiles")]
    assert texts[0] == texts[1] != ""
    assert "Q4_K" in run("info", "--model", tmp_path / "tiles").stdout


def test_mistakes_are_one_line(talking: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(TYPES.read_bytes()[:-1000])
    assert_complains(run("generate", "--model", cut, "--ids", 1).stderr, cut)
    assert_complains(run("info", "--model", tmp_path / "none.gguf").stderr, tmp_path / "none.gguf")
    assert_complains(run("generate", "--model", TYPES, "A").stderr, "tokenizer", "--ids")
    assert_complains(run("generate", "--model", TYPES, "--ids", 1, "--window", 0).stderr, "window", 0)
    assert_complains(run("generate", "--model", TYPES, "--ids", 1, "--quantize", 8).stderr, TYPES)
    assert_complains(run("quantize", TYPES, tmp_path / "out", "--bits", 4).stderr, TYPES, "packed")
    assert not (tmp_path / "out").exists()
    shutil.copy(TYPES, tmp_path / "second.gguf")
    assert_complains(run("info", "--model", tmp_path).stderr, "cut.gguf", "second.gguf")
