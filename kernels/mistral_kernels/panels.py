"""How the keys and values of one layer lie in memory: in panels, as `tile` reads them, one head after the other.

    k[g, slot // PANEL, i, slot % PANEL]                        i < K
    v[g, slot // BLOCK, i // PANEL, slot % BLOCK, i % PANEL]    i < K, rounded up to whole panels

An int8 store holds whole numbers from -127 to 127, and for each head's key and value a scale to multiply them by.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types

from mistral_kernels.arrays import HEADS_IN, INDICES, MATRIX_OUT, Floats, Integers, Kernel, read_only, written
from mistral_kernels.compiling import kernel, made_once, part
from mistral_kernels.pool import aligned
from mistral_kernels.processor import LANES

BLOCK = 64
PANEL = 2 * LANES


class PanelStore(NamedTuple):
    """Keys and values of one layer in panels.

    k       (G, ceil(capacity / BLOCK) * BLOCK / PANEL, K, PANEL)
    v       (G, ceil(capacity / BLOCK), ceil(K / PANEL), BLOCK, PANEL)
    k_scales, v_scales    the scale of each slot's int8 numbers, float32 (G, ceil(capacity / BLOCK) * BLOCK)
    """

    k: np.ndarray
    v: np.ndarray
    k_scales: np.ndarray
    v_scales: np.ndarray


def new_store(capacity: int, n_kv_heads: int, head_dim: int, dtype: np.dtype[Any]) -> PanelStore:
    """Return room for `capacity` slots, all zeros."""
    n_blocks, n_panels = -(-capacity // BLOCK), -(-head_dim // PANEL)
    n_scales = n_blocks * BLOCK if dtype == np.int8 else 0

    def zeros(*shape: int) -> np.ndarray:
        return aligned(math.prod(shape) * dtype.itemsize, np.zeros).view(dtype).reshape(shape)

    return PanelStore(
        zeros(n_kv_heads, n_blocks * (BLOCK // PANEL), head_dim, PANEL),
        zeros(n_kv_heads, n_blocks, n_panels, BLOCK, PANEL),
        np.zeros((n_kv_heads, n_scales), np.float32),
        np.zeros((n_kv_heads, n_scales), np.float32),
    )


def read(store: PanelStore, slots: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys and values (S, G, K) in these slots, float32 if they are int8."""
    n_kv_heads, n_panels, head_dim, _ = store.k.shape
    slots = np.arange(n_panels * PANEL)[slots]
    v = store.v[:, slots // BLOCK, :, slots % BLOCK].reshape(len(slots), n_kv_heads, store.v.shape[2] * PANEL)
    k, v = store.k[:, slots // PANEL, :, slots % PANEL], v[..., :head_dim]
    if store.k.dtype != np.int8:
        return k, v
    return k * store.k_scales[:, slots].T[..., np.newaxis], v * store.v_scales[:, slots].T[..., np.newaxis]


@made_once
def write(dtype: str) -> Kernel:
    """Return a kernel: write(k_store, v_store, slots, k, v) puts k and v (T, G, K) in their slots.

    dtype is "float32", or "uint16" for any numbers of 16 bits.
    """
    element = types.float32 if dtype == "float32" else types.uint16
    heads = read_only(element, 3)

    @kernel(
        types.void(written(element, 4), written(element, 5), INDICES, heads, heads),
        dtype,
    )
    def write(k_store: np.ndarray, v_store: np.ndarray, slots: Integers, k: Floats, v: Floats) -> None:
        n_tokens, n_kv_heads, head_dim = k.shape
        for t in range(n_tokens):
            slot = slots[t]
            for g in range(n_kv_heads):
                for i in range(head_dim):
                    k_store[g, slot // PANEL, i, slot % PANEL] = k[t, g, i]
                    v_store[g, slot // BLOCK, i // PANEL, slot % BLOCK, i % PANEL] = v[t, g, i]

    return write


@made_once
def write_int8() -> Kernel:
    """Return a kernel: write_int8(k_store, v_store, k_scales, v_scales, slots, k, v) rounds k and v (T, G, K) to int8.

    x becomes scale q, where q is the nearest whole number from -127 to 127 and scale is max |x| / 127 over a head. The
    last 8 bits of a scale's mantissa are rounded up: rounding a second time then changes nothing.
    """

    @part()
    def scale_of(x: Floats, scales: Floats, bits: Integers, g: int, slot: int) -> float:
        largest = numba.float32(0)
        for i in range(len(x)):
            size = abs(x[i])
            if size > largest or math.isnan(size):  # nothing is larger than NaN, so it stays
                largest = size
        scales[g, slot] = largest / numba.float32(127)
        bits[g, slot] = (bits[g, slot] + numba.uint32(0xFF)) & numba.uint32(0xFFFFFF00)
        return scales[g, slot]

    @part()
    def nearest(x: float, scale: float) -> int:
        q = np.rint(x / scale)
        return numba.int8(q) if -127 <= q <= 127 else numba.int8(0)  # 0 / 0, or what is no number

    @kernel(
        types.void(
            written(types.int8, 4), written(types.int8, 5), MATRIX_OUT, MATRIX_OUT, INDICES, HEADS_IN,
            HEADS_IN,
        ),
    )  # fmt: skip
    def write_int8(
        k_store: np.ndarray, v_store: np.ndarray, k_scales: Floats, v_scales: Floats, slots: Integers, k: Floats,
        v: Floats,
    ) -> None:  # fmt: skip
        n_tokens, n_kv_heads, head_dim = k.shape
        k_bits, v_bits = k_scales.view(np.uint32), v_scales.view(np.uint32)
        for t in range(n_tokens):
            slot = slots[t]
            for g in range(n_kv_heads):
                k_scale = scale_of(k[t, g], k_scales, k_bits, g, slot)
                v_scale = scale_of(v[t, g], v_scales, v_bits, g, slot)
                for i in range(head_dim):
                    k_store[g, slot // PANEL, i, slot % PANEL] = nearest(k[t, g, i], k_scale)
                    v_store[g, slot // BLOCK, i // PANEL, slot % BLOCK, i % PANEL] = nearest(v[t, g, i], v_scale)

    return write_int8
