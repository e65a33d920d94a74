"""Attention over a ring against a softmax in float64, and keys and values as they lie in their panels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.kernels import (
    UNIT,
    Past,
    assert_within,
    attended,
    each_store,
    each_tile,
    filled,
    pasts,
    seeds,
    some,
    thread_counts,
)

from mistral_kernels import attention, panels
from mistral_ref.reference_ops import to_int8


def attended_exactly(past: Past, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return heads (T, H, K) in float64, from keys and values as a store of this dtype holds them; and their error.

    The error of a score moves its weight by as large a part. Of those parts the largest is taken, and twice, since the
    sum of weights has it too; times the largest value, as large as what is averaged. Exp, its sum and the products add
    a few units. Twice what was measured.
    """
    q, k, v = (part.astype(np.float64) for part in (past.q, past.k.astype(dtype), past.v.astype(dtype)))
    _, n_heads, head_dim = q.shape
    k, v = (part.repeat(n_heads // k.shape[1], axis=1) for part in (k, v))
    scores = np.where(past.visible(), np.einsum("thi,shi->hts", q, k) / head_dim**0.5, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    score_sizes = np.where(past.visible(), np.einsum("thi,shi->hts", np.abs(q), np.abs(k)) / head_dim**0.5, 0)
    values = np.where(past.visible().any(axis=0)[:, np.newaxis, np.newaxis], np.abs(v), 0).max()
    error = UNIT * (8 + 4 * score_sizes.max(axis=-1).T) * values
    return np.einsum("hts,shi->thi", weights, v), error[..., np.newaxis]


@each_store
@each_tile
@given(pasts(), st.integers(0, 70), thread_counts)
@some
def test_attention(dtype: str, n_rows: int, past: Past, spare: int, n_threads: int) -> None:
    """With a window the ring has been gone round up to a hundred times."""
    found = attended(past, *filled(past, spare, dtype), n_rows, n_threads)
    expected, error = attended_exactly(past, dtype)
    assert_within(found, expected, error)


@pytest.mark.slow
@each_tile
@given(pasts(), st.integers(0, 70), thread_counts)
@some
def test_attention_over_keys_of_int8(n_rows: int, past: Past, spare: int, n_threads: int) -> None:
    """The store holds what NumPy's rounding gives, to the bit, and attention is that over what it holds."""
    store, slots = filled(past, spare, "int8")
    held = [(q * scales[..., np.newaxis]).astype(np.float32) for q, scales in map(to_int8, (past.k, past.v))]
    for part, expected_part in zip(panels.read(store, slots), held, strict=True):
        np.testing.assert_array_equal(part, expected_part[past.first_visible :])
    expected, error = attended_exactly(past._replace(k=held[0], v=held[1]), "float32")
    assert_within(attended(past, store, slots, n_rows, n_threads), expected, 2 * error)


@each_store
@given(pasts(most_tokens=4, most_before=1600), st.integers(0, 70), st.sampled_from([None, 511, 512, 513, 1300]))
@some
def test_attention_of_few_queries_splits_their_keys(dtype: str, past: Past, spare: int, window: int | None) -> None:
    past = past._replace(window=window)
    found = attended(past, *filled(past, spare, dtype))
    expected, error = attended_exactly(past, dtype)
    assert_within(found, expected, error)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@given(pasts(most_tokens=23, most_before=40) | pasts(most_tokens=23, most_before=1600), st.integers(0, 70), st.data())
@some
def test_a_query_of_few_has_the_bits_that_it_has_alone(dtype: str, past: Past, spare: int, data: st.DataObject) -> None:
    """Whatever is beside it, wherever the ring begins, and whether or not its keys are split."""
    past = past._replace(q=past.q[: attention.FEW_TOKENS], window=data.draw(st.sampled_from([past.window, 511, 1300])))
    store, slots = filled(past, spare, dtype)
    (n_tokens, n_heads, _), n_kv_heads = past.q.shape, past.k.shape[1]
    n_rows = attention.FEW_ROWS if n_tokens * n_heads <= n_kv_heads * attention.TOGETHER else attention.MANY_ROWS
    together = attended(past, store, slots, n_rows)
    for t in range(n_tokens):
        alone = past._replace(q=past.q[t : t + 1], k=past.k[: len(past.k) - n_tokens + t + 1])
        begin = alone.first_visible - past.first_visible
        own = slots[begin : len(alone.k) - past.first_visible]
        np.testing.assert_array_equal(attended(alone, store, own, attention.FEW_ROWS)[0], together[t])


@given(
    pasts() | pasts(most_tokens=3, most_before=1500), seeds
)  # the second: heads in pieces, put together by one or by all
@some
def test_threads_do_not_change_a_bit_of_attention(past: Past, seed: int) -> None:
    ring = filled(past, seed % 70, "float32")
    alone = attended(past, *ring)
    for n_threads in (2, 3, 4, 7):
        np.testing.assert_array_equal(attended(past, *ring, n_threads=n_threads), alone)


@each_store
@given(pasts(most_tokens=1, most_before=600), st.integers(0, 70))
@some
def test_one_query_hears_nothing_of_what_it_does_not_see(dtype: str, past: Past, spare: int) -> None:
    """Keys before the window, in slots that have not been used again, and slots that have never been used."""
    expected = attended(past, *filled(past, spare, dtype))
    past.k[: past.first_visible] = past.v[: past.first_visible] = np.nan
    store, slots = filled(past, spare, dtype)
    unseen = np.setdiff1d(np.arange(store.v.shape[1] * panels.BLOCK), slots)
    panels.write(store.k.dtype.name if dtype == "float32" else "uint16")(
        *(part if dtype == "float32" else part.view(np.uint16) for part in store[:2]),
        unseen,
        *np.full((2, len(unseen), *past.k.shape[1:]), np.nan, dtype).view("f4" if dtype == "float32" else "u2"),
    )
    np.testing.assert_array_equal(attended(past, store, slots), expected)


@pytest.mark.parametrize("is_key", [True, False], ids=["key", "value"])
@given(pasts(), st.integers(0, 70), st.data())
@some
def test_nan_in_a_key_or_value_reaches_the_heads_that_see_it(
    is_key: bool, past: Past, spare: int, data: st.DataObject
) -> None:
    """A key that is NaN makes NaN of whole heads, a number of a value makes NaN of one number in each head.

    A value may also reach other queries of the same pass, because the kernel multiplies it by 0 for them. CompiledOps
    computes these queries again (tests/test_nan_containment.py).
    """
    key, g = data.draw(st.integers(0, len(past.k) - 1)), data.draw(st.integers(0, past.k.shape[1] - 1))
    i = data.draw(st.integers(0, past.k.shape[2] - 1))
    (past.k if is_key else past.v)[key, g, i] = np.nan
    n_heads, n_kv_heads = past.q.shape[1], past.k.shape[1]
    of_group = np.arange(n_heads) // (n_heads // n_kv_heads) == g
    of_key_HK = of_group[:, np.newaxis] & (is_key | (np.arange(past.k.shape[2]) == i))
    sees_T = past.visible()[:, key]
    found = np.isnan(attended(past, *filled(past, spare, "float32")))
    np.testing.assert_array_equal(found[sees_T], np.broadcast_to(of_key_HK, found[sees_T].shape))
    assert not found[~sees_T].any() if is_key else not np.any(found & ~of_key_HK)


@each_store
@given(st.integers(1, 200), st.integers(1, 4), st.integers(1, 40), seeds)
@some
def test_a_store_gives_back_what_was_written_last(
    dtype: str, capacity: int, n_kv_heads: int, half: int, seed: int
) -> None:
    head_dim, random = half, np.random.RandomState(seed)
    store = panels.new_store(capacity, n_kv_heads, head_dim, np.dtype(dtype))
    expected = np.zeros((2, capacity, n_kv_heads, head_dim), dtype)
    raw = "float32" if dtype == "float32" else "uint16"
    for _ in range(3):
        slots = random.randint(0, capacity, random.randint(1, 9))
        new = random.normal(size=(2, len(slots), n_kv_heads, head_dim)).astype(dtype)
        panels.write(raw)(store.k.view(raw), store.v.view(raw), slots, *new.view(raw))
        for n, slot in enumerate(slots):
            expected[:, slot] = new[:, n]
    np.testing.assert_array_equal(panels.read(store, slice(0, capacity)), expected)
    some_slots = random.randint(0, capacity, 5)
    np.testing.assert_array_equal(panels.read(store, some_slots), expected[:, some_slots])
