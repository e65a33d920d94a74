"""BUGS: what can be wrong with a model, how it is made, and which engines have had it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mistral_ref.cache import KVCache
from mistral_ref.config import ModelConfig
from mistral_ref.model import Model
from mistral_ref.rope import yarn_ramp
from mistral_ref.study.broken import caches, operations
from mistral_ref.weights import Matrix, Weights, matrices, with_matrices

# Parts of a model that a bug needs.


def _has_windows(model: Model, least: int = 1) -> bool:
    return min((window for window in model.config.sliding_window if window is not None), default=0) >= least


def _has_mixed_layers(model: Model) -> bool:
    return _has_windows(model) and None in model.config.sliding_window


def _has_pairs(model: Model) -> bool:
    return model.config.head_dim > 2


def _has_key_heads_to_mix(model: Model) -> bool:
    config = model.config
    return config.n_kv_heads < config.n_heads and config.n_kv_heads * config.head_dim % (2 * config.n_heads) == 0


def _has_yarn(model: Model) -> bool:
    return model.config.yarn is not None and model.config.yarn.factor > 1


def _has_temperature(model: Model) -> bool:
    return model.config.query_temperature is not None


def _has_choice_of_experts(model: Model) -> bool:
    moe = model.config.moe
    return moe is not None and moe.num_experts_per_tok < moe.num_experts


# What a bug changes.


def _other_windows(config: ModelConfig, by: int) -> ModelConfig:
    windows = (window and max(window + by, 1) for window in config.sliding_window)
    return config.replace(sliding_window=tuple(windows))


def _window_everywhere(config: ModelConfig) -> ModelConfig:
    narrowest = min((window for window in config.sliding_window if window is not None), default=None)
    return config.replace(sliding_window=(narrowest,) * config.n_layers)


def _other_row_order(config: ModelConfig) -> ModelConfig:
    return config.replace(rope_row_order="halves" if config.rope_row_order == "interleaved" else "interleaved")


def _other_yarn_scale(config: ModelConfig) -> ModelConfig:
    if config.yarn is None:  # another bug has dropped it
        return config
    other = 0.1 * math.log(config.yarn.factor) + 1 if config.yarn.attention_factor == 1 else 1.0
    return config.replace(yarn=dataclasses.replace(config.yarn, attention_factor=other))


def _usual_ramp(config: ModelConfig) -> ModelConfig:
    """Return a configuration whose YaRN has the usual betas, or itself if its ramp is that of these."""
    if config.yarn is None or config.yarn.factor == 1:
        return config
    usual = dataclasses.replace(config.yarn, beta_fast=32, beta_slow=1)
    ramps = (yarn_ramp(config.rope_theta, config.head_dim, yarn) for yarn in (config.yarn, usual))
    return config if len(set(ramps)) == 1 else config.replace(yarn=usual)


def _without_scales(weights: Weights) -> Weights:
    def unscaled(matrix: Matrix) -> Matrix:
        return dataclasses.replace(matrix, scale=np.ones((1, 1), np.float32)) if matrix.kind == "fp8" else matrix

    return with_matrices(weights, unscaled)


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One mistake.

    sentence    what is wrong
    cure        what to do about it
    seen_in     issues and pull requests about engines that had this bug or a similar one; "" if none is known
    first_step  the short name of the first step that departs, such as "scores" for "layers.0.scores"
    needs       what a model must have so that it can have the bug and show it; "" if every model can
    shows       in which passes the bug can be seen; "" if it can be seen in every pass
    """

    sentence: str
    cure: str
    seen_in: str = ""
    first_step: str
    needs: str = ""
    shows: str = ""
    _fits: Callable[[Model], bool] = field(default=lambda model: True, repr=False)
    _config: Callable[[ModelConfig], ModelConfig] = field(default=lambda config: config, repr=False)
    _weights: Callable[[Weights], Weights] = field(default=lambda weights: weights, repr=False)
    _ops: type[operations.BrokenOps] = field(default=operations.BrokenOps, repr=False)
    _cache: type[KVCache] = field(default=KVCache, repr=False)
    _twice_bos: bool = field(default=False, repr=False)


def possible_bugs(model: Model) -> list[str]:
    """Return the names of the bugs that a model can have."""
    return [name for name, bug in BUGS.items() if bug._fits(model)]


_PAST_WINDOW = "after more tokens than the window holds"
_OVER_CACHE = "in a pass over a cache that holds tokens (--last)"

# In this order: which keys a query sees, which head it reads, how scores are divided, the order of rows, angles and
# temperature, slots, experts, norms, output, tokens, weights.
# fmt: off
BUGS: dict[str, Bug] = {
    "not-causal": Bug(
        sentence="A query also sees the tokens that come after it in the same pass.",
        cure="Mask every key whose position is above the query's, also in a pass without a cache.",
        seen_in="mistral-inference#88", first_step="scores", _ops=operations.NotCausal),
    "no-window": Bug(
        sentence="A query sees all tokens before it, and not only the W keys of the sliding window.",
        cure="Mask keys at a distance of W or more.",
        seen_in="llama.cpp#3867, candle#1789", first_step="scores", shows=_PAST_WINDOW,
        needs="a sliding window", _fits=_has_windows,
        _config=lambda config: config.replace(sliding_window=(None,) * config.n_layers)),
    "extra-key": Bug(
        sentence="A query sees W + 1 keys, itself included, and not W.",
        cure="A query sees the keys with 0 <= query - key < W. Functions of flash attention take W - 1 to the left.",
        seen_in="transformers#39408, transformers#29623, mlx-lm#390", first_step="scores", shows=_PAST_WINDOW,
        needs="a sliding window", _fits=_has_windows,
        _config=lambda config: _other_windows(config, by=1)),
    "one-key-less": Bug(
        sentence="A query sees W - 1 keys, itself included, and not W.",
        cure="A query sees the keys with 0 <= query - key < W: the token itself is one of the W.",
        first_step="scores", shows="after as many tokens as the window holds",
        needs="sliding windows of at least 2 keys", _fits=lambda model: _has_windows(model, least=2),
        _config=lambda config: _other_windows(config, by=-1)),
    "window-everywhere": Bug(
        sentence="All layers have the sliding window, and not only those of the pattern.",
        cure="Read the pattern: sliding_window as a list in params.json, layer_types in config.json.",
        seen_in="vllm#9414, vllm#21927", first_step="scores", shows=_PAST_WINDOW,
        needs="layers with and without a window", _fits=_has_mixed_layers, _config=_window_everywhere),
    "prompt-extra-key": Bug(
        sentence="A query of the first pass sees W + 1 keys, and a query of later passes W.",
        cure="Use one rule, 0 <= query - key < W, for the mask of a prompt and for the ring.",
        seen_in="mlx-lm#390", first_step="scores", shows=_PAST_WINDOW,
        needs="a sliding window", _fits=_has_windows, _cache=caches.PromptSeesMoreCache),
    "cache-key-less": Bug(
        sentence="A query of the first pass sees W keys, and a query of later passes W - 1.",
        cure="Write the new key first and then read: with the token's own key the ring shows W keys.",
        seen_in="transformers#47708", first_step="scores", shows=_OVER_CACHE,
        needs="sliding windows of at least 2 keys", _fits=lambda model: _has_windows(model, least=2),
        _cache=caches.CacheSeesLessCache),
    "tiled-heads": Bug(
        sentence="With H query heads and G key/value heads: head h reads key/value head h % G, and not h // (H/G).",
        cure="Repeat each key/value head H/G times before the next one (repeat_interleave, not tile).",
        seen_in="onnx#7274, jax-js#180", first_step="scores",
        needs="1 < n_kv_heads < n_heads", _fits=lambda model: 1 < model.config.n_kv_heads < model.config.n_heads,
        _ops=operations.TiledHeads),
    "wrong-scale": Bug(
        sentence="Scores are divided by sqrt(dim / n_heads), and not by sqrt(head_dim).",
        cure="Read head_dim from the configuration: it need not be dim / n_heads.",
        seen_in="lmdeploy#2761, mistral.rs#643", first_step="scores", needs="a head_dim unlike dim / n_heads",
        _fits=lambda model: model.config.n_heads * model.config.head_dim != model.config.dim,
        _ops=operations.WrongScale),
    "row-order": Bug(
        sentence="RoPE pairs the rows of wq and wk as in the other layout of the files: Mistral's or Hugging Face's.",
        cure="Mistral's files pair rows 2j and 2j + 1 of a head, Hugging Face's j and j + K/2: turn those of the file.",
        seen_in="llama3-from-scratch#20, AiDotNet#2074", first_step="q",
        needs="a head_dim above 2", _fits=_has_pairs, _config=_other_row_order),
    "permuted-twice": Bug(
        sentence="The rows of wq and wk were brought from Mistral's order to Hugging Face's twice.",
        cure="Hugging Face's files are in halves already: convert Mistral's files only.",
        first_step="q", needs="a head_dim above 2", _fits=_has_pairs, _ops=operations.PermutedTwice),
    "keys-permuted-as-queries": Bug(
        sentence="The rows of wk were brought to the other order as if wk had as many heads as wq.",
        cure="Reorder wq by n_heads heads, and wk by n_kv_heads.",
        seen_in="llama.cpp#3364, transformers#31788, llama.cpp#2376", first_step="k",
        needs="n_kv_heads < n_heads, and keys that n_heads cuts into whole pairs", _fits=_has_key_heads_to_mix,
        _ops=operations.KeysPermutedAsQueries),
    "theta": Bug(
        sentence="RoPE uses another rope_theta: 1e6 if the model has 1e4, else 1e4.",
        cure="Read rope_theta; what its absence means depends on the file.",
        seen_in="litgpt#2217, mlx-examples#112, ipex-llm#11747", first_step="q_rotated",
        needs="a head_dim above 2", _fits=_has_pairs,
        _config=lambda config: config.replace(rope_theta=1e6 if config.rope_theta == 1e4 else 1e4)),
    "yarn-dropped": Bug(
        sentence="RoPE's frequencies are those without YaRN.",
        cure="Read yarn in params.json; rope_parameters, or in older files rope_scaling, in config.json.",
        seen_in="mlx-vlm#1710, omlx#3347", first_step="q_rotated", shows="after the first token",
        needs="YaRN with a factor above 1", _fits=_has_yarn,
        _config=lambda config: config.replace(yarn=None)),
    "yarn-ramp": Bug(
        sentence="YaRN's ramp is that of beta_fast 32 and beta_slow 1, though the model has others.",
        cure="Read beta and alpha of yarn in params.json, beta_fast and beta_slow in config.json.",
        first_step="q_rotated", shows="after the first token",
        needs="a ramp of YaRN unlike that of 32 and 1", _fits=lambda model: _usual_ramp(model.config) != model.config,
        _config=_usual_ramp),
    "yarn-scale": Bug(
        sentence="YaRN multiplies cosines and sines by 0.1 ln(factor) + 1 if the model has 1 here, else by 1.",
        cure="The scale is m(mscale) / m(mscale_all_dim), m(k) = 0.1 k ln(factor) + 1; with factor alone it is m(1). "
             "apply_scale: false in params.json means 1.",
        seen_in="vllm#48621, sglang#22711, llama.cpp#17945, vllm#57563", first_step="q_rotated",
        needs="YaRN with a factor above 1", _fits=_has_yarn, _config=_other_yarn_scale),
    "no-temperature": Bug(
        sentence="Queries are not multiplied by the query temperature.",
        cure="Multiply each turned query by 1 + beta ln(1 + floor(p / L0)). Both spellings count: llama_4_scaling in "
             "params.json, llama_4_scaling_beta in config.json.",
        seen_in="vllm#48621, ollama#13292", first_step="q_rotated", shows="from position L0 on",
        needs="a query temperature", _fits=_has_temperature,
        _config=lambda config: config.replace(query_temperature=None)),
    "temperature-on-keys": Bug(
        sentence="Keys are multiplied by the temperature of their positions, and queries are not.",
        cure="The temperature belongs to the query: every key is seen by queries of many positions.",
        first_step="q_rotated", shows="from position L0 on",
        needs="a query temperature", _fits=_has_temperature, _ops=operations.TemperatureOnKeys),
    "temperature-early": Bug(
        sentence="The query temperature rises one token too early, as in Llama 4: floor((p + 1) / L0).",
        cure="Ministral 3 has floor(p / L0), with positions from 0.",
        first_step="q_rotated", shows="at the last position before each multiple of L0",
        needs="a query temperature", _fits=_has_temperature, _ops=operations.EarlyTemperature),
    "positions-restart": Bug(
        sentence="RoPE's positions begin at 0 again in every pass over a cache.",
        cure="Positions go on from the number of tokens in the cache.",
        seen_in="transformers#43082", first_step="q_rotated", shows=_OVER_CACHE, _ops=operations.PositionsRestart),
    "short-ring": Bug(
        sentence="Rings lack one slot: the newest key of a full pass overwrites the oldest that its first query sees.",
        cure="A ring that is written before it is read needs W + n - 1 slots for passes of n tokens.",
        seen_in="transformers#47708, mlxcel#678", first_step="scores",
        shows="in a pass of `chunk` tokens over a cache, after more tokens than the window holds (--last)",
        needs="sliding windows of at least 2 keys", _fits=lambda model: _has_windows(model, least=2),
        _cache=caches.ShortRingCache),
    "small-ring": Bug(
        sentence="Rings have W slots: a pass of several tokens overwrites keys that its own first queries still see.",
        cure="A ring that is written before it is read needs W + n - 1 slots for passes of n tokens.",
        seen_in="litgpt#2182", first_step="scores", shows=_PAST_WINDOW,
        needs="a sliding window", _fits=_has_windows, _cache=caches.SmallRingCache),
    "slot-order": Bug(
        sentence="Keys of a ring that has wrapped are read in the order of their slots, and masked as if in their own.",
        cure="Bring the slots into the order of positions, or mask by the position that each slot holds.",
        seen_in="litgpt#2182, mlx-vlm#1715", first_step="scores",
        shows="in a pass of several tokens over a cache whose rings have wrapped (--last)",
        needs="a sliding window", _fits=_has_windows, _cache=caches.SlotOrderCache),
    "experts-unnormalised": Bug(
        sentence="Experts' shares are a softmax over all experts, and not only over the chosen ones.",
        cure="Divide the chosen shares by their sum, or take the softmax after the top k: the two are equal.",
        seen_in="TensorRT-LLM#2752, litgpt#2013", first_step="expert_weights",
        needs="more experts than a token is sent to", _fits=_has_choice_of_experts,
        _ops=operations.UnnormalisedExperts),
    "experts-raw": Bug(
        sentence="The router's logits of the top k experts are their shares, without a softmax.",
        cure="Take the softmax over the logits of the chosen experts.",
        seen_in="sglang#35160", first_step="expert_weights",
        needs="more experts than a token is sent to", _fits=_has_choice_of_experts, _ops=operations.RawExperts),
    "eps-default": Bug(
        sentence="RMSNorm uses another norm_eps: 1e-6 if the model has 1e-5, else 1e-5.",
        cure="Read norm_eps (rms_norm_eps in config.json).",
        seen_in="ipex-llm#9529, tvm#15856, llama#771", first_step="attention_norm",
        _config=lambda config: config.replace(norm_eps=1e-6 if config.norm_eps == 1e-5 else 1e-5)),
    "eps-outside": Bug(
        sentence="RMSNorm adds norm_eps to the root of the mean square, and not to the mean square.",
        cure="y = x / sqrt(mean(x²) + eps) * weight.",
        seen_in="gpt-neox#1342, tilelang#1243", first_step="attention_norm", _ops=operations.EpsOutside),
    "norm-cast": Bug(
        sentence="RMSNorm rounds to bf16 before it multiplies by its weight, in a pass of wider numbers.",
        cure="Cast back to the dtype of the pass, and to no narrower one. A pass in bf16 casts before the weight.",
        seen_in="TransformerEngine#1132, vllm-xpu-kernels#536", first_step="attention_norm",
        _ops=operations.CastInNorm),
    "tied-head": Bug(
        sentence="The embedding matrix makes the logits, though the model has an output matrix of its own.",
        cure="Use an output matrix that is in the files, whatever a configuration says; tie if text_config says so.",
        seen_in="vllm#51063, transformers#42313", first_step="logits", needs="an output matrix of its own",
        _fits=lambda model: model.weights.output is not model.weights.tok_embeddings,
        _weights=lambda weights: dataclasses.replace(weights, output=weights.tok_embeddings)),
    "bos-twice": Bug(
        sentence="BOS is put in front of a text that begins with it.",
        cure="Put BOS in front in one place: in the template or in the tokenizer.",
        seen_in="drama_llama#93, llama.cpp#7107, litgpt#1565", first_step="embedding",
        shows="in a text that begins with BOS", _twice_bos=True),
    "fp8-unscaled": Bug(
        sentence="Weights in fp8 are used without their scales.",
        cure="Multiply the weights by qscale_weight, or by weight_scale_inv: its name notwithstanding, it multiplies.",
        seen_in="Megatron-Bridge#2895, mlx-vlm#727, TensorRT-Model-Connect#1115, unsloth#6200", first_step="q",
        needs="weights in fp8", _fits=lambda model: any(matrix.kind == "fp8" for matrix in matrices(model.weights)),
        _weights=_without_scales),
}
# fmt: on
