"""Perplexity: against transformers, token by token; windows against brute force."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from support.checkpoints import FAMILIES, draw_weights, write_consolidated, write_hf
from support.errors import refused
from support.paths import GOLDEN
from support.tiny import BACKENDS, model_of, tokens_for
from support.tiny_tokenizers import PARAGRAPH, tiny_tokenizer

import mistral_ref
from mistral_ref import passes
from mistral_ref.errors import InputError
from mistral_ref.measure.perplexity import Perplexity, half_windows, joined, perplexities, perplexity, strided_windows
from mistral_ref.model import Model
from mistral_ref.sampling import log_softmax
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.transformer import Transformer

CONFIG = FAMILIES["dense_windowed"].config
TOKENIZER = SentencePieceTokenizer(tiny_tokenizer())
WITH_BOS = SimpleNamespace(bos_id=1, eos_id=2)  # all that the halves need of a tokenizer

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def with_bos(model: Model) -> Model:
    return Model(model.config, model.weights, model.ops, tokenizer=WITH_BOS)


# ------------------------------------------------------------------------------------------------------------ golden

TOLERANCE = 1e-4  # in nats, for one token; 2.5e-5 were found
N, S = 64, 24  # context and stride


@each_backend
@pytest.mark.parametrize("name", ["dense_windowed", "mixtral"])
def test_every_scored_token_is_that_of_transformers(name: str, backend: str, tmp_path: Path) -> None:
    golden = load_file(GOLDEN / f"perplexity_{name}.safetensors")
    write_hf(tmp_path, FAMILIES[name])
    model = with_bos(mistral_ref.load(tmp_path, backend=backend, threads=1))
    tokens = golden["tokens"]
    for way, stride in {"strided": S, "halves": None}.items():
        found = perplexity(model, tokens, context=N, stride=stride)
        windows = half_windows(len(tokens), N) if stride is None else strided_windows(len(tokens), N, stride)
        positions = [token for window in windows for token in range(window.scored, window.stop)]
        assert positions == golden[f"{way}_positions"].tolist()
        off = np.abs(found.nlls + golden[f"{way}_logprobs"])
        worst = int(off.argmax())
        assert off[worst] < TOLERANCE, f"{way}: token {positions[worst]} is off by {off[worst]:.1e} nats"
        assert [found.nll, found.nll_error] == pytest.approx(golden[f"{way}_mean"], abs=TOLERANCE / 10)


def test_the_recipe_weighs_windows_that_overlap_by_one_token_less(tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "perplexity_mixtral.safetensors")
    scored = [window.stop - window.scored for window in strided_windows(300, N, S)]
    means = [part.mean() for part in np.split(-golden["strided_logprobs"], np.cumsum(scored)[:-1])]
    weights = [scored[0], *(n - 1 for n in scored[1:])]
    assert golden["recipe_nll"] == pytest.approx(np.average(means, weights=weights), abs=1e-6)
    assert golden["recipe_nll"] != pytest.approx(golden["strided_mean"][0], abs=1e-3)


# ----------------------------------------------------------------------------------------------------------- windows


@given(st.integers(0, 70), st.integers(2, 20), st.data())
def test_strided_windows_are_those_of_brute_force(n_tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    windows = list(strided_windows(n_tokens, context, stride))
    scored_by = {token: window.start for window in windows for token in range(window.scored, window.stop)}
    # The earliest window that holds the token and one before it.
    expected = {
        token: min(starts)
        for token in range(n_tokens)
        if (starts := [start for start in range(0, n_tokens, stride) if start < token < start + context])
    }
    assert scored_by == expected
    assert len(scored_by) == sum(window.stop - window.scored for window in windows)
    assert all(window.stop - window.start <= context for window in windows)
    assert all(token - start >= min(token, context - stride) for token, start in scored_by.items())
    if stride < context:
        assert sorted(scored_by) == list(range(1, n_tokens))
    else:
        assert sorted(scored_by) == [token for token in range(n_tokens) if token % context]
    if windows:
        assert windows[-1].stop in (n_tokens, n_tokens - 1)


@given(st.integers(0, 70), st.integers(3, 20))
def test_halves_are_those_of_brute_force(n_tokens: int, context: int) -> None:
    windows = list(half_windows(n_tokens, context))
    scored = [token for window in windows for token in range(window.scored, window.stop)]
    whole = n_tokens // context * context
    assert scored == [token for token in range(whole) if token % context > context // 2]
    assert [(window.start, window.stop) for window in windows] == [(k, k + context) for k in range(0, whole, context)]


def test_stride_1_gives_every_token_all_the_context_there_is() -> None:
    assert [tuple(window) for window in strided_windows(7, 4, 1)] == [(0, 4, 1), (1, 5, 4), (2, 6, 5), (3, 7, 6)]


def test_a_text_shorter_than_a_window_is_one() -> None:
    assert [tuple(window) for window in strided_windows(3, 512, 256)] == [(0, 3, 1)]
    assert list(half_windows(511, 512)) == []


# ----------------------------------------------------------------------------------------------------------- scores


def naive(model: Model, tokens: list[int], context: int, stride: int | None) -> np.ndarray:
    """Return -log p of every scored token: a forward pass of its own for each token, by the definition."""
    nlls = []
    for token in range(1, len(tokens)):
        if stride is None:
            start = token // context * context
            if token % context <= context // 2 or start + context > len(tokens):
                continue
            before = [WITH_BOS.bos_id, *tokens[start + 1 : token]]
        else:
            start = max(0, -(-(token - context + 1) // stride) * stride)
            before = tokens[start:token]
        if before:
            nlls.append(-log_softmax(model.forward(before)[-1])[tokens[token]])
    return np.array(nlls)


@pytest.mark.parametrize(
    ("context", "stride"), [(3, None), (8, None), (9, None), (8, 1), (8, 3), (8, 7), (8, 8), (64, 20)]
)
@pytest.mark.parametrize("family", ["dense_windowed", "mixtral", "ministral3"])
def test_scores_are_those_of_a_pass_for_each_token(family: str, context: int, stride: int | None) -> None:
    model = with_bos(model_of(FAMILIES[family].config, dtype="float64"))
    tokens = tokens_for(model.config, 43)
    found = perplexity(model, tokens, context=context, stride=stride)
    assert found.nlls == pytest.approx(naive(model, tokens, context, stride), rel=1e-9)


@pytest.mark.parametrize("stride", [None, 7, 16])
def test_backends_agree(stride: int | None) -> None:
    tokens = tokens_for(CONFIG, 100)
    ours, theirs = (
        perplexity(model_of(CONFIG, backend=backend), tokens, context=16, stride=stride) for backend in BACKENDS
    )
    assert ours.n_scored == theirs.n_scored
    assert ours.nlls == pytest.approx(theirs.nlls, abs=TOLERANCE)


def test_figures_are_those_of_the_definitions() -> None:
    found = Perplexity(np.array([1.0, 2.0, 6.0]), n_evaluated=5)
    assert (found.n_scored, found.nll) == (3, 3.0)
    assert found.nll_error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    nll, nll2 = 9 / 3, 41 / 3  # as llama-perplexity
    assert found.nll_error == pytest.approx(math.sqrt((nll2 - nll * nll) / (3 - 1)))
    assert found.perplexity == pytest.approx(math.e**3)
    assert found.error == pytest.approx(math.e**3 * found.nll_error)
    assert found.bits_per_byte(18) == pytest.approx(9 / math.log(2) / 18)
    assert math.isnan(Perplexity(np.array([1.0]), 1).error)
    assert Perplexity(np.array([1e4]), 1).perplexity == math.inf


def test_a_model_that_knows_nothing_is_at_the_size_of_its_vocabulary(tmp_path: Path) -> None:
    family = FAMILIES["dense_windowed"]
    weights = draw_weights(family)
    write_consolidated(tmp_path, family, weights | {"output.weight": np.zeros_like(weights["output.weight"])})
    model = mistral_ref.load(tmp_path, backend="numpy")
    found = perplexity(model, tokens_for(CONFIG, 50), context=16, stride=8)
    assert found.perplexity == pytest.approx(CONFIG.vocab_size)
    assert found.error == pytest.approx(0, abs=1e-9)


class Spy:
    """A model that notes what goes through it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Model) -> None:
        self.parts: list[list[int]] = []
        self.n_tokens = 0
        scores, steps = passes.scores, Transformer.forward_steps

        def noted(texts: Iterable[list[int]]) -> Iterator[list[int]]:
            for text in texts:
                self.parts.append(list(text))
                yield text

        def spied_scores(transformer: Transformer, texts: Iterable[list[int]], *rest: Any, **options: Any) -> Any:
            return scores(transformer, noted(texts), *rest, **options)

        def spied_steps(transformer: Transformer, ids: np.ndarray, *rest: object, **options: object) -> object:
            self.n_tokens += len(ids)
            return steps(transformer, ids, *rest, **options)

        monkeypatch.setattr(passes, "scores", spied_scores)
        monkeypatch.setattr(Transformer, "forward_steps", spied_steps)


@pytest.mark.parametrize(
    ("stride", "starts"), [(None, [0, 16, 32]), (5, [*range(0, 46, 5)]), (16, [0, 16, 32, 48])], ids=str
)
def test_what_goes_through_the_model(stride: int | None, starts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_bos(model_of(CONFIG))
    spy, calls = Spy(monkeypatch, model), []
    tokens = tokens_for(CONFIG, 60)
    found = perplexity(
        model, tokens, context=16, stride=stride, progress=lambda done, total: calls.append((done, total))
    )
    assert found.n_evaluated == spy.n_tokens
    assert calls == [*((start, 60) for start in starts), (60, 60)]
    assert tokens == tokens_for(CONFIG, 60)
    first = {start: 1 if stride is None else tokens[start] for start in starts}
    assert spy.parts == [[first[start], *tokens[start + 1 : start + 16]] for start in starts]


def test_without_a_tokenizer_no_token_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(CONFIG)
    spy = Spy(monkeypatch, model)
    perplexity(model, tokens_for(CONFIG, 60), context=16)
    assert [token for part in spy.parts for token in part] == tokens_for(CONFIG, 60)[:48]


@pytest.mark.slow
@pytest.mark.parametrize("stride", [None, 16])
def test_memory_does_not_grow_with_the_text(stride: int | None) -> None:
    """Logits of the whole text would take 4 * 4,000 * 1,500 bytes, 24 MB."""
    model = model_of(CONFIG.replace(vocab_size=4000))
    peaks = []
    for n_tokens in (300, 1500):
        tokens = tokens_for(model.config, n_tokens)
        tracemalloc.start()
        perplexity(model, tokens, context=32, stride=stride)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 6e6
    assert peaks[1] - peaks[0] < 1200 * 100


def test_a_text_is_its_ids_with_bos_and_may_be_longer_than_the_model_is_meant_for() -> None:
    config = CONFIG.replace(vocab_size=TOKENIZER.vocab_size, max_seq_len=32)
    plain = model_of(config)
    model = Model(config, plain.weights, plain.ops, tokenizer=TOKENIZER)
    ids = TOKENIZER.encode(PARAGRAPH)
    assert ids[0] == TOKENIZER.bos_id
    assert len(ids) > 9 * 32
    for stride in (None, 16):
        ours, theirs = (perplexity(model, text, context=32, stride=stride) for text in (PARAGRAPH, np.array(ids)))
        assert ours.nlls.tolist() == theirs.nlls.tolist()


@pytest.mark.parametrize(
    ("tokens", "options", "facts"),
    [
        ([1] * 50, {"context": 2}, ("context", 2, "whole number", "3 to 40")),
        ([1] * 50, {"context": 41}, ("context", 41, "whole number", "3 to 40")),
        ([1] * 50, {"context": 16, "stride": 17}, ("stride", 17, "whole number", "1 to 16")),
        ([1] * 50, {"context": 16, "stride": 0}, ("stride", 0, "1 to 16")),
        ([3] * 15, {"context": 16}, ("text", "15 tokens", 16, "context", "stride")),
        ([3], {"context": 16, "stride": 8}, ("text", "1 token", 2)),
        ([], {"context": 16, "stride": 8}, ("tokens", "[]", "at least one")),
        ([3] * 40 + [101], {"context": 16}, ("token id", 101, "0 to 100")),
        ([[3] * 20] * 20, {"context": 16}, ("tokens", "text", "flat")),
        ("text", {"context": 16}, ("model", "no tokenizer")),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(
    tokens: object, options: dict[str, int], facts: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(CONFIG.replace(max_seq_len=40))
    spy = Spy(monkeypatch, model)
    with refused(InputError, *facts):
        perplexity(model, tokens, **options)
    assert spy.n_tokens == 0


# ------------------------------------------------------------------------------------------------------ command line


def test_progress_over_several_texts_counts_the_tokens_of_all() -> None:
    model = mistral_ref.load(backend="numpy")
    texts = {"a": list(range(5, 35)), "b": list(range(5, 25))}
    seen: list[tuple[int, int]] = []
    found = perplexities(model, texts, context=10, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == [0, 10, 20, 30, 40, 50]
    assert {total for _, total in seen} == {50}
    for name, ids in texts.items():
        np.testing.assert_array_equal(found[name].nlls, perplexity(model, ids, context=10).nlls)
    both = joined(found.values())
    np.testing.assert_array_equal(both.nlls, np.concatenate([found["a"].nlls, found["b"].nlls]))
    assert both.n_evaluated == found["a"].n_evaluated + found["b"].n_evaluated
