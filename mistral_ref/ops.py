"""The operations that a forward pass is made of, as a protocol: one signature each, with its formula.

`reference_ops.ReferenceOps` fulfils it in NumPy and is the definition. Anything else that fulfils it must agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from mistral_ref.config import ModelConfig, RowOrder
from mistral_ref.rope import Rotation
from mistral_ref.steps import StepFactory, Steps
from mistral_ref.weights import Matrix

Slots = slice | np.ndarray


class KeyView(NamedTuple):
    """The keys and values that the queries of one pass may see.

    store       what `new_store` returned
    slots       where the keys lie in it, oldest first
    key_positions, query_positions      of these keys, and of this pass's queries
    window      how many keys a query sees, itself included (reference_ops.attends); None: all
    """

    store: Any
    slots: Slots
    key_positions: range
    query_positions: range
    window: int | None


class Ops(Protocol):
    """What a forward pass asks of its arithmetic.

    name            the backend's
    dtype           of all activations
    cache_dtypes    what keys and values can be stored as
    threads         how many compute; None where that is left to BLAS
    """

    name: str
    dtype: np.dtype[Any]
    cache_dtypes: tuple[str, ...]
    threads: int | None

    def running(self) -> AbstractContextManager[object]:
        """Return the context in which steps are computed (threads, treatment of overflow)."""
        ...

    def rotation(self, positions_T: np.ndarray, config: ModelConfig) -> Rotation:
        """Return RoPE's cosines and sines at these positions; see rope.py."""
        ...

    def embed(self, tokens_T: np.ndarray, tok_embeddings: Matrix) -> np.ndarray:
        """x_TD = tok_embeddings[tokens]"""
        ...

    def rms_norm(self, x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
        """y = x / sqrt(mean(x²) + eps) * weight (arXiv:1910.07467)"""
        ...

    def linear(self, x_TI: np.ndarray, weight_OI: Matrix) -> np.ndarray:
        """y_TO = x · weightᵀ"""
        ...

    def split_heads(self, x_TO: np.ndarray, n_heads: int, row_order: RowOrder) -> np.ndarray:
        """(T, heads * K) -> (T, heads, K), with the pairs that RoPE turns brought side by side."""
        ...

    def rotate(self, x_THK: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """(x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos) for each pair of neighbours (arXiv:2104.09864)"""
        ...

    def new_store(self, capacity: int, n_kv_heads: int, head_dim: int, dtype: str) -> Any:
        """Return room for the keys and values of `capacity` positions of one layer."""
        ...

    def write(self, store: Any, slots: Slots, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None:
        """Put keys and values in these slots, rounded to what the store holds."""
        ...

    def read(self, store: Any, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values (S, G, K) of these slots, in the dtype of the store."""
        ...

    def attention(self, q_THK: np.ndarray, view: KeyView, observed: StepFactory | None) -> Steps:
        """heads[t, h] = softmax over the keys s that t sees of (q[t, h] · k[s, g] / sqrt(K)) · v[s, g], g = h // (H/G)

        A generator that returns heads_THK (arXiv:1706.03762; grouped: arXiv:2305.13245). With `observed` it yields the
        steps "scores" and "attention_weights" (H, T, S) on its way.
        """
        ...

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """h = gate * sigmoid(gate) * up (arXiv:2002.05202)"""
        ...

    def route(self, router_logits_TE: np.ndarray, n_chosen: int) -> np.ndarray:
        """weights_TE: softmax over each token's n largest logits, 0 elsewhere; of equal ones the first expert wins."""
        ...

    def expert_linear(self, x_NI: np.ndarray, experts_N: np.ndarray, weights: Sequence[Matrix]) -> np.ndarray:
        """y_NO: row n is x[n] · weights[experts[n]]ᵀ"""
        ...

    def mix_experts(
        self, y_ND: np.ndarray, tokens_N: np.ndarray, experts_N: np.ndarray, weights_TE: np.ndarray
    ) -> np.ndarray:
        """z_TD: the sum over a token's experts, in their order, of weights[t, e] * y[n]"""
        ...
