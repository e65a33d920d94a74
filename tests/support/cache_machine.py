"""A machine that does anything to caches, in any order, and what its logits are held against."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule
from support.tiny import model_of

from mistral_ref.cache import KVCache
from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError, InputError, MistralRefWarning
from mistral_ref.model import Model

# Float64 rounding through three layers of peaked attention. A window that is off by one changes logits by about 1.
CLOSE = {"rtol": 0, "atol": 1e-9}


def config_with(window: int | None, n_layers: int = 2) -> ModelConfig:
    return ModelConfig(
        dim=10,
        n_layers=n_layers,
        n_heads=4,
        n_kv_heads=2,
        head_dim=6,
        hidden_dim=14,
        vocab_size=13,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=(window,) * n_layers,
        rope_row_order="interleaved",
    )


def whole(model: Model, tokens: list[int]) -> np.ndarray:
    """Return the logits of one uncached pass: a cache with room for all, in which nothing ever shares a slot."""
    return model.forward(tokens, model.new_cache(chunk=len(tokens)))


class CacheMachine(RuleBasedStateMachine):
    """Anything that one can do to caches, in any order; `forward` is compared with a pass over the whole sequence.

    settings for a run, see `run_cache_machine`: the folder for saved caches, the options of the model, the tolerance
    """

    caches = Bundle("caches")
    folder: Path
    model_options: Mapping[str, str]
    close: Mapping[str, float]

    def __init__(self) -> None:
        super().__init__()
        self.model = model_of(config_with(window=3), **self.model_options)
        self.tokens: dict[int, list[int]] = {}
        self.keep: list[KVCache] = []

    def known(self, cache: KVCache, tokens: list[int]) -> KVCache:
        self.tokens[id(cache)] = tokens
        self.keep.append(cache)  # so that no other cache gets its id
        return cache

    @rule(target=caches, chunk=st.integers(1, 6), bound=st.none() | st.just(50))
    def new(self, chunk: int, bound: int | None) -> KVCache:
        return self.known(self.model.new_cache(chunk=chunk, max_tokens=bound), [])

    @rule(cache=caches, tokens=st.lists(st.integers(0, 12), min_size=1, max_size=14))
    def forward(self, cache: KVCache, tokens: list[int]) -> None:
        before = self.tokens[id(cache)]
        if cache.max_tokens is not None and len(before) + len(tokens) > cache.max_tokens:
            return
        logits = self.model.forward(tokens, cache)
        before += tokens
        np.testing.assert_allclose(logits, whole(self.model, before)[-len(tokens) :], **self.close)

    @rule(cache=caches, n_steps=st.integers(1, 60), tokens=st.lists(st.integers(0, 12), min_size=1, max_size=6))
    def abandon_a_walk(self, cache: KVCache, n_steps: int, tokens: list[int]) -> None:
        if len(tokens) > cache.chunk or (cache.max_tokens and cache.length + len(tokens) > cache.max_tokens):
            return
        walk = self.model.steps(tokens, cache)
        names = [step.name for step, _ in zip(walk, range(n_steps), strict=False)]
        if names[-1] == "logits" and n_steps >= len(names):
            self.tokens[id(cache)] += tokens  # it was not abandoned after all

    @rule(cache=caches, length=st.integers(0, 60))
    def truncate(self, cache: KVCache, length: int) -> None:
        tokens = self.tokens[id(cache)]
        if length > len(tokens):
            with pytest.raises(InputError):
                cache.truncate(length)
            return
        try:
            cache.truncate(length)
        except CacheError:
            assert length > 0
            return
        del tokens[length:]

    @rule(cache=caches, tokens=st.lists(st.integers(0, 12), max_size=60), n_shared=st.integers(0, 60))
    def keep_shared(self, cache: KVCache, tokens: list[int], n_shared: int) -> None:
        before = self.tokens[id(cache)]
        wanted = [*before[:n_shared], *tokens]
        shared = next(
            (n for n, (a, b) in enumerate(zip(before, wanted, strict=False)) if a != b), min(len(before), len(wanted))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MistralRefWarning)  # that a ring has overwritten what is shared
            kept = cache.keep_shared(wanted)
        assert kept in (0, shared) or cache._kept
        before[:] = wanted[:kept]

    @rule(cache=caches)
    def keep(self, cache: KVCache) -> None:
        cache.keep()

    @rule(target=caches, cache=caches)
    def copy(self, cache: KVCache) -> KVCache:
        return self.known(cache.copy(), list(self.tokens[id(cache)]))

    @rule(target=caches, cache=caches)
    def save_and_load(self, cache: KVCache) -> KVCache:
        path = self.folder / "cache.safetensors"
        cache.save(path)
        return self.known(self.model.load_cache(path), list(self.tokens[id(cache)]))

    @invariant()
    @precondition(lambda self: self.keep)
    def tokens_agree(self) -> None:
        assert all(cache.tokens == self.tokens[id(cache)] for cache in self.keep)
        assert all(cache.length == len(cache.tokens) for cache in self.keep)


def run_cache_machine(
    folder: Path, model_options: Mapping[str, str], close: Mapping[str, float], max_examples: int
) -> None:
    """Run the machine over a model with these options of `model_of`; logits are held to the tolerance `close`."""
    settled = {"folder": folder, "model_options": model_options, "close": close}
    machine = type("CacheMachine", (CacheMachine,), settled).TestCase
    machine.settings = settings(max_examples=max_examples, stateful_step_count=25)
    machine().runTest()
