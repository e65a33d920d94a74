"""Operations that are wrong on purpose. Each class overrides one of them, so several can be joined to one class."""

from __future__ import annotations

import math

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.model import Model
from mistral_ref.reference_ops import ReferenceOps, softmax
from mistral_ref.rope import Rotation, query_temperature
from mistral_ref.weights import Matrix, bf16_bits, bf16_values


class BrokenOps(ReferenceOps):
    """ReferenceOps with the dtype of the right model. Subclasses override operations; `name` says which bugs it has."""

    def __init__(self, bugs: str, right: Model) -> None:
        assert isinstance(right.ops, ReferenceOps)  # both backends are
        super().__init__(right.ops.dtype.name, threads=right.ops.threads, angles=right.ops.angles)
        self.name = f"numpy, broken: {bugs}"
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


def to_halves(y_TO: np.ndarray, n_heads: int) -> np.ndarray:
    """Return outputs of wq or wk with the first numbers of each head's pairs before the second numbers.

    >>> to_halves(np.arange(8).reshape(1, 8), n_heads=1).tolist()
    [[0, 2, 4, 6, 1, 3, 5, 7]]
    """
    return y_TO.reshape(len(y_TO), n_heads, -1, 2).swapaxes(2, 3).reshape(y_TO.shape)


def from_halves(y_TO: np.ndarray, n_heads: int) -> np.ndarray:
    """Return what `to_halves` was given."""
    return y_TO.reshape(len(y_TO), n_heads, 2, -1).swapaxes(2, 3).reshape(y_TO.shape)


class PermutedTwice(BrokenOps):
    """The rows of wq and wk were brought from Mistral's order to Hugging Face's twice."""

    def linear(self, x_TI: np.ndarray, weight_OI: Matrix) -> np.ndarray:
        """Return the product; queries and keys are in the order after the second time."""
        y_TO = super().linear(x_TI, weight_OI)
        kind = weight_OI.name.rpartition(".")[2]
        n_heads = {"wq": self.config.n_heads, "wk": self.config.n_kv_heads}.get(kind)
        return y_TO if n_heads is None else to_halves(y_TO, n_heads)


class KeysPermutedAsQueries(BrokenOps):
    """The rows of wk were brought from Hugging Face's order to Mistral's as if wk had as many heads as wq."""

    def linear(self, x_TI: np.ndarray, weight_OI: Matrix) -> np.ndarray:
        """Return the product; keys are in the wrong order."""
        y_TO = super().linear(x_TI, weight_OI)
        if not weight_OI.name.endswith(".wk"):
            return y_TO
        n_heads, n_kv_heads = self.config.n_heads, self.config.n_kv_heads
        if self.config.rope_row_order == "halves":
            return to_halves(from_halves(y_TO, n_heads), n_kv_heads)
        return from_halves(to_halves(y_TO, n_kv_heads), n_heads)


class PositionsRestart(BrokenOps):
    """RoPE and the query temperature take every pass to begin at position 0. The window has the right positions."""

    def rotation(self, positions_T: np.ndarray, config: ModelConfig) -> Rotation:
        """Return the rotation for positions that begin at 0."""
        return super().rotation(positions_T - positions_T[0], config)


class TemperatureOnKeys(BrokenOps):
    """k' = t(p) · R(p) k, and q' = R(p) q."""

    def rotation(self, positions_T: np.ndarray, config: ModelConfig) -> Rotation:
        """Return the rotation with the parts of queries and keys exchanged."""
        query_cos, query_sin, key_cos, key_sin = super().rotation(positions_T, config)
        return Rotation(key_cos, key_sin, query_cos, query_sin)


class EarlyTemperature(BrokenOps):
    """t(p) = 1 + beta ln(1 + floor((p + 1) / L0)). This is Llama 4's; right is floor(p / L0)."""

    def rotation(self, positions_T: np.ndarray, config: ModelConfig) -> Rotation:
        """Return the rotation with the query temperature of the next position."""
        temperature = config.query_temperature
        if temperature is None:
            return super().rotation(positions_T, config)
        plain = super().rotation(positions_T, config.replace(query_temperature=None))
        scale_T1 = query_temperature(positions_T + 1, temperature)[:, np.newaxis].astype(self.dtype)
        return plain._replace(query_cos=scale_T1 * plain.query_cos, query_sin=scale_T1 * plain.query_sin)


class EpsOutside(BrokenOps):
    """y = x / (sqrt(mean(x²)) + eps) * weight."""

    def rms_norm(self, x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
        """Return the norm with eps outside the root."""
        root_T1 = np.sqrt(np.mean(x_TD * x_TD, axis=-1, keepdims=True))
        return x_TD / (root_T1 + self.dtype.type(eps)) * weight_D.astype(self.dtype)


class CastInNorm(BrokenOps):
    """y = bf16(x / sqrt(mean(x²) + eps)) * weight."""

    def rms_norm(self, x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
        """Return the norm, rounded to bf16 before the weight is multiplied."""
        scaled_TD = super().rms_norm(x_TD, np.ones_like(weight_D), eps)
        return bf16_values(bf16_bits(scaled_TD)).astype(self.dtype) * weight_D.astype(self.dtype)


class UnnormalisedExperts(BrokenOps):
    """e = softmax of r over all experts, but 0 for experts outside the top k. The shares add up to less than 1.

    Divided by their sum they would be right: that is the softmax over the top k (arXiv:2401.04088, section 2.1).
    """

    def route(self, router_logits_TE: np.ndarray, n_chosen: int) -> np.ndarray:
        """Return the experts' shares, which do not add up to 1."""
        is_chosen_TE = super().route(router_logits_TE, n_chosen) > 0
        return softmax(router_logits_TE) * is_chosen_TE


class RawExperts(BrokenOps):
    """e = r for the top k experts, without a softmax."""

    def route(self, router_logits_TE: np.ndarray, n_chosen: int) -> np.ndarray:
        """Return the chosen experts' logits."""
        return np.where(super().route(router_logits_TE, n_chosen) > 0, router_logits_TE, self.dtype.type(0))
