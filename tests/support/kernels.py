"""What the tests of compiled kernels share: sizes, matrices stored in every way, products, and attention over a ring.

MISTRAL_REF_EXAMPLES says how many examples each property gets; with ten or fewer not all kernels for quantized weights
are compiled.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from support.checkpoints import to_bfloat16
from support.marks import slow, slow_but

from mistral_kernels import attention, elementwise, panels, quantized
from mistral_kernels.arrays import Kernel
from mistral_kernels.matmul import DEPTH, matmul, slab_shape
from mistral_kernels.matvec import FEW, ONE, matvec
from mistral_kernels.processor import LANES
from mistral_kernels.quantized import TOGETHER, matmul_quantized, matvec_quantized, slab_shapes
from mistral_kernels.team import Team, team
from mistral_kernels.tile import WIDTH
from mistral_ref.files.quantized_format import quantized_tensors
from mistral_ref.quantized_matrix import QuantizedMatrix
from mistral_ref.weights import FP8_BLOCK, Matrix, e4m3_values

UNIT = 2.0**-24  # what one rounding to float32 changes at most, as a part of the number
EXAMPLES = int(os.environ.get("MISTRAL_REF_EXAMPLES", "40"))
some = settings(max_examples=EXAMPLES)
seeds = st.integers(0, 2**32 - 1)
thread_counts = st.sampled_from([1, 2, 3, 7])


def sizes(most: int, *borders: int) -> st.SearchStrategy[int]:
    """Draw a size up to `most`, and as often one beside those at which a kernel changes its way."""
    beside = sorted({border + more for border in borders for more in (-1, 0, 1) if border + more >= 1})
    return st.integers(1, most) | st.sampled_from(beside)


token_counts = sizes(40, 2, 4, 8)
output_counts = sizes(70, 8, 16, WIDTH, 2 * WIDTH, FP8_BLOCK, 2 * FP8_BLOCK)
input_counts = sizes(300, 8, LANES, 2 * LANES, 4 * LANES, FP8_BLOCK, DEPTH)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).normal(size=shape).astype(np.float32)


class Shares:
    """Who does what a kernel shares out."""

    alone = Team()  # of no thread but the caller's: on a busy machine tests would wait for others
    run_at_once = False


def shared(n_threads: int) -> int:
    """Return what a kernel is given as `threads`, to cut its work as for n threads."""
    if n_threads == 1:
        return 1
    return team(n_threads) if Shares.run_at_once else Shares.alone.sized(n_threads)


def assert_within(found: np.ndarray, exact: np.ndarray, error: np.ndarray) -> None:
    """Fail where `found` is further from `exact` than `error` allows, and say by what factor at most."""
    factor = np.abs(found - exact) / np.maximum(error, np.finfo(np.float32).tiny)
    assert factor.max(initial=0) <= 1, np.unravel_index(factor.argmax(), factor.shape)


KINDS = ("f32", "f16", "bf16", "fp8", "fp8 blocks")
PAIRS = "bf16 pairs"  # a matrix whose inputs are rounded to bf16
ALL_STORED = (*KINDS, PAIRS)
WAYS = ("one", "few", "many")  # to multiply: token by token, a few at once, or many


def every_way(all_stored: Iterable[str]) -> pytest.MarkDecorator:
    """Try every way of products with matrices that are stored so.

    Pairs are made only where somebody asks for them (bf16_inputs="bfloat16"), and are slow.
    """
    tried = itertools.product(all_stored, WAYS)
    marks = {stored: () if stored in KINDS else pytest.mark.slow for stored in all_stored}
    return pytest.mark.parametrize(("stored", "way"), [pytest.param(*one, marks=marks[one[0]]) for one in tried])


each_product = every_way(ALL_STORED)
each_quantized_product = pytest.mark.parametrize("one_by_one", [True, False], ids=["one", "many"])


def as_stored(stored: str, values: np.ndarray, seed: int = 0) -> Matrix:
    """Return a matrix of a kind that holds about these values, the fp8 ones times scales of its own.

    Its name says how it is stored, and whether products take pairs of it.
    """
    kind, _, variant = stored.partition(" ")
    scale = None
    if kind == "f32":
        data = values
    elif kind == "f16":
        data = values.astype(np.float16)
    elif kind == "bf16":
        data = to_bfloat16(values)
    else:
        positive = e4m3_values()[:127]
        codes = np.searchsorted((positive[1:] + positive[:-1]) / 2, np.abs(values))
        codes = np.where(np.isnan(values), 127, codes)
        data = np.where(values < 0, codes + 128, codes).astype(np.uint8)
        grid = tuple(-(-size // FP8_BLOCK) for size in values.shape) if variant else (1, 1)
        scale = np.random.RandomState(seed).uniform(0.5, 2, grid).astype(np.float32)
    return Matrix(stored, kind, data, scale)


def random_matrix(stored: str, n_out: int, n_in: int, seed: int) -> Matrix:
    """Return random numbers of very different sizes, some of them subnormal in 16 bits."""
    spread = np.random.RandomState(seed ^ 1).choice([1, 1, 1, 2.0**-9, 2.0**-22], (n_out, n_in))
    return as_stored(stored, normal(seed, n_out, n_in) * spread.astype(np.float32), seed)


def product(
    matrix: Matrix, x_TI: np.ndarray, n_threads: int = 1, *, way: str, into: np.ndarray | None = None
) -> np.ndarray:
    """Return x · Wᵀ by one of the ways."""
    y_TO = np.full((len(x_TI), matrix.shape[0]), np.nan, np.float32) if into is None else into
    scale = np.ones((1, 1), np.float32) if matrix.scale is None else matrix.scale
    kind = "pairs" if matrix.name == PAIRS else matrix.kind
    if way == "few":
        matvec(kind, FEW)(matrix.as_bytes, scale, x_TI, y_TO, shared(n_threads))
        return y_TO
    if way == "many":
        slabs = np.full(slab_shape(kind, *x_TI.shape), np.nan, np.float32)
        matmul(kind)(matrix.as_bytes, scale, x_TI, slabs, y_TO, shared(n_threads))
        return y_TO
    for t in range(len(x_TI)):
        matvec(kind, ONE)(matrix.as_bytes, scale, x_TI[t : t + 1], y_TO[t : t + 1], shared(n_threads))
    return y_TO


def possible_inputs(stored: str, n_in: int) -> int:
    """Return a number of inputs, n_in or the next, that rows stored so can have: whole pairs."""
    return n_in + n_in % 2 if stored == PAIRS else n_in


class How(NamedTuple):
    """What one of these kernels is made for."""

    bits: int
    inputs: str
    group: int

    def __str__(self) -> str:
        return "-".join(map(str, self))


EVERY_WAY = [How(*one) for one in itertools.product((8, 4), ("int16", "int8"), (32, 64, 128))]
# All bits with all inputs, and all sizes of groups: each takes seconds to compile. The first has the largest sums.
SOME_WAYS = [How(8, "int16", 128), How(8, "int8", 32), How(4, "int16", 32), How(4, "int8", 64)]


def usual_first(ways: list[How]) -> list[Any]:
    """Return ways as parameters. Groups of 32, the default of `quantize`, are tried each time; the others are slow."""
    return slow_but([str(how) for how in ways if how.group == 32], {str(how): how for how in ways})


each_way = pytest.mark.parametrize("how", usual_first(EVERY_WAY if EXAMPLES > 10 else SOME_WAYS))
each_of_some_ways = pytest.mark.parametrize("how", usual_first(SOME_WAYS))
quantized_input_counts = sizes(300, 32, 64, 128, quantized.DEPTH, 2 * quantized.DEPTH)


def any_quantized(how: How, n_out: int, n_in: int, seed: int) -> QuantizedMatrix:
    """Return a matrix of any codes, zeros and scales: a file may hold them all."""
    random = np.random.RandomState(seed)
    parts = quantized_tensors(n_out, n_in, how.bits, how.group)
    both, data = (random.randint(0, 256, parts[name].shape).astype(np.uint8) for name in ("scales", "weight"))
    unit = np.float32(random.choice([2.0**-9, 1, 2.0**5]))
    return QuantizedMatrix("w", f"int{how.bits}", data, scales=both, unit=unit, n_out=n_out, n_in=n_in)


def any_inputs(seed: int, n_tokens: int, n_in: int) -> np.ndarray:
    """Return inputs: some are much larger than their neighbours, and some stretches are 0."""
    random = np.random.RandomState(seed)
    x_TI = random.normal(size=(n_tokens, n_in)) * random.choice([1, 1, 1, 1e-3, 40], (n_tokens, n_in))
    start = random.randint(0, n_in)
    x_TI[:, start : start + 70] *= random.choice([0, 1, 1, 1e-6], (n_tokens, 1))
    return x_TI.astype(np.float32)


def rounded_product(
    makers: tuple[Kernel, Kernel],
    stored: tuple[Any, ...],
    rounding: tuple[str, int],
    x_TI: np.ndarray,
    n_out: int,
    n_threads: int = 1,
    *,
    one_by_one: bool,
    into: np.ndarray | None = None,
) -> np.ndarray:
    """Return x · Wᵀ by the first of two kernels, token by token, or by the second, whose workspaces hold anything.

    stored      the matrix as both take it
    rounding    what inputs are rounded to, and how many share a scale
    """
    (one, many), (inputs, group), threads = makers, rounding, shared(n_threads)
    y_TO = np.full((len(x_TI), n_out), np.nan, np.float32) if into is None else into
    if not one_by_one:
        q_shape, scales_shape = slab_shapes(group, *x_TI.shape)
        q, scales_x = np.full(q_shape, 99, inputs), np.full(scales_shape, np.nan, np.float32)
        many()(*stored, x_TI, q, scales_x, y_TO, threads)
        return y_TO
    for t in range(len(x_TI)):
        one()(*stored, x_TI[t : t + 1], y_TO[t : t + 1], threads)
    return y_TO


def few_together(how: tuple[str, str, int], stored: tuple[Any, ...], x_TI: np.ndarray, n_out: int) -> np.ndarray:
    """Return x · Wᵀ by matvec_quantized for a few tokens, of codes in tile order."""
    y_TO = np.full((len(x_TI), n_out), np.nan, np.float32)
    n_together = min((n for n in TOGETHER if n >= len(x_TI)), default=max(TOGETHER))
    matvec_quantized(*how, n_together)(*stored, x_TI, y_TO, shared(1))
    return y_TO


def quantized_product(
    how: How, matrix: QuantizedMatrix, x_TI: np.ndarray, n_threads: int = 1, **options: Any
) -> np.ndarray:
    """Return x · Wᵀ by matvec_quantized, token by token, or by matmul_quantized."""
    kernels = f"int{how.bits}", how.inputs, how.group
    makers = partial(matvec_quantized, *kernels, 1), partial(matmul_quantized, *kernels)
    stored = matrix.as_bytes, matrix.scale_bytes, matrix.unit
    return rounded_product(makers, stored, (how.inputs, how.group), x_TI, matrix.shape[0], n_threads, **options)


class Past(NamedTuple):
    """What a pass of attention is given: queries at positions start, start + 1, ..., and all keys and values so far."""

    q: np.ndarray  # (T, H, K)
    k: np.ndarray  # (S, G, K)
    v: np.ndarray  # (S, G, K)
    window: int | None

    @property
    def positions(self) -> range:
        return range(len(self.k) - len(self.q), len(self.k))

    @property
    def first_visible(self) -> int:
        return 0 if self.window is None else max(0, self.positions.start - self.window + 1)

    def visible(self) -> np.ndarray:
        """Return which query sees which key, (T, S)."""
        distance = np.array(self.positions)[:, np.newaxis] - np.arange(len(self.k))
        return (distance >= 0) & (distance < (self.window or len(self.k)))


@st.composite
def pasts(draw: st.DrawFn, most_tokens: int = 40, most_before: int = 150) -> Past:
    """Draw shapes that are multiples of nothing; scores from flat to so sharp that one key takes all."""
    n_kv_heads, group, head_dim = draw(st.integers(1, 5)), draw(st.integers(1, 5)), 2 * draw(st.integers(1, 20))
    n_tokens = draw(sizes(most_tokens, 1, attention.TOGETHER // group))
    n_keys = n_tokens + draw(st.integers(0, most_before))
    seed, sharpness = draw(seeds), draw(st.sampled_from([0.3, 1, 5]))
    return Past(
        normal(seed, n_tokens, n_kv_heads * group, head_dim) * np.float32(sharpness),
        *normal(seed ^ 1, 2, n_keys, n_kv_heads, head_dim),
        draw(st.none() | sizes(100, panels.BLOCK, panels.PANEL)),
    )


def filled(past: Past, spare: int, dtype: str) -> tuple[panels.PanelStore, np.ndarray]:
    """Return a ring, with `spare` slots more than it needs, after all keys and values have gone through it, and the
    slots of those that the queries see.
    """
    n_seen = len(past.k) - past.first_visible
    capacity = spare + (n_seen if past.window is None else past.window + len(past.q) - 1)
    store = panels.new_store(capacity, *past.k.shape[1:], np.dtype(dtype))
    raw = "float32" if dtype == "float32" else "uint16"
    slots = np.arange(len(past.k)) % capacity
    if dtype == "int8":
        panels.write_int8()(*store, slots, past.k, past.v)
        return store, slots[past.first_visible :]
    k, v = (part.astype(dtype).view(raw) for part in (past.k, past.v))
    panels.write(raw)(store.k.view(raw), store.v.view(raw), slots, k, v)
    return store, slots[past.first_visible :]


def segments_of(slots: np.ndarray, first_position: int) -> np.ndarray:
    """Return the runs of neighbouring slots as the kernel takes them; a ring has one or two."""
    starts = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist()]
    ends = [*starts[1:], len(slots)]
    return np.array([[slots[a], slots[b - 1] + 1, first_position + a] for a, b in zip(starts, ends, strict=True)])


def attended(
    past: Past,
    store: panels.PanelStore,
    slots: np.ndarray,
    n_rows: int = attention.MANY_ROWS,
    n_threads: int = 1,
    into: np.ndarray | None = None,
) -> np.ndarray:
    """Return heads (T, H, K) as the kernel computes them."""
    heads = np.full_like(past.q, np.nan) if into is None else into
    attention.attention({"float32": "f32", "float16": "f16", "int8": "int8"}[store.k.dtype.name], n_rows)(
        past.q,
        panels.PanelStore(store.k.view(np.uint8), store.v.view(np.uint8), store.k_scales, store.v_scales),
        attention.Keys(segments_of(slots, past.first_visible), past.positions.start, past.window or 2**62),
        heads,
        shared(n_threads),
    )
    return heads


each_store = pytest.mark.parametrize("dtype", ["float32", *slow(["float16"])])
each_tile = pytest.mark.parametrize("n_rows", [attention.FEW_ROWS, attention.MANY_ROWS], ids=["few_rows", "many_rows"])


def gated(gate: np.ndarray, up: np.ndarray, n_threads: int = 1) -> np.ndarray:
    hidden = np.full_like(gate, np.nan)
    elementwise.swiglu()(gate, up, hidden, shared(n_threads))
    return hidden
