"""KVCache: the keys and values of the tokens so far, one ring per layer.

A layer with a window of W keeps a ring of W + chunk - 1 slots, where chunk is the longest pass; a layer without one
keeps everything and grows. The key of position p lies in slot p % capacity. A pass always writes its keys first and
reads afterwards: with that many slots nothing that one of its queries may see has been overwritten, so a prompt and a
single token follow one rule. This file says where a key lies; which keys a query sees, reference_ops.attends; how the
bytes lie is the operations' business.

A window of 3 and passes of up to 2 tokens need 4 slots. Tokens 4 and 5 overwrite 0 and 1; token 4, the first query of
that pass, sees 2, 3 and itself, and all three are there:

    slot        0  1  2  3
    positions   4  5  2  3
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError, InputError, checked_int, short_repr
from mistral_ref.files.cache_file import not_a_cache, read_cache_file, write_cache_file
from mistral_ref.ops import KeyView, Ops

DEFAULT_CHUNK = 512
SCALE_BYTES = 4  # of the scale that each head's key and value of int8 has
_FIRST_CAPACITY = 64


@dataclass
class Ring:
    """The slots of one layer: position p lies in slot p % capacity. `store` is whatever the operations made.

    `max_capacity` is the capacity at which positions begin to share slots; until then the ring grows by doubling.

    >>> ring = Ring(window=3, max_capacity=4, capacity=4)
    >>> ring.slots(4, 6), ring.slots(3, 6)
    (slice(0, 2, None), array([3, 0, 1]))
    >>> ring.first_visible(4)
    2
    """

    window: int | None
    max_capacity: int | None
    capacity: int
    oldest: int = 0  # positions below have been overwritten
    store: Any = None

    def slots(self, start: int, stop: int) -> slice | np.ndarray:
        """Return the slots of positions start to stop - 1, in that order: a slice where they are neighbours."""
        first = start % self.capacity
        if first + stop - start <= self.capacity:
            return slice(first, first + stop - start)
        return np.arange(start, stop) % self.capacity

    def first_visible(self, query: int) -> int:
        """Return the oldest position that a query sees."""
        return 0 if self.window is None else max(0, query - self.window + 1)

    def capacity_for(self, length: int) -> int:
        """Return the capacity to hold `length` positions: doubled until it suffices, `max_capacity` at most."""
        capacity = self.capacity
        while capacity < length and capacity != self.max_capacity:
            capacity = 2 * capacity if self.max_capacity is None else min(2 * capacity, self.max_capacity)
        return capacity


class KVCache:
    """Keys and values of one sequence. Made by `model.new_cache()`, filled by `model.forward(tokens, cache)`.

    length      number of tokens that have gone through a complete pass
    chunk       the longest single pass; `model.forward` splits longer input
    max_tokens  bound on length, or None
    dtype       what keys and values are stored as; "int8": whole numbers from -127 to 127, and for each head's key and
                value a scale

    A pass that does not end (an exception, an abandoned walk) leaves `length` and all that later queries see as it was.
    Where a dtype of 16 bits is asked for, larger numbers than it holds (65504) become infinite.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        chunk: int = DEFAULT_CHUNK,
        max_tokens: int | None = None,
        dtype: str | None = None,
    ) -> None:
        self.chunk = checked_int("chunk", chunk, least=1)
        self.max_tokens = None if max_tokens is None else checked_int("max_tokens", max_tokens, least=1)
        self.dtype = ops.dtype.name if dtype is None else dtype
        if self.dtype == "int4":
            raise InputError("dtype is 'int4'; expected more bits: 15 values for a key change what a model says")
        if self.dtype not in ops.cache_dtypes:
            raise InputError(f"dtype is {short_repr(dtype)}; expected one of {', '.join(ops.cache_dtypes)}")
        self.config, self.ops = config, ops
        self.length = 0
        self._n_passes = 0  # each pass knows its number, so that only the last one begun can go on
        self.rings = [self._new_ring(window) for window in config.sliding_window]

    def _new_ring(self, window: int | None) -> Ring:
        in_ring = None if window is None else window + self.chunk - 1
        max_capacity = min((n for n in (in_ring, self.max_tokens) if n is not None), default=None)
        capacity = _FIRST_CAPACITY if max_capacity is None else min(_FIRST_CAPACITY, max_capacity)
        return Ring(window, max_capacity, capacity, store=self._new_store(capacity))

    def _new_store(self, capacity: int) -> Any:
        return self.ops.new_store(capacity, self.config.n_kv_heads, self.config.head_dim, self.dtype)

    def __repr__(self) -> str:
        return f"<KVCache of {self.length} tokens, {self.dtype}, chunk {self.chunk}, max_tokens {self.max_tokens}>"

    def bytes_for(self, length: int) -> int:
        """Return the memory that keys and values take once the cache holds `length` tokens."""
        kv_width = self.config.n_kv_heads * self.config.head_dim
        scales = self.config.n_kv_heads * SCALE_BYTES if self.dtype == "int8" else 0
        return sum(2 * ring.capacity_for(length) for ring in self.rings) * (
            kv_width * np.dtype(self.dtype).itemsize + scales
        )

    def begin(self, n_tokens: int) -> Pass:
        """Start a pass of n tokens: make room, and return what the forward pass writes and reads through.

        Raises CacheError if n is more than `chunk` or leads past `max_tokens`.
        """
        if n_tokens > self.chunk:
            raise CacheError(
                f"a pass of {n_tokens} tokens; this cache takes {self.chunk} at once: new_cache(chunk=...)"
            )
        self.require_room(n_tokens)
        end = self.length + n_tokens
        for ring in self.rings:
            self._grow(ring, ring.capacity_for(end))
            ring.oldest = max(ring.oldest, end - ring.capacity)
        self._n_passes += 1
        return Pass(self, self.length, n_tokens, self._n_passes)

    def require_room(self, n_tokens: int) -> None:
        """Raise CacheError if n more tokens lead past `max_tokens`."""
        end = self.length + n_tokens
        if self.max_tokens is not None and end > self.max_tokens:
            raise CacheError(f"{end} tokens; this cache was made for {self.max_tokens}: new_cache(max_tokens=...)")

    def _grow(self, ring: Ring, capacity: int) -> None:
        if capacity == ring.capacity:
            return
        store = self._new_store(capacity)
        kept = slice(0, self.length)  # a ring that can still grow has not wrapped: slots are positions
        self.ops.write(store, kept, *self.ops.read(ring.store, kept))
        ring.capacity, ring.store = capacity, store

    def commit(self, finished: Pass) -> None:
        """End a pass: its tokens count from now on."""
        finished.check()
        self.length = finished.stop
        self._n_passes += 1

    def truncate(self, length: int) -> None:
        """Take back the last tokens, so that `length` remain.

        Any number can be taken back while no ring has wrapped. After that the oldest keys are gone: a cache can go back
        by `chunk` tokens from the furthest position that a pass has written, an abandoned pass included. Raises
        CacheError beyond that.
        """
        length = checked_int("length", length, least=0, most=self.length)
        for number, ring in enumerate(self.rings):
            # The next token will be at `length` and has to find all that it sees, itself apart.
            if ring.first_visible(length) < min(ring.oldest, length):
                raise CacheError(
                    f"cannot go back to {length} tokens: token {length} would see {ring.first_visible(length)}, and "
                    f"layer {number} has overwritten all before {ring.oldest}"
                )
        for ring in self.rings:
            ring.oldest = min(ring.oldest, length)
        self.length = length
        self._n_passes += 1

    def copy(self) -> KVCache:
        """Return an independent copy, so that several continuations can share one prompt."""
        twin = copy.copy(self)
        twin.rings = copy.deepcopy(self.rings)
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache as a safetensors file: layers.N.k and layers.N.v (S, G, K), oldest position first.

        The file appears under its name only when it is complete.
        """
        settings = {"length": self.length, "chunk": self.chunk, "max_tokens": self.max_tokens, "dtype": self.dtype}
        layers = (self.ops.read(ring.store, ring.slots(ring.oldest, self.length)) for ring in self.rings)
        write_cache_file(path, self.config, settings, layers)

    @classmethod
    def load(cls, path: str | os.PathLike[str], config: ModelConfig, ops: Ops) -> KVCache:
        """Return the cache that `save` wrote, for a model of the same configuration.

        Any operations can take it up; if they do not store its dtype they store their own. Raises CacheError if the
        file is none, is damaged, or belongs to another configuration.
        """
        settings, layers = read_cache_file(path, config)
        length = settings.pop("length")
        if settings["dtype"] not in ops.cache_dtypes:
            settings["dtype"] = None
        try:
            cache = cls(config, ops, **settings)
            for ring, (k_SGK, v_SGK) in zip(cache.rings, layers, strict=True):
                cache._restore(ring, length, k_SGK, v_SGK)
        except (ValueError, MemoryError) as error:
            raise not_a_cache(path, error) from None
        cache.length = length
        return cache

    def _restore(self, ring: Ring, length: int, k_SGK: np.ndarray, v_SGK: np.ndarray) -> None:
        shape = (len(k_SGK), self.config.n_kv_heads, self.config.head_dim)
        capacity, oldest = ring.capacity_for(length), length - len(k_SGK)
        fits = max(0, length - capacity) <= oldest <= ring.first_visible(length)
        if k_SGK.shape != shape or v_SGK.shape != shape or not fits:
            raise CacheError(f"keys {k_SGK.shape} and values {v_SGK.shape} do not fit a cache of {length} tokens")
        self._grow(ring, capacity)
        ring.oldest = oldest
        self.ops.write(ring.store, ring.slots(oldest, length), k_SGK, v_SGK)


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over a cache: the tokens at positions start to start + n_tokens - 1."""

    cache: KVCache
    start: int
    n_tokens: int
    number: int

    @property
    def stop(self) -> int:
        """One past the position of the last token."""
        return self.start + self.n_tokens

    @property
    def positions(self) -> np.ndarray:
        """The positions (T,) of the tokens."""
        return np.arange(self.start, self.stop)

    def check(self) -> None:
        """Raise CacheError if another pass, or truncate, has used the cache since this one began."""
        if self.cache._n_passes != self.number:
            raise CacheError("the cache has been used by another pass since this one began; this one cannot go on")

    def write(self, layer: int, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None:
        """Put this pass's keys and values in their slots, over positions that no query will see again."""
        self.check()
        ring = self.cache.rings[layer]
        self.cache.ops.write(ring.store, ring.slots(self.start, self.stop), k_TGK, v_TGK)

    def keys(self, layer: int) -> KeyView:
        """Return what this pass's queries see: every key from the oldest that the first one sees to the newest."""
        ring = self.cache.rings[layer]
        keys = range(ring.first_visible(self.start), self.stop)
        queries = range(self.start, self.stop)
        return KeyView(ring.store, ring.slots(keys.start, keys.stop), keys, queries, ring.window)
