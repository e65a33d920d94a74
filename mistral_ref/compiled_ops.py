"""CompiledOps: the operations of reference_ops.py, computed by compiled kernels.

The formulas stand in reference_ops.py. The operations that take time are compiled here; the others are inherited from
ReferenceOps. The kernels check nothing, so this module hands them only arrays that fit: contiguous float32 arrays of
the expected shapes. Indices come from the cache or have been checked before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection

import numba
import numpy as np

from mistral_kernels import KernelWarning, attention, compiling, elementwise, panels
from mistral_kernels.pool import ArrayPool
from mistral_kernels.team import team
from mistral_ref import kernel_choice
from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError, OnCompile, warn
from mistral_ref.host import chosen_threads
from mistral_ref.ops import KeyView, Slots
from mistral_ref.reference_ops import ReferenceOps, attends
from mistral_ref.rope import AnglePrecision
from mistral_ref.rounded_inputs import Bf16Inputs, QuantizedInputs
from mistral_ref.steps import Step, StepFactory, Steps
from mistral_ref.weights import Matrix, Weights, bf16_bits, bf16_values

# Below this much work one thread works alone: bytes of weights times tokens, and numbers of activations. Waking other
# threads costs microseconds, or milliseconds if another program has taken their core.
_FEW_BYTES = 2**20
_FEW_NUMBERS = 2**15

_EVERYTHING = 2**62  # a window that holds every position


def _warn_of_compiling(done: int, total: int, name: str) -> None:
    if not done:
        kernels = "1 kernel" if total == 1 else f"{total} kernels"
        warn(f"compiling {kernels}, once on this machine: some seconds for each", KernelWarning)


def _floats(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32)


class CompiledOps(ReferenceOps):
    """The operations in float32, computed by compiled kernels.

    threads     number of threads; None: the number in MISTRAL_REF_THREADS, or the number of performance cores
    angles      as in ReferenceOps
    quantized_inputs    what the inputs of quantized matrices are rounded to: "int16", or "int8", which is faster
    bf16_inputs     what the inputs of bf16 matrices are rounded to: "bfloat16", which is twice as fast on processors
                that multiply pairs of bf16, or "float32": they are not rounded
    on_compile  called as on_compile(done, total, name) before each kernel that is compiled, and at the end without a
                name; None: a warning says how many are compiled

    Raises InputError if an argument cannot be used, or if Numba cannot compile.
    """

    name = "numba"
    threads: int

    def __init__(
        self,
        *,
        threads: int | None = None,
        angles: AnglePrecision = "float64",
        quantized_inputs: QuantizedInputs | None = None,
        bf16_inputs: Bf16Inputs = "float32",
        on_compile: OnCompile | None = None,
    ) -> None:
        if numba.config.DISABLE_JIT:
            raise InputError("backend is 'numba', but NUMBA_DISABLE_JIT is set; unset it, or use backend='numpy'")
        super().__init__("float32", angles=angles, quantized_inputs=quantized_inputs, bf16_inputs=bf16_inputs)
        if self.quantized_inputs == "float":
            raise InputError("quantized_inputs is 'float', which only backend='numpy' has; expected 'int16' or 'int8'")
        self.threads = chosen_threads(threads)
        self._pool = ArrayPool()
        self._on_compile = _warn_of_compiling if on_compile is None else on_compile
        # The weights that passes were prepared for, and of these passes dtype of the cache, tokens and last_only.
        self._prepared: tuple[Callable[[], Weights | None], set[tuple[str, int, bool]]] = lambda: None, set()

    def prepare(
        self, config: ModelConfig, weights: Weights, cache_dtype: str, lengths: Collection[int], *, last_only: bool
    ) -> None:
        """Compile, or read from disk, each kernel that passes of these numbers of tokens need.

        last_only   whether only the last token of a pass has logits
        """
        whose, prepared = self._prepared
        if whose() is not weights:
            prepared = set()
            self._prepared = weakref.ref(weights), prepared
        wanted = {(cache_dtype, length, last_only) for length in lengths}
        if not wanted <= prepared:
            kernels = kernel_choice.of_passes(
                config, weights, cache_dtype, lengths,
                last_only=last_only, quantized_inputs=self.quantized_inputs, bf16_inputs=self.bf16_inputs,
            )  # fmt: skip
            compiling.make(kernels, self._on_compile)
            prepared |= wanted

    def _threads_for(self, work: int, few: int) -> int:
        """Return what a kernel is given as `threads`, for so much work."""
        return 1 if work < few else team(self.threads)

    def rms_norm(self, x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
        """Return tokens scaled to unit root mean square, times the weight, by a compiled kernel."""
        x_TD = _floats(x_TD)
        y_TD = self._pool.empty(x_TD.shape)
        elementwise.rms_norm()(x_TD, weight_D, eps, y_TD, self._threads_for(x_TD.size, _FEW_NUMBERS))
        return y_TD

    def linear(self, x_TI: np.ndarray, weight_OI: Matrix) -> np.ndarray:
        """Return the product of every token with a matrix, y_TO. The kernel depends on matrix and number of tokens."""
        n_out, n_in = weight_OI.shape
        if x_TI.ndim != 2 or x_TI.shape[1] != n_in:
            raise InputError(
                f"inputs of {weight_OI.name} have shape {x_TI.shape}; expected {n_in} inputs for each token"
            )
        x_TI, n_tokens = _floats(x_TI), len(x_TI)
        y_TO = self._pool.empty((n_tokens, n_out))
        if self.rounds_to_bf16(weight_OI) and not kernel_choice.takes_pairs(weight_OI, self.bf16_inputs):
            x_TI = bf16_values(bf16_bits(x_TI))
        threads = self._threads_for(weight_OI.nbytes * n_tokens, _FEW_BYTES)
        factor = kernel_choice.factor(weight_OI, self.quantized_inputs, self.bf16_inputs)
        factor.multiply(x_TI, y_TO, threads, self._pool)
        return y_TO

    def rotate(self, x_THK: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        """Return every pair of neighbours turned by its angle, by a compiled kernel."""
        x_THK = _floats(x_THK)
        turned = self._pool.empty(x_THK.shape)
        elementwise.rotate()(x_THK, cos, sin, turned, self._threads_for(x_THK.size, _FEW_NUMBERS))
        return turned

    def new_store(self, capacity: int, n_kv_heads: int, head_dim: int, dtype: str) -> panels.PanelStore:
        """Return a store in panels, the order in which the attention kernel reads keys and values."""
        return panels.new_store(capacity, n_kv_heads, head_dim, np.dtype(dtype))

    def write(self, store: panels.PanelStore, slots: Slots, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None:
        """Put keys and values in these slots, rounded to the store's dtype, by a compiled kernel."""
        slots_T = np.arange(slots.start, slots.stop) if isinstance(slots, slice) else np.ascontiguousarray(slots)
        kernel = kernel_choice.write(store.k.dtype)
        if kernel.func is panels.write_int8:
            kernel()(*store, slots_T, _floats(k_TGK), _floats(v_TGK))
            return
        (raw,) = kernel.args
        k_TGK, v_TGK = (np.ascontiguousarray(part, store.k.dtype).view(raw) for part in (k_TGK, v_TGK))
        kernel()(store.k.view(raw), store.v.view(raw), slots_T, k_TGK, v_TGK)

    def read(self, store: panels.PanelStore, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
        """Return the keys and the values (S, G, K) in these slots; int8 is multiplied by its scales."""
        with np.errstate(invalid="ignore"):  # a scale may be infinite
            return panels.read(store, slots)

    def attend(self, q_THK: np.ndarray, view: KeyView, observed: StepFactory | None) -> Steps:
        """Attend within one sequence. One compiled kernel computes scores, softmax and sum together.

        With `observed`, NumPy computes the steps "scores" and "attention_weights" as well. The result is NumPy's if one
        of them has been edited, and else the kernel's.
        """
        if observed is not None:
            shown: list[Step] = []

            def remembered(name: str, value: np.ndarray, key_positions: range | None = None) -> Step:
                shown.append(observed(name, value, key_positions))
                return shown[-1]

            heads_THK = yield from super().attend(q_THK, view, remembered)
            if any(step.is_edited for step in shown):
                return heads_THK
        heads_THK = self._heads(q_THK, view)
        if len(q_THK) > 1 and not np.isfinite(heads_THK.sum()):
            return self._shielded(heads_THK, q_THK, view)
        return heads_THK

    def _shielded(self, heads_THK: np.ndarray, q_THK: np.ndarray, view: KeyView) -> np.ndarray:
        """Return the heads; those of a query that sees only finite keys and values are computed without the others.

        The kernel multiplies a value that a query does not see by 0, and 0 times NaN or infinity is NaN.
        """
        k_SGK, v_SGK = self.read(view.store, view.slots)
        broken_SG = ~(np.isfinite(k_SGK) & np.isfinite(v_SGK)).all(axis=2)
        visible_TS = attends(np.array(view.query_positions)[:, np.newaxis], np.array(view.key_positions), view.window)
        sees_broken_TG = visible_TS.astype(np.float32) @ broken_SG > 0
        store = panels.PanelStore(*(np.where(np.isfinite(part), part, part.dtype.type(0)) for part in view.store))
        sees_broken_TH = sees_broken_TG.repeat(q_THK.shape[1] // k_SGK.shape[1], axis=1)
        return np.where(sees_broken_TH[..., np.newaxis], heads_THK, self._heads(q_THK, view._replace(store=store)))

    def _heads(self, q_THK: np.ndarray, view: KeyView) -> np.ndarray:
        q_THK = _floats(q_THK)
        k, v, k_scales, v_scales = view.store
        store = panels.PanelStore(k.view(np.uint8), v.view(np.uint8), k_scales, v_scales)
        heads_THK = self._pool.empty(q_THK.shape)
        window = _EVERYTHING if view.window is None else view.window
        keys = attention.Keys(_segments(view), view.query_positions.start, window)
        threads = self._threads_for(q_THK.size * len(view.key_positions), 8 * _FEW_NUMBERS)
        kernel_choice.attend(k.dtype, len(q_THK), q_THK.shape[1], len(k))()(q_THK, store, keys, heads_THK, threads)
        return heads_THK

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Return the hidden units: each `up` times silu of its `gate`, by a compiled kernel."""
        gate, up = _floats(gate), _floats(up)
        hidden = self._pool.empty(gate.shape)
        threads = self._threads_for(gate.size, _FEW_NUMBERS)
        elementwise.swiglu()(gate.reshape(-1), up.reshape(-1), hidden.reshape(-1), threads)
        return hidden

    def mix_experts(
        self, y_ND: np.ndarray, tokens_N: np.ndarray, experts_N: np.ndarray, weights_TE: np.ndarray
    ) -> np.ndarray:
        """Return z_TD: for each token the sum of its experts' outputs times their shares, by a compiled kernel."""
        z_TD = self._pool.empty((len(weights_TE), y_ND.shape[1]))
        tokens_N, experts_N = (np.ascontiguousarray(indices, np.int64) for indices in (tokens_N, experts_N))
        elementwise.mix_experts()(_floats(y_ND), tokens_N, experts_N, _floats(weights_TE), z_TD)
        return z_TD


def _segments(view: KeyView) -> np.ndarray:
    """Return the runs of neighbouring slots (runs, 3): first slot, one past the last slot, position of the first key.

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
