"""The ring: whatever has been done to a cache, the logits are those of the whole sequence in one pass."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.cache_machine import CLOSE, config_with, run_cache_machine, whole
from support.checkpoints import FAMILIES
from support.errors import refused, warned
from support.tiny import chunkings, configs, model_of, tokens_for

import mistral_ref
from mistral_ref import CacheError, InputError
from mistral_ref.files.json_file import MAX_JSON_BYTES
from mistral_ref.reference_ops import to_int8


@settings(max_examples=60)
@given(st.data())
def test_any_split_into_calls_gives_the_same_logits(data: st.DataObject) -> None:
    config = data.draw(configs())
    chunk, n_tokens = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 60))
    model, tokens = model_of(config, dtype="float64"), tokens_for(config, n_tokens)
    cache = model.new_cache(chunk=chunk)
    parts, done = [], 0
    for length in data.draw(chunkings(n_tokens, 2 * chunk)):
        parts.append(model.forward(tokens[done : done + length], cache))
        done += length
    np.testing.assert_allclose(np.concatenate(parts), whole(model, tokens), **CLOSE)


def test_long_after_the_ring_has_wrapped() -> None:
    model = model_of(config_with(window=3), dtype="float64")
    tokens = tokens_for(model.config, 400)
    cache = model.new_cache(chunk=2)
    logits = np.concatenate([model.forward(tokens[i : i + 2], cache) for i in range(0, 400, 2)])
    assert [ring.capacity for ring in cache.rings] == [4, 4]
    np.testing.assert_allclose(logits, whole(model, tokens), **CLOSE)


def test_a_token_changes_exactly_the_next_window_minus_one_tokens() -> None:
    model = model_of(config_with(window=4, n_layers=1), dtype="float64")
    tokens = tokens_for(model.config, 20)
    changed = [*tokens[:9], (tokens[9] + 1) % 13, *tokens[10:]]
    differs = np.abs(whole(model, tokens) - whole(model, changed)).max(axis=1) > 0
    assert np.flatnonzero(differs).tolist() == [9, 10, 11, 12]


def test_any_order_of_operations(tmp_path: Path) -> None:
    run_cache_machine(tmp_path, {"dtype": "float64"}, CLOSE, max_examples=60)


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_the_last_chunk_of_tokens_can_be_taken_back_and_no_more(chunk: int) -> None:
    model = model_of(config_with(window=4), dtype="float64")
    tokens = tokens_for(model.config, 40)
    cache = model.new_cache(chunk=chunk)
    model.forward(tokens, cache)
    with refused(CacheError, 40 - chunk - 1, "overwritten"):
        cache.truncate(40 - chunk - 1)
    assert cache.length == 40
    cache.truncate(40 - chunk)
    again = model.forward(tokens[40 - chunk :], cache)
    np.testing.assert_allclose(again, whole(model, tokens)[40 - chunk :], **CLOSE)


def test_without_a_window_everything_can_be_taken_back() -> None:
    model = model_of(config_with(window=None), dtype="float64")
    tokens = tokens_for(model.config, 300)
    cache = model.new_cache()
    model.forward(tokens, cache)
    assert {ring.capacity for ring in cache.rings} == {512}  # grown by doubling
    cache.truncate(7)
    np.testing.assert_allclose(model.forward(tokens[7:20], cache), whole(model, tokens[:20])[7:], **CLOSE)


def test_memory_stays_at_window_plus_chunk_minus_one() -> None:
    model = model_of(config_with(window=70))
    cache = model.new_cache(chunk=30)
    predicted = cache.bytes_for(10_000)
    for _ in range(10):
        model.forward(tokens_for(model.config, 40), cache)
    assert predicted == cache.bytes_for(cache.length) == sum(r.store.k.nbytes + r.store.v.nbytes for r in cache.rings)
    assert {ring.capacity for ring in cache.rings} == {99}


def test_a_cache_of_int8_is_a_quarter_of_the_memory_and_close() -> None:
    """And growing it, which reads and writes what it holds, changes nothing."""
    model = model_of(config_with(window=100))
    tokens = tokens_for(model.config, 150)
    small, full = model.new_cache(dtype="int8", chunk=5), model.new_cache(chunk=5)
    assert small.bytes_for(150) * 4 * 6 == full.bytes_for(150) * (6 + 4)  # float32, heads of 6, and a step for each
    logits, rounded = model.forward(tokens, full), model.forward(tokens, small)
    # Half a step in 127 is as much as 2^-8, eight times what float16 rounds off above.
    assert 0 < np.abs(rounded - logits).max() < 0.8
    large = model.new_cache(dtype="int8", chunk=5)
    for ring in large.rings:
        large._grow(ring, ring.capacity_for(150))
    assert np.array_equal(model.forward(tokens, large), rounded)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_cache_of_int4_is_refused_with_the_reason(backend: str) -> None:
    with refused(InputError, "dtype", "'int4'", 15):
        mistral_ref.load(backend=backend).new_cache(dtype="int4")


@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1e-3, 1.0, 1e30]))
def test_keys_of_int8_are_off_by_half_a_step_and_stay_when_rounded_again(seed: int, size: float) -> None:
    x_TGK = (np.random.default_rng(seed).standard_normal((3, 2, 5)) * size).astype(np.float32)
    x_TGK[0, 0] = 0
    q, scales = to_int8(x_TGK)
    assert scales[0, 0] == 0
    assert np.all(np.abs(x_TGK).max(axis=-1) <= 127 * scales.astype(np.float64))
    values = q * scales[..., np.newaxis]
    assert np.all(np.abs(values - x_TGK) <= 0.5000001 * scales[..., np.newaxis])
    again, same = to_int8(values)
    assert np.array_equal(again * same[..., np.newaxis], values)


def test_float16_cache_is_half_the_memory_and_close() -> None:
    model = model_of(config_with(window=5))
    tokens = tokens_for(model.config, 30)
    half, full = model.new_cache(dtype="float16"), model.new_cache()
    logits, rounded = model.forward(tokens, full), model.forward(tokens, half)
    assert 2 * half.bytes_for(30) == full.bytes_for(30)
    # The keys' rounding, 2^-11 of scores of around 10, moves these logits of up to 8 by less than a tenth.
    assert 0 < np.abs(rounded - logits).max() < 0.1


def test_two_walks_on_one_cache_do_not_mix() -> None:
    model = model_of(config_with(window=3))
    cache = model.new_cache()
    first = model.steps([1, 2], cache)
    next(first)
    model.forward([3], cache)
    with refused(CacheError, "cache", "pass"):
        list(first)
    assert cache.length == 1


def test_a_call_that_cannot_end_does_not_begin() -> None:
    model = model_of(config_with(window=3))
    cache = model.new_cache(max_tokens=10, chunk=4)
    with refused(CacheError, "12 tokens", 10, "max_tokens"):
        model.forward([1] * 12, cache)
    assert cache.length == 0


def test_an_abandoned_cache_is_freed_at_once() -> None:
    model = model_of(config_with(window=3))
    cache = model.new_cache()
    walk = model.steps([1, 2], cache)
    next(walk)
    walk.close()
    freed = weakref.ref(cache)
    del walk, cache
    assert freed() is None


def test_limits_are_errors() -> None:
    model, other = model_of(config_with(window=3)), model_of(config_with(window=3))
    with refused(CacheError, "6 tokens", 5, "max_tokens"):
        model.forward([1] * 6, model.new_cache(max_tokens=5))
    with refused(CacheError, "3 tokens", 2, "chunk"):
        model.steps([1, 2, 3], model.new_cache(chunk=2))
    with refused(CacheError, "another model"):
        model.forward([1], other.new_cache())
    with refused(InputError, "cache", "'x'"):
        model.forward([1], "x")
    for bad in ({"chunk": 0}, {"chunk": True}, {"max_tokens": -1}, {"max_tokens": 2.0}, {"dtype": "int4"}):
        with refused(InputError, *bad, *map(repr, bad.values())):
            model.new_cache(**bad)
    for length in (-1, 1, True, 0.0):
        with refused(InputError, "length", repr(length)):
            model.new_cache().truncate(length)


def test_a_saved_cache_can_be_taken_up_in_another_dtype_and_row_order(tmp_path: Path) -> None:
    model, path = model_of(config_with(window=3)), tmp_path / "cache.safetensors"
    cache, tokens = model.new_cache(chunk=2), tokens_for(model.config, 20)
    model.forward(tokens[:15], cache)
    cache.save(path)
    oracle = model_of(config_with(window=3), dtype="float64")
    taken_up = oracle.load_cache(path)
    assert (taken_up.length, taken_up.chunk, taken_up.dtype) == (15, 2, "float64")
    exact = whole(oracle, tokens)[15:]
    np.testing.assert_allclose(oracle.forward(tokens[15:], taken_up), exact, rtol=0, atol=1e-4)
    other_rows = model_of(model.config.replace(rope_row_order="halves"))
    assert other_rows.load_cache(path).length == 15


def test_a_saved_cache_is_checked_when_it_is_loaded(tmp_path: Path) -> None:
    model, path = model_of(config_with(window=3)), tmp_path / "cache.safetensors"
    cache = model.new_cache(chunk=2)
    model.forward([1, 2, 3, 4, 5, 6, 7], cache)
    cache.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cache.safetensors"]
    tensors = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()

    def rejected(tensors: dict[str, np.ndarray], metadata: dict[str, str], *facts: object) -> None:
        save_file(tensors, path, metadata)
        with refused(CacheError, *facts):
            model.load_cache(path)

    for cut in (
        {name: values[3:] for name, values in tensors.items() if name != "tokens"},
        {name: values[:, :1] for name, values in tensors.items() if name != "tokens"},
    ):
        rejected(cut | {"tokens": tensors["tokens"]}, metadata, "keys", "values", cut["layers.0.k"].shape, "7 tokens")
    rejected(tensors, {}, path)
    rejected({}, metadata, path)
    settings_key = next(key for key in metadata if key != "config")
    shape = tensors["layers.0.k"].shape
    rejected(tensors | {"tokens": tensors["tokens"][:3]}, metadata, path, "keys", "values", shape, "3 tokens")
    for ids, facts in (
        (np.int32([1, 2, 3, 4, 5, 6, 7]), ("I32", "I64")),
        (np.int64([[1, 2, 3, 4, 5, 6, 7]]), ("(1, 7)", "one axis")),
        (np.int64([1, 2, 3, 13, 5, 6, 7]), (13, "0 to 12")),
        (np.int64([1, 2, -3, 4, 5, 6, 7]), (-3, "0 to 12")),
    ):
        rejected(tensors | {"tokens": ids}, metadata, path, "tokens", *facts)
    for name in tensors:
        rejected({other: values for other, values in tensors.items() if other != name}, metadata, path, name)
    for bad, facts in (({"chunk": 0}, (path, "chunk", 0)), ({"max_tokens": 3}, (path, "7 tokens"))):
        rejected(tensors, metadata | {settings_key: json.dumps(json.loads(metadata[settings_key]) | bad)}, *facts)
    rejected(tensors, {"mistral_ref.cache.v1": "{}", "config": metadata["config"]}, path, "0.1.0", "token ids")
    for broken in ("5", "[" * 100_000, '{"chunk"'):
        rejected(tensors, metadata | {settings_key: broken}, path)
    path.write_bytes(struct.pack("<Q", 50_000_000))
    os.truncate(path, 50_000_008)
    tracemalloc.start()
    with refused(CacheError, path, "header", MAX_JSON_BYTES):
        model.load_cache(path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    save_file(tensors, path, metadata)
    with refused(CacheError, path, "another configuration", "sliding_window[0]", 3, 4):
        model_of(config_with(window=4)).load_cache(path)
    path.write_bytes(path.read_bytes()[:-1])
    with refused(CacheError, path, "damaged"):
        model.load_cache(path)
    path.unlink()
    os.mkfifo(path)  # which would be waited for
    with refused(CacheError, path, "regular file"):
        model.load_cache(path)
    with refused(CacheError, tmp_path / "absent"):
        model.load_cache(tmp_path / "absent")
    with refused(CacheError, tmp_path / "absent" / "cache.safetensors", "written"):
        cache.save(tmp_path / "absent" / "cache.safetensors")


def test_a_kept_copy_is_gone_back_to_where_the_ring_has_wrapped() -> None:
    """Many questions about one document: each costs its own tokens, and the first copy is dropped at the fifth."""
    model = model_of(FAMILIES["dense_windowed"].config, dtype="float64")  # a window of 5
    document, cache = tokens_for(model.config, 40), model.new_cache(chunk=4)
    model.forward(document, cache)
    cache.keep()
    for seed in range(1, 5):
        question = [*document, *tokens_for(model.config, 9, seed)]
        assert cache.keep_shared(question[:-1]) == 40
        found = model.forward(question[40:], cache, last_only=True)
        np.testing.assert_allclose(found, model.forward(question, last_only=True), atol=1e-9)
        model.forward(tokens_for(model.config, 20), cache)  # an answer: the ring wraps
    twin = cache.copy()
    for _ in range(4):
        twin.keep()
    with warned("40 tokens", "40 tokens are read again", "keep()"):
        assert twin.keep_shared([*document, 1]) == 0
    assert cache.keep_shared([*document, 1]) == 40  # a copy of a cache has its own list
    with warned("20 tokens", "overwritten"):
        assert cache.keep_shared(document[:20]) == 0


def test_without_windows_nothing_is_kept() -> None:
    model = model_of(FAMILIES["llama"].config)
    cache = model.new_cache()
    model.forward([1, 2, 3], cache)
    cache.keep()
    assert cache._kept == []


def test_a_saved_cache_of_other_weights_is_refused(tmp_path: Path) -> None:
    config = FAMILIES["dense_windowed"].config
    model, other = model_of(config, seed=1), model_of(config, seed=2)
    cache = model.new_cache()
    model.forward([1, 2, 3], cache)
    cache.save(tmp_path / "cache")
    assert model_of(config, seed=1, dtype="float64").load_cache(tmp_path / "cache").tokens == [1, 2, 3]
    with refused(CacheError, tmp_path / "cache", "other weights"):
        other.load_cache(tmp_path / "cache")
