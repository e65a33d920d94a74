"""Drafts and batches give what plain generation gives: every kind of model and of cache, every setting and end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import chain, product
from typing import Any

import numpy as np
import pytest
from support.adapters import adapted
from support.marks import slow, slow_but
from support.paths import GOLDEN
from support.tiny import MIXTURE, SMALL, model_of, tokens_for

import mistral_ref
from mistral_ref import Model, Token
from mistral_ref.files.quantization import Scheme, quantized_weights
from mistral_ref.generation import Generation
from mistral_ref.pace import PassTimes

PERIOD = 7
KERNELS: dict[str, Callable[[], Model]] = {
    "dense": lambda: model_of(SMALL, backend="numba", threads=2),
    "adapters": lambda: adapted(model_of(SMALL, backend="numba", threads=2)),
    "experts": lambda: model_of(MIXTURE, backend="numba", threads=2),
    "experts with adapters": lambda: adapted(model_of(MIXTURE, backend="numba", threads=2)),
    "8 bits": lambda: rounded(8),
    "4 bits": lambda: rounded(4),
}
# float64: a difference in the last bit could become one of a whole step where keys are rounded to int8.
ORACLES: dict[str, Callable[[], Model]] = {
    "numpy": lambda: adapted(model_of(MIXTURE, dtype="float64")),
    "GGUF": lambda: mistral_ref.load(GOLDEN / "gguf_types.gguf", dtype="float64"),
    "GGUF with experts": lambda: mistral_ref.load(GOLDEN / "gguf_mixtral.gguf", dtype="float64"),
}
CACHES = [None, "int8", *slow(["float16"])]
SETTINGS: dict[str, Any] = {"temperature": 0.8, "max_tokens": 24, "top_logprobs": 3, "stop": [PERIOD]}


def rounded(bits: int) -> Model:
    model = model_of(SMALL, backend="numba", threads=2)
    return Model(model.config, quantized_weights(model.weights, Scheme(bits), None), model.ops)


@pytest.fixture(autouse=True)
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes take the time that is expected, whatever else the machine does."""
    monkeypatch.setattr(PassTimes, "took", lambda self, n, seconds: setattr(self, "one", 1.0))


def in_circles(ids: list[int], logits_V: np.ndarray) -> np.ndarray:
    """Let most tokens be one more than the last one, so that the text repeats itself."""
    logits_V[(ids[-1] + 1) % PERIOD] += (len(ids) % 9 > 0) * 2 * np.ptp(logits_V)
    return logits_V


def same(found: Iterable[Token | None], expected: list[Token], *, exactly: bool = True) -> None:
    """Assert that the tokens are the same, to the bit or else up to rounding; a draft may have had them."""
    tokens = [replace(token, from_draft=False) for token in found if token is not None]
    if exactly:
        assert tokens == expected
        return
    assert [one.id for one in tokens] == [one.id for one in expected]
    for ours, plain in zip(tokens, expected, strict=True):
        assert (ours.finish_reason, ours.stop) == (plain.finish_reason, plain.stop)
        np.testing.assert_allclose(ours.logprob, plain.logprob, atol=1e-3)
        np.testing.assert_allclose(ours.top_logprobs, plain.top_logprobs, atol=1e-3)


def check(model: Model, cache_dtype: str | None, *, exactly: bool) -> None:
    """Compare drafts and batches with plain generation."""
    prompts = [[*tokens_for(model.config, n, n), 0] for n in (3, 20, 11)]
    settings = SETTINGS | {"logits_processor": in_circles}

    def texts(**drafts: Any) -> list[Generation]:
        return [
            model.generate(prompt, seed=n, cache=model.new_cache(dtype=cache_dtype), **settings, **drafts)
            for n, prompt in enumerate(prompts)
        ]

    expected = [list(text) for text in texts()]
    for drafts in ({"lookup": True}, {"draft": model}):
        found = texts(**drafts)
        for text, plain in zip(found, expected, strict=True):
            same(text, plain, exactly=exactly)
        assert sum(text.accepted for text in found) > 5 if "lookup" in drafts else found[0].drafted
    for lookup in (False, True):
        how = {"at_once": 2, "seed": 0, "cache_dtype": cache_dtype, "lookup": lookup}
        rows = list(model.generate_batch(prompts, **how, **settings))
        for column, plain in zip(zip(*rows, strict=True), expected, strict=True):
            same(column, plain, exactly=exactly)
        assert (sum(token is not None and token.from_draft for token in chain(*rows)) > 5) == lookup


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("make", KERNELS.values(), ids=KERNELS)
def test_kernels_give_the_same_bits_with_every_model_and_cache(make: Callable[[], Model], cache_dtype: str) -> None:
    check(make(), cache_dtype, exactly=True)


@pytest.mark.parametrize("cache_dtype", CACHES)
@pytest.mark.parametrize("make", slow_but(["numpy"], ORACLES))
def test_others_give_the_same_up_to_rounding(make: Callable[[], Model], cache_dtype: str) -> None:
    check(make(), cache_dtype, exactly=False)


@pytest.mark.parametrize("name", ["types", "mixtral"])
def test_kernels_for_packed_types_give_the_same_up_to_rounding(name: str) -> None:
    check(mistral_ref.load(GOLDEN / f"gguf_{name}.gguf", threads=2), None, exactly=False)


def test_a_stop_string_may_begin_and_end_anywhere_in_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_ref.pace.Pace.length", lambda self, times, most: min(4, most))
    model = mistral_ref.load()
    prompts = ["Once upon a time there was a little girl named Lily. Once upon a time", "Tom had a red ball. Tom had"]
    settings: dict[str, Any] = {"max_tokens": 10}
    plain = model.complete(prompts[0], **settings)
    in_drafts = 0
    for start, length in product(range(1, len(plain) - 6, 5), (2, 6)):
        stop = plain[start : start + length]
        caches = model.new_cache(), model.new_cache()
        found, expected = (
            list(model.generate(prompts[0], cache=cache, lookup=lookup, stop=stop, **settings))
            for cache, lookup in zip(caches, (True, False), strict=True)
        )
        same(found, expected)
        assert found[-1].stop == stop
        assert caches[0].tokens == caches[1].tokens
        in_drafts += found[-1].from_draft
        rows = model.generate_batch(prompts, stop=stop, lookup=True, **settings)
        same(next(zip(*rows, strict=True)), expected)
    assert in_drafts > 2
