"""CompiledOps: the operations of reference_ops.py, where their formulas stand, over compiled kernels.

What takes time is compiled, the rest inherited. Kernels check nothing, so everything is checked or made to fit here:
arrays are contiguous float32 of the shapes that kernels expect, and indices come from the cache or are checked before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numba
import numpy as np

from mistral_kernels import attention, elementwise, panels, threads
from mistral_kernels.matmul import matmul, slab_shape
from mistral_kernels.matvec import FEW, ONE, are_few, matvec, matvec_tiled
from mistral_kernels.pool import ArrayPool
from mistral_kernels.quantized import matmul_quantized, matvec_quantized, slab_shapes
from mistral_ref.activations import Activations
from mistral_ref.errors import InputError
from mistral_ref.host import chosen_threads
from mistral_ref.ops import KeyView, Slots
from mistral_ref.quantized_matrix import QuantizedMatrix
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.rope import AnglePrecision
from mistral_ref.steps import Step, StepFactory, Steps
from mistral_ref.weights import Matrix, TiledMatrix, bf16_bits, bf16_values

# Work that one thread does by itself, in bytes of weights times tokens, and in numbers of activations: waking others
# costs microseconds, and milliseconds where another program has taken their core.
_FEW_BYTES = 2**20
_FEW_NUMBERS = 2**15
_TOKENS_AT_ONCE = 512  # what a product writes should stay in the caches
_PAIRED_INPUTS = 4  # rows of bf16 are taken as pairs if their length is a multiple of it

_EVERYTHING = 2**62  # a window that no position is outside of
_NO_SCALE = np.ones((1, 1), np.float32)


def _start_threads() -> None:
    try:
        threads.layer()
    except ValueError as error:  # NUMBA_THREADING_LAYER asks for one that is not there
        problem = " ".join(str(error).split())
        raise InputError(f"backend is 'numba', but its threads cannot be started: {problem}") from None


def _floats(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32)


class CompiledOps(ReferenceOps):
    """Operations in float32 over compiled kernels.

    threads     how many; None: MISTRAL_REF_THREADS, or as many as there are performance cores
    angles      as in ReferenceOps
    activations what the inputs of quantized matrices are rounded to: "int16", or "int8", which is faster; "bfloat16":
                those of bf16 matrices to bf16, which is twice as fast where a processor gains by pairs of them
    """

    name = "numba"
    threads: int

    def __init__(
        self,
        *,
        threads: int | None = None,
        angles: AnglePrecision = "float64",
        activations: Activations | None = None,
    ) -> None:
        if numba.config.DISABLE_JIT:
            raise InputError("backend is 'numba', but NUMBA_DISABLE_JIT is set; expected backend='numpy' then")
        super().__init__("float32", angles=angles, activations=activations)
        if self.activations == "float":
            raise InputError(
                "activations is 'float', which backend='numpy' alone has; expected 'int16', 'int8' or 'bfloat16'"
            )
        self.threads = chosen_threads(threads)
        self._pool = ArrayPool()
        _start_threads()

    @contextmanager
    def running(self) -> Iterator[None]:
        with super().running(), threads.using(self.threads):
            yield

    def _threads_for(self, work: int, few: int) -> int:
        return 1 if work < few else self.threads

    def rms_norm(self, x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
        x_TD = _floats(x_TD)
        y_TD = self._pool.empty(x_TD.shape)
        elementwise.rms_norm()(x_TD, weight_D, eps, y_TD, self._threads_for(x_TD.size, _FEW_NUMBERS))
        return y_TD

    def linear(self, x_TI: np.ndarray, weight_OI: Matrix) -> np.ndarray:
        n_out, n_in = weight_OI.shape
        if x_TI.ndim != 2 or x_TI.shape[1] != n_in:
            raise InputError(f"{weight_OI.name} takes {n_in} inputs a token; found an array {x_TI.shape}")
        x_TI, n_tokens = _floats(x_TI), len(x_TI)
        y_TO = self._pool.empty((n_tokens, n_out))
        if isinstance(weight_OI, QuantizedMatrix):
            self._quantized_linear(x_TI, weight_OI, y_TO)
            return y_TO
        scale = _NO_SCALE if weight_OI.scale is None else weight_OI.scale
        n_threads = self._threads_for(weight_OI.nbytes * n_tokens, _FEW_BYTES)
        kind: str = weight_OI.kind
        if self.rounds_to_bf16(weight_OI):
            if n_in % _PAIRED_INPUTS:
                x_TI = bf16_values(bf16_bits(x_TI))
            else:
                kind = "pairs"
        is_tiled, stored = isinstance(weight_OI, TiledMatrix), weight_OI.as_bytes
        if n_tokens == 1 and is_tiled:
            matvec_tiled(kind)(stored, x_TI[0], y_TO[0], n_threads)
        elif n_tokens and not is_tiled and are_few(kind, n_tokens):
            matvec(kind, ONE if n_tokens == 1 else FEW)(stored, scale, x_TI, y_TO, n_threads)
        else:
            for start in range(0, n_tokens, _TOKENS_AT_ONCE):
                rows = slice(start, start + _TOKENS_AT_ONCE)
                slabs = self._pool.empty(slab_shape(kind, len(x_TI[rows]), n_in))
                matmul(kind, is_tiled)(stored, scale, x_TI[rows], slabs, y_TO[rows], n_threads)
        return y_TO

    def _quantized_linear(self, x_TI: np.ndarray, weight_OI: QuantizedMatrix, y_TO: np.ndarray) -> None:
        how = weight_OI.bits, self.quantized_activations, weight_OI.group_size
        stored, scales, unit = weight_OI.as_bytes, weight_OI.scale_bytes, weight_OI.unit
        n_threads = self._threads_for(weight_OI.nbytes * len(x_TI), _FEW_BYTES)
        if len(x_TI) == 1:
            matvec_quantized(*how)(stored, scales, unit, x_TI[0], y_TO[0], n_threads)
            return
        for start in range(0, len(x_TI), _TOKENS_AT_ONCE):
            rows = slice(start, start + _TOKENS_AT_ONCE)
            q_shape, scales_shape = slab_shapes(weight_OI.group_size, *x_TI[rows].shape)
            q, scales_x = self._pool.empty(q_shape, self.quantized_activations), self._pool.empty(scales_shape)
            matmul_quantized(*how)(stored, scales, unit, x_TI[rows], q, scales_x, y_TO[rows], n_threads)

    def rotate(self, x_THK: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        x_THK = _floats(x_THK)
        turned = self._pool.empty(x_THK.shape)
        elementwise.rotate()(x_THK, cos, sin, turned, self._threads_for(x_THK.size, _FEW_NUMBERS))
        return turned

    def new_store(self, capacity: int, n_kv_heads: int, head_dim: int, dtype: str) -> panels.PanelStore:
        return panels.new_store(capacity, n_kv_heads, head_dim, np.dtype(dtype))

    def write(self, store: panels.PanelStore, slots: Slots, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None:
        slots_T = np.arange(slots.start, slots.stop) if isinstance(slots, slice) else np.ascontiguousarray(slots)
        if store.k.dtype == np.int8:
            panels.write_int8()(*store, slots_T, _floats(k_TGK), _floats(v_TGK))
            return
        raw = "float32" if store.k.dtype == np.float32 else "uint16"
        k_TGK, v_TGK = (np.ascontiguousarray(part, store.k.dtype).view(raw) for part in (k_TGK, v_TGK))
        panels.write(raw)(store.k.view(raw), store.v.view(raw), slots_T, k_TGK, v_TGK)

    def read(self, store: panels.PanelStore, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
        return panels.read(store, slots)

    def attention(self, q_THK: np.ndarray, view: KeyView, observed: StepFactory | None) -> Steps:
        if observed is not None:

            def only_shown(name: str, value: np.ndarray, key_positions: range | None = None) -> Step:
                step = observed(name, value, key_positions)
                step.fixed_by = "the fused attention does not go on from it; load the model with backend='numpy'"
                return step

            yield from super().attention(q_THK, view, only_shown)
        return self._heads(q_THK, view)

    def _heads(self, q_THK: np.ndarray, view: KeyView) -> np.ndarray:
        q_THK = _floats(q_THK)
        (k, v, k_scales, v_scales), heads_THK = view.store, self._pool.empty(q_THK.shape)
        n_tokens, n_heads, _ = q_THK.shape
        n_kv_heads, n_blocks = v.shape[:2]
        is_few = n_tokens * n_heads <= n_kv_heads * attention.FEW_ROWS
        kind = {4: "f32", 2: "f16", 1: "int8"}[k.itemsize]
        kernel = attention.attention(kind, attention.FEW_ROWS if is_few else attention.MANY_ROWS)
        kernel(
            q_THK,
            k.view(np.uint8).reshape(-1),
            v.view(np.uint8).reshape(-1),
            k_scales,
            v_scales,
            n_kv_heads,
            n_blocks,
            _segments(view),
            view.query_positions.start,
            _EVERYTHING if view.window is None else view.window,
            heads_THK,
            self._threads_for(q_THK.size * len(view.key_positions), 8 * _FEW_NUMBERS),
        )
        return heads_THK

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        gate, up = _floats(gate), _floats(up)
        hidden = self._pool.empty(gate.shape)
        n_threads = self._threads_for(gate.size, _FEW_NUMBERS)
        elementwise.swiglu()(gate.reshape(-1), up.reshape(-1), hidden.reshape(-1), n_threads)
        return hidden

    def mix_experts(
        self, y_ND: np.ndarray, tokens_N: np.ndarray, experts_N: np.ndarray, weights_TE: np.ndarray
    ) -> np.ndarray:
        z_TD = self._pool.empty((len(weights_TE), y_ND.shape[1]))
        tokens_N, experts_N = (np.ascontiguousarray(indices, np.int64) for indices in (tokens_N, experts_N))
        elementwise.mix_experts()(_floats(y_ND), tokens_N, experts_N, _floats(weights_TE), z_TD)
        return z_TD


def _segments(view: KeyView) -> np.ndarray:
    """Return the runs of neighbouring slots: (first slot, slot past the last one, position of the first one's key).

    >>> view = KeyView(None, np.array([5, 6, 0, 1]), range(12, 16), range(15, 16), 4)
    >>> _segments(view).tolist()
    [[5, 7, 12], [0, 2, 14]]
    """
    slots, first = view.slots, view.key_positions.start
    if isinstance(slots, slice):
        return np.array([[slots.start, slots.stop, first]])
    breaks = np.flatnonzero(np.diff(slots) != 1) + 1
    runs = zip([0, *breaks], [*breaks, len(slots)], strict=True)
    return np.array([[slots[start], slots[stop - 1] + 1, first + start] for start, stop in runs])
