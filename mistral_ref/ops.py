"""The operations of a forward pass, as a protocol: signatures only.

`reference_ops.ReferenceOps` computes them in NumPy and defines them: each formula stands there above its lines. Every
other implementation must agree with it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np

from mistral_ref.config import ModelConfig, RowOrder
from mistral_ref.rope import Rotation
from mistral_ref.rounded_inputs import Bf16Inputs, QuantizedInputs
from mistral_ref.steps import StepFactory, Steps
from mistral_ref.weights import Matrix, Weights

Slots = slice | np.ndarray
Rows = slice | np.ndarray


class KeyView(NamedTuple):
    """The keys and values that the queries of one sequence may see in a pass.

    store       the keys and values of the layer, as `new_store` returned them
    slots       the slots of the visible keys in the store, oldest first
    key_positions, query_positions      the positions of these keys, and of the queries
    window      how many keys a query sees, itself included (reference_ops.attends); None: all
    """

    store: Any
    slots: Slots
    key_positions: range
    query_positions: range
    window: int | None


class AnyPass(Protocol):
    """What the forward pass asks of the tokens that it takes: where they are, and where their keys and values are.

    positions   the position of each token in its sequence
    last        which of the tokens have logits if only the last ones are wanted
    """

    @property
    def positions(self) -> np.ndarray: ...

    @property
    def last(self) -> Rows: ...

    def write(self, layer: int, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None: ...

    def views(self, layer: int, rows: Any) -> list[KeyView]: ...

    def commit(self, tokens_T: np.ndarray) -> None: ...


class Ops(Protocol):
    """The operations that a forward pass calls.

    name            name of the backend
    dtype           number format of all activations
    cache_dtypes    number formats in which keys and values can be stored
    threads         number of threads; None: BLAS decides
    quantized_inputs, bf16_inputs    what the inputs of quantized and of bf16 matrices are rounded to
    """

    name: str
    dtype: np.dtype[Any]
    cache_dtypes: tuple[str, ...]
    threads: int | None
    quantized_inputs: QuantizedInputs
    bf16_inputs: Bf16Inputs

    def running(self) -> AbstractContextManager[object]: ...

    def prepare(
        self, config: ModelConfig, weights: Weights, cache_dtype: str, lengths: Collection[int], *, last_only: bool
    ) -> None: ...

    def rotation(self, positions_T: np.ndarray, config: ModelConfig) -> Rotation: ...

    def embed(self, tokens_T: np.ndarray, tok_embeddings: Matrix) -> np.ndarray: ...

    def rms_norm(self, x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray: ...

    def linear(self, x_TI: np.ndarray, weight_OI: Matrix) -> np.ndarray: ...

    def split_heads(self, x_TO: np.ndarray, n_heads: int, row_order: RowOrder) -> np.ndarray: ...

    def rotate(self, x_THK: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray: ...

    def new_store(self, capacity: int, n_kv_heads: int, head_dim: int, dtype: str) -> tuple[np.ndarray, ...]: ...

    def write(self, store: Any, slots: Slots, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None: ...

    def read(self, store: Any, slots: Slots) -> tuple[np.ndarray, np.ndarray]: ...

    def attention(self, q_THK: np.ndarray, views: Sequence[KeyView], observed: StepFactory | None) -> Steps: ...

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray: ...

    def route(self, router_logits_TE: np.ndarray, n_chosen: int) -> np.ndarray: ...

    def expert_linear(self, x_NI: np.ndarray, experts_N: np.ndarray, weights: Sequence[Matrix]) -> np.ndarray: ...

    def mix_experts(
        self, y_ND: np.ndarray, tokens_N: np.ndarray, experts_N: np.ndarray, weights_TE: np.ndarray
    ) -> np.ndarray: ...
