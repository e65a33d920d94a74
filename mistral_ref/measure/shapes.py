"""The shapes of published models, by name. They are for measuring and trying out, with all layers or with a few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral_ref.config import MixtureOfExperts, ModelConfig, QueryTemperature, Yarn
from mistral_ref.errors import checked_choice, checked_int


def _shape(
    dim: int, n_layers: int, heads: tuple[int, int], head_dim: int, hidden_dim: int, vocab_size: int, theta: float,
    *, windows: tuple[int | None, ...] = (None,), longest: int | None = None, **switches: Any,
) -> ModelConfig:  # fmt: skip
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=heads[0],
        n_kv_heads=heads[1],
        head_dim=head_dim,
        hidden_dim=hidden_dim,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope_theta=theta,
        sliding_window=windows * (n_layers // len(windows)),
        rope_row_order="interleaved",
        max_seq_len=longest,
        **switches,
    )


_YARN = Yarn(factor=16, original_max_position_embeddings=16384, beta_fast=32, beta_slow=1, attention_factor=1)
_MINISTRAL_3: dict[str, Any] = {
    "longest": 262144,
    "yarn": _YARN,
    "query_temperature": QueryTemperature(beta=0.1, original_max_position_embeddings=16384),
}
_EIGHT_EXPERTS = MixtureOfExperts(num_experts=8, num_experts_per_tok=2)

# fmt: off
# From the published params.json and config.json. "tiny" is made up: each of its sizes differs from its other sizes.
SHAPES: Mapping[str, ModelConfig] = {
    #                        dim layers   heads  head hidden   vocab theta
    "tiny":           _shape(64,      2, (4, 2),  32,   160,    320, 1e4, windows=(24,)),
    "stories-110m":   _shape(768,    12, (12, 12), 64,  2048,  32000, 1e4, tied_embeddings=True),
    "ministral-3-3b": _shape(3072,   26, (32, 8), 128,  9216, 131072, 1e6, tied_embeddings=True, **_MINISTRAL_3),
    "ministral-3-8b": _shape(4096,   34, (32, 8), 128, 14336, 131072, 1e6, **_MINISTRAL_3),
    "mistral-7b":     _shape(4096,   32, (32, 8), 128, 14336,  32000, 1e4, windows=(4096,), longest=32768),
    "ministral-8b":   _shape(4096,   36, (32, 8), 128, 12288, 131072, 1e8,
                             windows=(None, 32768, 32768, 32768), longest=32768),
    "nemo-12b":       _shape(5120,   40, (32, 8), 128, 14336, 131072, 1e6, longest=128000),
    "codestral-22b":  _shape(6144,   56, (48, 8), 128, 16384,  32768, 1e6, longest=32768),
    "small-24b":      _shape(5120,   40, (32, 8), 128, 32768, 131072, 1e9, longest=131072),
    "mixtral-8x7b":   _shape(4096,   32, (32, 8), 128, 14336,  32000, 1e6, longest=32768, moe=_EIGHT_EXPERTS),
    "large-123b":     _shape(12288,  88, (96, 8), 128, 28672,  32768, 1e6, longest=131072),
}
# fmt: on


def shape(name: str, *, layers: int | None = None, window: int | None = None) -> ModelConfig:
    """Return the configuration of a published model; `name` is one of the names in SHAPES.

    layers      how many layers, fewer or more than published; None: as many as published
    window      the sliding window of every layer; 0: no layer has a window; None: as published

    >>> shape("mistral-7b", layers=2, window=0).sliding_window
    (None, None)
    """
    config = SHAPES[checked_choice("shape", name, SHAPES)]
    n_layers = config.n_layers if layers is None else checked_int("layers", layers, least=1)
    windows = (config.sliding_window * n_layers)[:n_layers]
    if window is not None:
        windows = (checked_int("window", window, least=0) or None,) * n_layers
    return config.replace(n_layers=n_layers, sliding_window=windows)
