"""The demonstration model in the package: what it promises, against transformers, and far past its window."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.paths import GOLDEN
from support.tiny import BACKENDS

import mistral_ref
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.sampling import SamplingSettings, sample

GOLDEN = load_file(GOLDEN / "demo_model.safetensors")
TOKENS = GOLDEN["tokens"].tolist()


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> mistral_ref.Model:
    return mistral_ref.load(backend=request.param, threads=1)


def test_every_feature_is_at_work(model: mistral_ref.Model) -> None:
    config = model.config
    assert 1_000_000 <= config.n_parameters <= 3_000_000
    assert 4 <= config.n_layers <= 8
    assert config.n_kv_heads < config.n_heads
    assert config.n_heads * config.head_dim != config.dim
    assert {*config.sliding_window} == {config.sliding_window[0]}
    assert config.sliding_window[0] <= 64
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) <= 6 * 2**20
    assert {matrix.kind for matrix in (model.weights.tok_embeddings, model.weights.layers[0].wq)} == {"bf16"}
    tokenizer = model.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.piece(0)) == (1, 2, "<unk>")
    assert 1024 <= tokenizer.vocab_size == config.vocab_size <= 2048
    text = 'Tom said,  "Hi!"\nThen he left. \N{SLIGHTLY SMILING FACE}'
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("chunk", [1500, 100])
def test_logits_are_those_of_transformers(model: mistral_ref.Model, chunk: int) -> None:
    """The golden text is many times longer than what a token can have heard of."""
    assert len(TOKENS) > 4 * model.config.sliding_window[0] * model.config.n_layers
    logits = model.forward(TOKENS, model.new_cache(chunk=chunk))[GOLDEN["positions"]]
    assert np.abs(logits - GOLDEN["logits"]).max() < 2e-5 * np.abs(GOLDEN["logits"]).max()


def test_it_is_not_surprised_far_past_its_window(model: mistral_ref.Model) -> None:
    nats = -model.score(TOKENS)
    window = model.config.sliding_window[0]
    assert nats[-window * model.config.n_layers :].mean() < 1.2 * nats[window : window * model.config.n_layers].mean()


def test_its_first_words_are_pinned(model: mistral_ref.Model) -> None:
    """Each of these is the likeliest by at least 0.6, far more than rounding moves."""
    assert (
        model.complete("Once upon a time", max_tokens=13) == ", there was a little girl named Lily. She loved to play"
    )


@pytest.mark.slow
def test_thousands_of_tokens_without_nan_or_loop(model: mistral_ref.Model) -> None:
    """Stories without end in one sequence: of the runs of 8 tokens among the last 1000, nearly all differ."""
    rng, settings = np.random.default_rng(5), SamplingSettings(temperature=0.8)
    cache, ids = model.new_cache(), [model.tokenizer.bos_id]
    while len(ids) < 4000:
        logits_V = model.forward(ids[cache.length :], cache, last_only=True)[0]
        assert np.isfinite(logits_V).all()
        ids.append(sample(logits_V, settings, rng, ids))
        ids += [model.tokenizer.bos_id] * (ids[-1] == model.tokenizer.eos_id)
    runs = [tuple(ids[start : start + 8]) for start in range(len(ids) - 1000, len(ids) - 7)]
    assert len(set(runs)) > 0.95 * len(runs)
