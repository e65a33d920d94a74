"""Random tiny models in memory, strategies that draw their configurations and chunks, and how exact their steps are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from support.checkpoints import FAMILIES, Family, draw_weights

from mistral_ref.compare import compare_walks
from mistral_ref.config import MixtureOfExperts, ModelConfig, QueryTemperature, Yarn
from mistral_ref.files.build_weights import build_weights
from mistral_ref.files.checkpoint import Checkpoint
from mistral_ref.files.tensor_file import Tensor
from mistral_ref.model import Model
from mistral_ref.reference_ops import ReferenceOps

BACKENDS = ("numpy", "numba")

SMALL = FAMILIES["dense_windowed"].config
LARGE = SMALL.replace(dim=230, hidden_dim=390, vocab_size=331, head_dim=34)  # enough work for several threads
MIXTURE = FAMILIES["mixtral_windowed"].config


def ops_of(backend: str, dtype: str = "float32", threads: int = 1) -> ReferenceOps:
    """Return the operations of a backend.

    One thread unless asked: tiny products gain nothing by more, and on a busy machine threads wait for each other.
    """
    if backend == "numpy":
        return ReferenceOps(dtype)
    from mistral_ref.compiled_ops import CompiledOps  # noqa: PLC0415 (most tests go without Numba)

    return CompiledOps(threads=threads)


def model_of(
    config: ModelConfig, seed: int = 0, dtype: str = "float32", backend: str = "numpy", threads: int = 1
) -> Model:
    """Return a model with random float32 weights, drawn as the golden ones are: attention is peaked.

    threads     of "numba" alone
    """
    family = Family(name="random", model_type="mistral", seed=seed, n_tokens=0, config=config)
    tensors = {
        name: Tensor(Path("memory"), name, "F32", values.shape, np.ascontiguousarray(values).view(np.uint8).reshape(-1))
        for name, values in draw_weights(family).items()
    }
    checkpoint = Checkpoint(Path("memory"), (), tensors, "consolidated")
    return Model(config, build_weights(checkpoint, config), ops_of(backend, dtype, threads))


def tokens_for(config: ModelConfig, n_tokens: int, seed: int = 0) -> list[int]:
    """Return random token ids."""
    return np.random.RandomState(seed).randint(0, config.vocab_size, n_tokens).tolist()


@st.composite
def configs(draw: st.DrawFn, max_window: int = 9) -> ModelConfig:
    """Draw a configuration: any of the five switches, sizes that are multiples of nothing, H * K unlike D."""
    n_kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n_layers = draw(st.integers(1, 3))
    windows = st.none() | st.integers(1, max_window)
    yarn = Yarn(factor=4, original_max_position_embeddings=16, beta_fast=4, beta_slow=1, attention_factor=1.1)
    return ModelConfig(
        dim=draw(st.integers(3, 17)),
        n_layers=n_layers,
        n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        head_dim=2 * draw(st.integers(1, 5)),
        hidden_dim=draw(st.integers(1, 19)),
        vocab_size=draw(st.integers(2, 23)),
        norm_eps=1e-5,
        rope_theta=draw(st.sampled_from([1e4, 1e6])),
        sliding_window=tuple(draw(st.lists(windows, min_size=n_layers, max_size=n_layers))),
        rope_row_order=draw(st.sampled_from(["interleaved", "halves"])),
        yarn=draw(st.none() | st.just(yarn)),
        query_temperature=draw(
            st.none() | st.just(QueryTemperature(beta=0.3, original_max_position_embeddings=7)),
        ),
        moe=draw(st.none() | st.just(MixtureOfExperts(num_experts=4, num_experts_per_tok=2))),
        tied_embeddings=draw(st.booleans()),
    )


def chunkings(n_tokens: int, longest: int) -> st.SearchStrategy[list[int]]:
    """Draw the lengths of calls that together take `n_tokens`, each at most `longest`."""
    return st.lists(st.integers(1, longest), min_size=n_tokens, max_size=n_tokens).map(
        lambda lengths: _cut(lengths, n_tokens)
    )


def _cut(lengths: list[int], n_tokens: int) -> list[int]:
    ends = np.minimum(np.cumsum(lengths), n_tokens)
    return [int(n) for n in np.diff(ends, prepend=0) if n]


# How far a step of the float32 pass may lie from the oracle's, in float32 ulps of the step's largest value: what the
# step adds by itself (the oracle goes on from the float32 values before it), and what has come together since the
# embedding, which sharp attention magnifies layer by layer. About twice what was measured; docs/architecture.md has the
# figures.
# fmt: off
OWN_BOUND = {
    "embedding": 0.01, "attention_norm": 5, "q": 12, "k": 12, "v": 12, "q_rotated": 3, "k_rotated": 3, "scores": 10,
    "attention_weights": 6, "heads": 16, "attention_out": 15, "residual_after_attention": 0.51, "ffn_norm": 5,
    "router_logits": 10, "expert_weights": 5, "gate": 12, "up": 12, "ffn_hidden": 4, "ffn_out": 14,
    "residual_after_ffn": 0.51, "norm": 5, "logits": 10,
}
# fmt: on
ACCUMULATED_BOUND = 600


def distances_in_ulps(
    config: ModelConfig, n_tokens: int, seed: int, *, own: bool, backend: str = "numpy"
) -> dict[str, float]:
    """Return for each step the largest distance between float32 and float64, in ulps of the largest value.

    own     the oracle goes on from the float32 values
    """
    tokens = tokens_for(config, n_tokens, seed)
    plain = model_of(config, seed, backend=backend).steps(tokens)
    oracle = model_of(config, seed, "float64").steps(tokens)
    return {difference.name: difference.ulps for difference in compare_walks(plain, oracle, own=own)}
