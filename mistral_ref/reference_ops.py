"""ReferenceOps: the mathematics of the model in NumPy. Every faster implementation is compared with it.

Each operation has its formula right above the lines that compute it.

`ReferenceOps("float32")` is the plain backend. `ReferenceOps("float64")` is the oracle: it computes every step in
float64.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, get_args

import numpy as np
from threadpoolctl import ThreadpoolController

from mistral_kernels.forks import open_in_children
from mistral_ref.config import ModelConfig, RowOrder
from mistral_ref.errors import checked_choice, checked_int
from mistral_ref.ops import KeyView, Slots
from mistral_ref.rope import AnglePrecision, Rotation, rotation
from mistral_ref.rounded_inputs import Bf16Inputs, QuantizedInputs, rounded
from mistral_ref.steps import StepFactory, Steps
from mistral_ref.weights import Matrix, Weights, bf16_bits, bf16_values

# Maximum elements of a temporary array. Rows that are widened to floats should still be in the processor's cache when
# they are multiplied (docs/measurements/2026-11-machine-not-recorded.md).
_WIDENED_ELEMENTS = 2**18
SCORE_ELEMENTS = 2**22


# BLAS has one number of threads for the whole process. Passes that set it wait for each other.
_BLAS_TURN = open_in_children(threading.RLock())


class Store(NamedTuple):
    """Keys and values of one layer, (capacity, G, K) each, and their scales, (capacity, G); (0, G) unless int8."""

    k: np.ndarray
    v: np.ndarray
    k_scales: np.ndarray
    v_scales: np.ndarray


def to_int8(x_TGK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return keys or values as int8 (T, G, K), and their scales (T, G): max |x| / 127 over each head.

    x is about q * scale. A scale is rounded up to a float whose last 8 bits are 0. So q * scale is exact, and if it is
    rounded again, q and scale stay the same.

    >>> q, scales = to_int8(np.float32([[[127.0, -1.4, 0.0]]]))
    >>> q.tolist(), scales.tolist()
    ([[[127, -1, 0]]], [[1.0]])
    """
    x_TGK = x_TGK.astype(np.float32, copy=False)
    scales_TG = np.abs(x_TGK).max(axis=-1) / np.float32(127)
    scales_TG = ((scales_TG.view(np.uint32) + np.uint32(0xFF)) & np.uint32(0xFFFFFF00)).view(np.float32)
    with np.errstate(all="ignore"):
        q_TGK = np.nan_to_num(np.rint(x_TGK / scales_TG[..., np.newaxis]), posinf=0, neginf=0)
    return np.where(np.abs(q_TGK) <= 127, q_TGK, 0).astype(np.int8), scales_TG


def attends(query: Any, key: Any, window: int | None) -> Any:
    """Return whether the token at position `query` sees the token at position `key`. Positions may be arrays.

    A token sees itself and the window - 1 tokens before it: 0 <= query - key < window. With a window of None it sees
    all tokens up to itself. `Ring.first_visible` returns the oldest key that a query sees.

        window 3        key 0 1 2 3 4
             query 0        x
             query 1        x x
             query 2        x x x
             query 3          x x x
             query 4            x x x

    >>> [key for key in range(10) if attends(4, key, window=3)]
    [2, 3, 4]
    """
    distance = query - key
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def softmax(x: np.ndarray) -> np.ndarray:
    """Return exp(x - max x) / sum of exp(x - max x), over the last axis. The share of -inf is 0, also beside NaN.

    >>> softmax(np.array([2.0, 2.0, -np.inf])).tolist()
    [0.5, 0.5, 0.0]
    >>> softmax(np.array([0.0, np.nan, -np.inf])).tolist()
    [nan, nan, 0.0]
    """
    largest = x.max(axis=-1, keepdims=True)
    shares = np.exp(x - largest)
    shares /= shares.sum(axis=-1, keepdims=True)
    if not np.isfinite(largest).all():
        shares[(x == -np.inf) & (largest != -np.inf)] = 0
    return shares


def blocks(n: int, row_elements: int, most_elements: int) -> Iterator[slice]:
    """Yield slices of range(n). The rows of one slice have at most `most_elements` elements, or it is one row."""
    height = max(1, most_elements // row_elements)
    return (slice(start, min(start + height, n)) for start in range(0, n, height))


class ReferenceOps:
    """The operations of ops.py in NumPy. All activations have one dtype.

    dtype       "float32" or "float64"
    threads     number of BLAS threads while a pass runs; None: unchanged
    angles      "float64", or "float32": round RoPE's angles as the published implementations do
    quantized_inputs    what the inputs of quantized matrices are rounded to, as the kernels do it: "int16", "int8", or
                "float": they are not rounded. None: "int16" in float32, "float" in float64
    bf16_inputs     what the inputs of bf16 matrices are rounded to: "bfloat16", or "float32": they are not rounded

    Raises InputError for an argument that cannot be used.
    """

    name = "numpy"

    def __init__(
        self,
        dtype: str = "float32",
        *,
        threads: int | None = None,
        angles: AnglePrecision = "float64",
        quantized_inputs: QuantizedInputs | None = None,
        bf16_inputs: Bf16Inputs = "float32",
    ) -> None:
        self.dtype = np.dtype(checked_choice("dtype", dtype, ("float32", "float64")))
        self.cache_dtypes: tuple[str, ...] = (dtype, "float16", "int8")
        self.angles = checked_choice("rope_angles", angles, get_args(AnglePrecision))
        if quantized_inputs is None:
            quantized_inputs = "int16" if dtype == "float32" else "float"
        self.quantized_inputs = checked_choice("quantized_inputs", quantized_inputs, get_args(QuantizedInputs))
        self.bf16_inputs = checked_choice("bf16_inputs", bf16_inputs, get_args(Bf16Inputs))
        self.threads = None if threads is None else checked_int("threads", threads, least=1)
        self._blas = None if threads is None else ThreadpoolController()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Return the context in which steps are computed: it sets BLAS threads and silences floating-point warnings."""
        # In swiglu exp may overflow to infinity; the result is still right. Sampling reports NaN from broken weights.
        with np.errstate(all="ignore"):
            if self._blas is None:
                yield
                return
            with _BLAS_TURN, self._blas.limit(limits=self.threads, user_api="blas"):
                yield

    def prepare(
        self, config: ModelConfig, weights: Weights, cache_dtype: str, lengths: Collection[int], *, last_only: bool
    ) -> None:
        """Make everything ready for passes of these numbers of tokens. NumPy needs nothing."""

    def rotation(self, positions_T: np.ndarray, config: ModelConfig) -> Rotation:
        """Return RoPE's cosines and sines at these positions (T,). rope.py has the formulas."""
        return rotation(positions_T, config, self.dtype, self.angles)

    def embed(self, tokens_T: np.ndarray, tok_embeddings: Matrix) -> np.ndarray:
        """Return each token's row of the embedding matrix, x_TD (T, D)."""
        # x = tok_embeddings[tokens]
        return tok_embeddings.rows(tokens_T, self.dtype)

    def rms_norm(self, x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
        """Return tokens scaled to unit root mean square, then each dimension times its weight (arXiv:1910.07467)."""
        # y = x / sqrt(mean(x²) + eps) * weight
        mean_square = np.mean(x_TD * x_TD, axis=-1, keepdims=True)
        return x_TD / np.sqrt(mean_square + self.dtype.type(eps)) * weight_D.astype(self.dtype)

    def linear(self, x_TI: np.ndarray, weight_OI: Matrix) -> np.ndarray:
        """Return the product of every token with a matrix, y_TO (T, O).

        The matrix's rows are widened to floats a block at a time. The inputs of weights that are whole numbers with
        scales are rounded first, in the same way as in the kernels (rounded_inputs.py).
        """
        n_out, n_in = weight_OI.shape
        if weight_OI.group_size is not None:
            x_TI = rounded(x_TI, self.quantized_inputs, weight_OI.group_size)
        elif self.rounds_to_bf16(weight_OI):
            x_TI = bf16_values(bf16_bits(x_TI)).astype(self.dtype)
        # y = x · weightᵀ
        y_TO = np.empty((len(x_TI), n_out), self.dtype)
        for rows in blocks(n_out, n_in, _WIDENED_ELEMENTS):
            y_TO[:, rows] = x_TI @ weight_OI.rows(rows, self.dtype).T
        return y_TO

    def rounds_to_bf16(self, weight_OI: Matrix) -> bool:
        """Return whether the inputs of a matrix are rounded to bf16."""
        return weight_OI.kind == "bf16" and self.bf16_inputs == "bfloat16"

    def split_heads(self, x_TO: np.ndarray, n_heads: int, row_order: RowOrder) -> np.ndarray:
        """Return the outputs of a product, cut into heads (T, heads, K), each RoPE pair as two neighbours.

        In Mistral's own layout the numbers of a pair are neighbours already. In Hugging Face's layout the first numbers
        of all pairs come before the second numbers:

            interleaved     a0 a1 b0 b1 c0 c1
            halves          a0 b0 c0 a1 b1 c1
        """
        n_tokens = len(x_TO)
        if row_order == "interleaved":
            return x_TO.reshape(n_tokens, n_heads, -1)
        return x_TO.reshape(n_tokens, n_heads, 2, -1).swapaxes(2, 3).reshape(n_tokens, n_heads, -1)

    def rotate(self, x_THK: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Return x_THK with every pair of neighbours turned by its angle (arXiv:2104.09864). cos, sin: (T, K/2)."""
        # (x0, x1) -> (x0 cos - x1 sin, x0 sin + x1 cos)
        x0, x1 = x_THK[..., 0::2], x_THK[..., 1::2]
        cos, sin = cos[:, np.newaxis], sin[:, np.newaxis]
        turned = np.empty_like(x_THK)
        turned[..., 0::2] = x0 * cos - x1 * sin
        turned[..., 1::2] = x0 * sin + x1 * cos
        return turned

    def new_store(self, capacity: int, n_kv_heads: int, head_dim: int, dtype: str) -> Any:
        """Return a store for the keys and values of `capacity` positions of one layer."""
        shape, n_scales = (capacity, n_kv_heads, head_dim), capacity if dtype == "int8" else 0
        scales = (np.zeros((n_scales, n_kv_heads), np.float32) for _ in range(2))
        return Store(np.zeros(shape, dtype), np.zeros(shape, dtype), *scales)

    def write(self, store: Any, slots: Slots, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None:
        """Put keys and values in these slots, rounded to the store's dtype."""
        if store.k.dtype == np.int8:
            store.k[slots], store.k_scales[slots] = to_int8(k_TGK)
            store.v[slots], store.v_scales[slots] = to_int8(v_TGK)
        else:
            store.k[slots] = k_TGK
            store.v[slots] = v_TGK

    def read(self, store: Any, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys and the values (S, G, K) in these slots; int8 is multiplied by its scales."""
        if store.k.dtype != np.int8:
            return store.k[slots], store.v[slots]
        with np.errstate(invalid="ignore"):  # a scale may be infinite
            k_SGK = store.k[slots] * store.k_scales[slots][..., np.newaxis]
            return k_SGK, store.v[slots] * store.v_scales[slots][..., np.newaxis]

    def attention(self, q_THK: np.ndarray, views: Sequence[KeyView], observed: StepFactory | None) -> Steps:
        """Attend. This is a generator; it returns heads_THK.

        views       a view for each sequence; their queries lie end to end in q_THK
        observed    yield the steps "scores" and "attention_weights", (H, T, S) each, of the one sequence
        """
        start, heads = 0, []
        for view in views:
            rows = slice(start, start + len(view.query_positions))
            heads.append((yield from self.attend(q_THK[rows], view, observed)))
            start = rows.stop
        return heads[0] if len(heads) == 1 else np.concatenate(heads)

    def attend(self, q_THK: np.ndarray, view: KeyView, observed: StepFactory | None) -> Steps:
        """Attend within one sequence; see `attention` (arXiv:1706.03762; grouped queries: arXiv:2305.13245)."""
        # score[h,t,s] = q[t,h] · k[s,g] / sqrt(K), g = h // (H/G), and -inf where token t does not see key s
        # heads[t,h] = sum over s of softmax(score)[h,t,s] v[s,g]
        k_SGK, v_SGK = (part.astype(self.dtype, copy=False) for part in self.read(view.store, view.slots))
        queries_T, keys_S = np.array(view.query_positions), np.array(view.key_positions)
        slices = list(blocks(len(q_THK), q_THK.shape[1] * len(keys_S), SCORE_ELEMENTS))

        def block_scores(rows: slice) -> np.ndarray:
            return self.scores(q_THK[rows], k_SGK, attends(queries_T[rows, np.newaxis], keys_S, view.window))

        if observed is None:
            return np.concatenate([self.gather(softmax(block_scores(rows)), v_SGK) for rows in slices])
        # The blocks and their memory order are the same as above, so every number comes from the same additions.
        scores_HTS = np.concatenate([block_scores(rows) for rows in slices], axis=1)
        scores_HTS = yield observed("scores", scores_HTS, view.key_positions)
        parts = [softmax(np.ascontiguousarray(scores_HTS[:, rows])) for rows in slices]
        weights_HTS = yield observed("attention_weights", np.concatenate(parts, axis=1), view.key_positions)
        return np.concatenate([self.gather(np.ascontiguousarray(weights_HTS[:, rows]), v_SGK) for rows in slices])

    def scores(self, q_BHK: np.ndarray, k_SGK: np.ndarray, visible_BS: np.ndarray) -> np.ndarray:
        """Return q[b, h] · k[s, h // (H/G)] / sqrt(K) as (H, B, S), -inf where query b does not see key s.

        A block has B queries. M = H/G neighbouring query heads share a key/value head. The axes M and B are merged, so
        each key/value head needs one matrix product. Heads 0 and 1 of 4 read the first of 2 key/value heads:

        >>> ops, q_BHK = ReferenceOps("float64"), np.ones((1, 4, 4))
        >>> k_SGK = np.array([[[1.0] * 4, [10.0] * 4]])
        >>> ops.scores(q_BHK, k_SGK, np.array([[True]])).ravel().tolist()
        [2.0, 2.0, 20.0, 20.0]
        """
        n_queries, n_heads, head_dim = q_BHK.shape
        n_keys, n_kv_heads, _ = k_SGK.shape
        q_GMBK = q_BHK.reshape(n_queries, n_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
        scores = q_GMBK.reshape(n_kv_heads, -1, head_dim) @ k_SGK.transpose(1, 2, 0)
        scores *= self.dtype.type(head_dim**-0.5)
        return np.where(visible_BS, scores.reshape(n_heads, n_queries, n_keys), self.dtype.type(-np.inf))

    def gather(self, weights_HBS: np.ndarray, v_SGK: np.ndarray) -> np.ndarray:
        """Return the sum over s of weights[h, b, s] v[s, h // (H/G)] as (B, H, K).

        The sum is over the keys whose weight is not 0: NaN and infinities in a key's values reach no other query.
        """
        n_heads, n_queries, n_keys = weights_HBS.shape
        _, n_kv_heads, head_dim = v_SGK.shape
        weights_GRS, v_GSK = weights_HBS.reshape(n_kv_heads, -1, n_keys), v_SGK.transpose(1, 0, 2)
        is_apart_GSK = ~np.isfinite(v_GSK)
        if not is_apart_GSK.any():
            gathered = weights_GRS @ v_GSK
        else:  # 0 * NaN is NaN, so what some query does not take is added apart
            is_apart_GSK &= (weights_GRS == 0).any(axis=(0, 1))[:, np.newaxis]
            gathered = weights_GRS @ np.where(is_apart_GSK, 0, v_GSK)
            for s in np.flatnonzero(is_apart_GSK.any(axis=(0, 2))):
                weights_GR1 = weights_GRS[:, :, s, np.newaxis]
                v_G1K = np.where(is_apart_GSK[:, s], v_GSK[:, s], 0)[:, np.newaxis]
                gathered += np.where(weights_GR1 == 0, 0, weights_GR1 * v_G1K)
        return gathered.reshape(n_heads, n_queries, head_dim).transpose(1, 0, 2)

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Return the hidden units: each `up` times silu of its `gate` (arXiv:2002.05202)."""
        # h = silu(gate) * up = gate * sigmoid(gate) * up = gate / (1 + exp(-gate)) * up
        return gate / (1 + np.exp(-gate)) * up

    def route(self, router_logits_TE: np.ndarray, n_chosen: int) -> np.ndarray:
        """Return the share (T, E) of each expert in each token (arXiv:2401.04088).

        If two experts have equal logits, the one with the lower number is chosen first.
        """
        # weights[t] = softmax over the n largest of router_logits[t], 0 elsewhere
        chosen = np.argsort(-router_logits_TE, axis=-1, kind="stable")[:, :n_chosen]
        weights_TE = np.zeros_like(router_logits_TE)
        shares = softmax(np.take_along_axis(router_logits_TE, chosen, axis=-1))
        np.put_along_axis(weights_TE, chosen, shares, axis=-1)
        return weights_TE

    def expert_linear(self, x_NI: np.ndarray, experts_N: np.ndarray, weights: Sequence[Matrix]) -> np.ndarray:
        """Return the product of each row with the matrix of its expert, y_NO (N, O)."""
        # y[n] = x[n] · weights[experts[n]]ᵀ
        y_NO = np.empty((len(x_NI), weights[0].shape[0]), self.dtype)
        for expert in np.unique(experts_N):
            rows = experts_N == expert
            y_NO[rows] = self.linear(x_NI[rows], weights[expert])
        return y_NO

    def mix_experts(
        self, y_ND: np.ndarray, tokens_N: np.ndarray, experts_N: np.ndarray, weights_TE: np.ndarray
    ) -> np.ndarray:
        """Return z_TD: for each token the sum of its experts' outputs times their shares, in the experts' order."""
        # z[t] = sum over the rows n of token t of weights[t, experts[n]] * y[n]
        z_TD = np.zeros((len(weights_TE), y_ND.shape[1]), self.dtype)
        np.add.at(z_TD, tokens_N, weights_TE[tokens_N, experts_N, np.newaxis] * y_ND)
        return z_TD
