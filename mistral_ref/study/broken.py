"""Broken models: each is wrong on purpose, and has one bug. Real engines have shipped bugs of these kinds.

Walk through a broken model and the right one side by side. The bug is at the first step whose value differs:

    wrong = broken(model, "tiled-heads")
    for right_step, wrong_step in zip(model.steps(tokens), wrong.steps(tokens)):
        ...

A bug is made by the smallest change that is possible: a wrong configuration, one overridden operation, or a ring with
one slot too few. No right model uses this file.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mistral_ref.cache import DEFAULT_CHUNK, KVCache
from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError, checked_choice
from mistral_ref.model import Model
from mistral_ref.reference_ops import ReferenceOps, softmax
from mistral_ref.ring import Ring
from mistral_ref.rope import Rotation

# ------------------------------------------------------------------------------------------- operations and a cache


class BrokenOps(ReferenceOps):
    """ReferenceOps with the dtype of the right model. Subclasses override operations; `name` says which bug it is."""

    def __init__(self, bug: str, right: Model) -> None:
        assert isinstance(right.ops, ReferenceOps)  # both backends are
        super().__init__(right.ops.dtype.name, threads=right.ops.threads, angles=right.ops.angles)
        self.name = f"numpy, broken: {bug}"
        self.config = right.config


class NotCausal(BrokenOps):
    """Query i also sees the keys that come after it in the pass."""

    def scores(self, q_BHK: np.ndarray, k_SGK: np.ndarray, visible_BS: np.ndarray) -> np.ndarray:
        """Return the scores; from the first visible key on, every key is visible."""
        return super().scores(q_BHK, k_SGK, np.logical_or.accumulate(visible_BS, axis=1))


class TiledHeads(BrokenOps):
    """Query head h reads key/value head h % G. For G = 2 and H = 4 they read 0 1 0 1; right is 0 0 1 1."""

    def scores(self, q_BHK: np.ndarray, k_SGK: np.ndarray, visible_BS: np.ndarray) -> np.ndarray:
        """Return the scores with keys of the wrong heads."""
        return super().scores(q_BHK, self._tiled(k_SGK), visible_BS)

    def gather(self, weights_HBS: np.ndarray, v_SGK: np.ndarray) -> np.ndarray:
        """Return the weighted sums of values of the wrong heads."""
        return super().gather(weights_HBS, self._tiled(v_SGK))

    def _tiled(self, x_SGK: np.ndarray) -> np.ndarray:
        return np.tile(x_SGK, (1, self.config.n_heads // self.config.n_kv_heads, 1))


class WrongScale(BrokenOps):
    """s = q' · k' / sqrt(D/H). This is right only if D = H * K. In Nemo D/H is 5120 / 32 = 160, but K is 128."""

    def scores(self, q_BHK: np.ndarray, k_SGK: np.ndarray, visible_BS: np.ndarray) -> np.ndarray:
        """Return the scores, divided by sqrt(D/H) instead of sqrt(K)."""
        config = self.config
        ratio = math.sqrt(config.n_heads * config.head_dim / config.dim)
        return super().scores(q_BHK, k_SGK, visible_BS) * self.dtype.type(ratio)


class PositionsRestart(BrokenOps):
    """RoPE and the query temperature take every pass to begin at position 0. The window has the right positions."""

    def rotation(self, positions_T: np.ndarray, config: ModelConfig) -> Rotation:
        """Return the rotation for positions that begin at 0."""
        return super().rotation(positions_T - positions_T[0], config)


class UnnormalisedExperts(BrokenOps):
    """e = softmax of r over all experts, but 0 for experts outside the top k. The shares add up to less than 1.

    Divided by their sum they would be right: that is the softmax over the top k (arXiv:2401.04088, section 2.1).
    """

    def route(self, router_logits_TE: np.ndarray, n_chosen: int) -> np.ndarray:
        """Return the experts' shares, which do not add up to 1."""
        is_chosen_TE = super().route(router_logits_TE, n_chosen) > 0
        return softmax(router_logits_TE) * is_chosen_TE


class ShortRingCache(KVCache):
    """Rings of W + chunk - 2 slots, one too few. In a full pass the newest key overwrites the oldest visible key."""

    def _new_ring(self, window: int | None) -> Ring:
        return dataclasses.replace(super()._new_ring(window and window - 1), window=window)


# ------------------------------------------------------------------------------------------------------------- bugs


def _other_windows(config: ModelConfig, by: int) -> ModelConfig:
    return config.replace(sliding_window=tuple(window and window + by for window in config.sliding_window))


def _other_row_order(config: ModelConfig) -> ModelConfig:
    return config.replace(rope_row_order="halves" if config.rope_row_order == "interleaved" else "interleaved")


def _other_yarn_scale(config: ModelConfig) -> ModelConfig:
    assert config.yarn is not None
    other = 0.1 * math.log(config.yarn.factor) + 1 if config.yarn.attention_factor == 1 else 1.0
    return config.replace(yarn=dataclasses.replace(config.yarn, attention_factor=other))


def _has_windows(config: ModelConfig, least: int) -> bool:
    return min((window for window in config.sliding_window if window is not None), default=0) >= least


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One mistake.

    sentence    what is wrong
    seen_in     issues and pull requests about engines that had this bug or a similar one; "" if none is known
    first_step  the short name of the first step that departs, such as "scores" for "layers.0.scores"
    needs       what a model must have so that it can have the bug and show it; "" if every model can
    shows       in which passes the bug can be seen; "" if it can be seen in every pass
    """

    sentence: str
    seen_in: str = ""
    first_step: str
    needs: str = ""
    shows: str = ""
    _fits: Callable[[ModelConfig], bool] = field(default=lambda config: True, repr=False)
    _config: Callable[[ModelConfig], ModelConfig] = field(default=lambda config: config, repr=False)
    _ops: type[BrokenOps] = field(default=BrokenOps, repr=False)
    _cache: type[KVCache] = field(default=KVCache, repr=False)


# In this order: which keys a query sees, which head it reads, how scores are divided, positions, slots, experts.
# fmt: off
BUGS: dict[str, Bug] = {
    "not-causal": Bug(
        sentence="A query also sees the tokens that come after it in the same pass.",
        seen_in="mistral-inference#88", first_step="scores", _ops=NotCausal),
    "no-window": Bug(
        sentence="A query sees all tokens before it, and not only the W keys of the sliding window.",
        seen_in="llama.cpp#3867, candle#1789", first_step="scores", shows="after more tokens than the window holds",
        needs="a sliding window", _fits=lambda config: _has_windows(config, least=1),
        _config=lambda config: config.replace(sliding_window=(None,) * config.n_layers)),
    "extra-key": Bug(
        sentence="A query sees W + 1 keys, itself included, and not W.",
        seen_in="transformers#39408, transformers#29623, mlx-lm#390", first_step="scores",
        shows="after more tokens than the window holds",
        needs="a sliding window", _fits=lambda config: _has_windows(config, least=1),
        _config=lambda config: _other_windows(config, by=1)),
    "one-key-less": Bug(
        sentence="A query sees W - 1 keys, itself included, and not W.", first_step="scores",
        shows="after as many tokens as the window holds",
        needs="sliding windows of at least 2 keys", _fits=lambda config: _has_windows(config, least=2),
        _config=lambda config: _other_windows(config, by=-1)),
    "tiled-heads": Bug(
        sentence="With H query heads and G key/value heads: head h reads key/value head h % G, and not h // (H/G).",
        first_step="scores",
        needs="1 < n_kv_heads < n_heads", _fits=lambda config: 1 < config.n_kv_heads < config.n_heads,
        _ops=TiledHeads),
    "wrong-scale": Bug(
        sentence="Scores are divided by sqrt(dim / n_heads), and not by sqrt(head_dim).",
        seen_in="lmdeploy#2761", first_step="scores",
        needs="a head_dim unlike dim / n_heads", _fits=lambda config: config.n_heads * config.head_dim != config.dim,
        _ops=WrongScale),
    "row-order": Bug(
        sentence="RoPE pairs the rows of wq and wk as in the other layout of the files: Mistral's or Hugging Face's.",
        seen_in="llama.cpp#2376, AiDotNet#2074", first_step="q",
        needs="a head_dim above 2", _fits=lambda config: config.head_dim > 2, _config=_other_row_order),
    "theta": Bug(
        sentence="RoPE uses another rope_theta: 1e6 if the model has 1e4, else 1e4.", first_step="q_rotated",
        needs="a head_dim above 2", _fits=lambda config: config.head_dim > 2,
        _config=lambda config: config.replace(rope_theta=1e6 if config.rope_theta == 1e4 else 1e4)),
    "yarn-scale": Bug(
        sentence="YaRN multiplies cosines and sines by 0.1 ln(factor) + 1 if the model has 1 here, else by 1.",
        seen_in="vllm#48621, sglang#22711, llama.cpp#17945, vllm#57563", first_step="q_rotated",
        needs="YaRN with a factor above 1", _fits=lambda config: config.yarn is not None and config.yarn.factor > 1,
        _config=_other_yarn_scale),
    "positions-restart": Bug(
        sentence="RoPE's positions begin at 0 again in every pass over a cache.", first_step="q_rotated",
        shows="in a pass over a cache that holds tokens (--last)",
        _ops=PositionsRestart),
    "short-ring": Bug(
        sentence="Rings lack one slot: the newest key of a full pass overwrites the oldest that its first query sees.",
        seen_in="transformers#47708, mlxcel#678", first_step="scores",
        shows="in a pass of `chunk` tokens over a cache, after more tokens than the window holds (--last)",
        needs="sliding windows of at least 2 keys", _fits=lambda config: _has_windows(config, least=2),
        _cache=ShortRingCache),
    "experts-unnormalised": Bug(
        sentence="Experts' shares are a softmax over all experts, and not only over the chosen ones.",
        first_step="expert_weights", needs="more experts than a token is sent to",
        _fits=lambda config: config.moe is not None and config.moe.num_experts_per_tok < config.moe.num_experts,
        _ops=UnnormalisedExperts),
}
# fmt: on


class BrokenModel(Model):
    """A model that computes something wrong on purpose. `broken` makes it; its repr and its `ops.name` show the bug."""

    def __init__(self, right: Model, name: str) -> None:
        bug = BUGS[name]
        config, ops = bug._config(right.config), bug._ops(name, right)
        super().__init__(config, right.weights, ops, tokenizer=right.tokenizer, eos_ids=tuple(right.eos_ids))
        self._cache = bug._cache

    def new_cache(
        self, *, max_tokens: int | None = None, chunk: int = DEFAULT_CHUNK, dtype: str | None = None
    ) -> KVCache:
        """Return an empty cache of the broken model."""
        return self._cache(self.config, self.ops, chunk=chunk, max_tokens=max_tokens, dtype=dtype)

    def load_cache(self, path: str | os.PathLike[str]) -> KVCache:
        """Return the cache in a file as a cache of the broken model."""
        return self._cache.load(path, self.config, self.ops)


def broken(model: Model, bug: str) -> Model:
    """Return a model with this bug, over the same weights and tokenizer; `bug` is a key of `BUGS`. NumPy computes it.

    The given model does not change. Raises InputError if there is no such bug, or if the model cannot have it.
    """
    checked_choice("bug", bug, BUGS)
    if isinstance(model, BrokenModel):
        raise InputError(f"{model!r} has a bug already; expected a model without a bug")
    if not BUGS[bug]._fits(model.config):
        raise InputError(f"this model cannot have the bug '{bug}': it needs {BUGS[bug].needs}")
    return BrokenModel(model, bug)
