"""Model: the likeliest tokens of a text, vectors of texts, memory that is asked for beforehand, copies and pickles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.marks import slow
from support.tiny import BACKENDS, SMALL, configs, model_of, tokens_for
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref import CacheError, InputError, Model, Trace
from mistral_ref.sampling import log_softmax
from mistral_ref.text.byte_bpe import ByteBPE
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.text.split_patterns import TEKKEN

each_backend = pytest.mark.parametrize("backend", BACKENDS)

# ----------------------------------------------------------------------------------------------- scores and embeddings


@each_backend
@pytest.mark.parametrize("n_tokens", [2, 40, *slow([700])])  # 700: more than a chunk
def test_scores_are_those_of_the_logits(backend: str, n_tokens: int) -> None:
    model, tokens = model_of(SMALL, backend=backend), tokens_for(SMALL, n_tokens)
    logprobs_TV = log_softmax(model.forward(tokens[:-1]))
    scores = model.score(tokens, top=3)
    expected = logprobs_TV[np.arange(n_tokens - 1), tokens[1:]]
    np.testing.assert_array_equal(scores.logprobs, expected)
    np.testing.assert_array_equal(model.score(tokens), expected)
    np.testing.assert_array_equal(scores.top_ids, np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :3])
    np.testing.assert_array_equal(scores.top_logprobs, -np.sort(-logprobs_TV, axis=1)[:, :3])
    assert [part.dtype for part in scores] == [np.float64, np.int64, np.float64]
    assert [part.shape for part in scores] == [(n_tokens - 1,), (n_tokens - 1, 3), (n_tokens - 1, 3)]


def test_one_token_has_no_scores() -> None:
    assert [part.shape for part in model_of(SMALL).score([5], top=3)] == [(0,), (0, 3), (0, 3)]


def test_top_may_be_the_whole_vocabulary_and_no_more() -> None:
    model = model_of(SMALL)
    everything = model.score([5, 6], top=SMALL.vocab_size)
    assert sorted(everything.top_ids[0].tolist()) == list(range(SMALL.vocab_size))
    for top in (0, -1, SMALL.vocab_size + 1, 2.0, True):
        with refused(InputError, "top", repr(top)):
            model.score([5, 6], top=top)


@given(configs(), st.integers(1, 20), st.integers(0, 2**32 - 1))
@settings(max_examples=30)
def test_an_embedding_is_the_mean_of_the_last_norm(config: mistral_ref.ModelConfig, n_tokens: int, seed: int) -> None:
    tokens = tokens_for(config, n_tokens, seed)
    model = model_of(config, seed, dtype="float64")
    vector_D = model.embed(tokens)
    assert (vector_D.dtype, vector_D.shape) == (np.float32, (config.dim,))
    np.testing.assert_allclose(vector_D, model.trace(tokens, keep="norm")["norm"].mean(axis=0), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@each_backend
def test_an_embedding_of_more_than_a_chunk(backend: str) -> None:
    model, tokens = model_of(SMALL, backend=backend), tokens_for(SMALL, 700)
    expected = model_of(SMALL, dtype="float64").trace(tokens, keep="norm")["norm"].mean(axis=0)
    np.testing.assert_allclose(model.embed(tokens), expected, atol=1e-3 * np.abs(expected).max())


def test_a_text_and_its_ids_have_one_embedding() -> None:
    model = mistral_ref.load(backend="numpy")
    np.testing.assert_array_equal(model.embed("Once upon"), model.embed(model.token_ids("Once upon")))
    with refused(InputError, "at least one"):
        model.embed([])


# -------------------------------------------------------------------------------------------------------------- memory

MUCH = SMALL.replace(vocab_size=40_000, max_seq_len=None)


@pytest.mark.parametrize(
    ("use", "facts"),
    [
        (lambda model: model.forward([5] * 1000), ["1000 tokens", "266.71 MiB", "last_only", "score"]),
        (lambda model: model.score([5] * 1000), ["1000 tokens", "114.12 MiB"]),
        (lambda model: model.trace([5] * 1000, keep="logits"), ["1000 tokens", "354.50 MiB", "keep"]),
        (lambda model: model.trace([5] * 4000, keep="*.scores"), ["4000 tokens", "keep"]),
        (lambda model: model.steps([5] * 4000), ["scores", "4000 tokens"]),
        (
            lambda model: model.forward([5] * 3000, edits={"*.scores": np.zeros_like}, last_only=True),
            ["3000", "scores"],
        ),
    ],
    ids=["forward", "score", "trace", "trace of scores", "steps", "forward with edits"],
)
def test_what_memory_cannot_hold_is_refused_by_name(
    use: Callable[[Model], object], facts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(MUCH.replace(sliding_window=(None,) * MUCH.n_layers))
    monkeypatch.setattr("mistral_ref.host.available_memory", lambda: 10 * 2**20)
    with refused(InputError, "memory", "10.00 MiB", *facts):
        use(model)
    assert model.forward([5, 6], last_only=True).shape == (1, MUCH.vocab_size)


def test_a_cache_that_memory_cannot_hold_is_refused_before_anything_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = model_of(MUCH.replace(sliding_window=(None,) * MUCH.n_layers, head_dim=512))
    cache = model.new_cache()
    model.forward([5] * 60, cache, last_only=True)
    monkeypatch.setattr("mistral_ref.host.available_memory", lambda: 10 * 2**20)
    with refused(CacheError, 60, "10000 tokens", "452.96 MiB", "memory", "10.00 MiB", "int8"):
        model.forward([5] * 10_000, cache, last_only=True)
    with refused(CacheError, 60, "10060 tokens", "memory"):
        model.generate([5] * 10_000, cache=cache)
    assert cache.length == 60


# --------------------------------------------------------------------------------------------------- copies and pickles


def test_a_model_is_shared_and_not_copied() -> None:
    model = model_of(SMALL)
    for make in (pickle.dumps, copy.copy, copy.deepcopy):
        with refused(InputError, "Model", "threads", "new_cache", "load"):
            make(model)


def test_a_copy_of_a_cache_is_independent_and_a_pickle_is_a_file() -> None:
    model = model_of(SMALL)
    cache = model.new_cache()
    model.forward([5, 6, 7], cache)
    for make in (copy.copy, copy.deepcopy, lambda cache: cache.copy()):
        twin = make(cache)
        np.testing.assert_allclose(model.forward([8, 9], twin), model.forward([5, 6, 7, 8, 9])[3:], atol=1e-5)
        assert (cache.tokens, twin.tokens) == ([5, 6, 7], [5, 6, 7, 8, 9])
    with refused(CacheError, "KVCache", "save", "load_cache"):
        pickle.dumps(cache)


@each_backend
@pytest.mark.parametrize("make", [copy.deepcopy, lambda trace: pickle.loads(pickle.dumps(trace))])
def test_a_trace_can_be_copied_and_pickled(backend: str, make: Callable[[Trace], Trace]) -> None:
    trace = model_of(SMALL, backend=backend).trace([5, 6, 7])
    twin = make(trace)
    assert (list(twin), twin.tokens, twin.pieces, repr(twin)) == (list(trace), trace.tokens, trace.pieces, repr(trace))
    for name, value in trace.items():
        np.testing.assert_array_equal(twin[name], value)
        assert twin.steps[name].source == trace.steps[name].source


@pytest.mark.parametrize("make", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_a_tokenizer_can_be_copied_and_pickled(make: Callable[[Any], Any]) -> None:
    text = "The mill, 12 naïve ☂"
    tokenizer = SentencePieceTokenizer(tiny_tokenizer())
    twin, ids = make(tokenizer), tokenizer.encode(text)
    assert (twin.encode(text), twin.decode(ids), repr(twin)) == (ids, tokenizer.decode(ids), repr(tokenizer))
    bpe = ByteBPE([TEKKEN], {bytes([byte]): byte for byte in range(256)} | {b" mill": 256, b"mi": 257, b"ll": 258})
    bpe.encode(text)
    assert make(bpe).encode(text) == bpe.encode(text)
