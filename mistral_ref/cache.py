"""KVCache: the keys and values of the tokens so far, one ring of slots (ring.py) for each layer.

Every pass writes its keys first and reads afterwards, whether it has one token or many. The operations (ops.py) decide
how a key is stored in its slot.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Never, SupportsIndex

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError, InputError, checked_choice, checked_int, first_difference, short_repr, warn
from mistral_ref.files.cache_file import not_a_cache, read_cache_file, write_cache_file
from mistral_ref.files.paths import local_path
from mistral_ref.host import require_memory
from mistral_ref.ops import KeyView, Ops
from mistral_ref.ring import Ring
from mistral_ref.weights import Weights, fingerprint

DEFAULT_CHUNK = 512
CACHE_DTYPES = ("float32", "float16", "int8")
SCALE_BYTES = 4  # bytes of a scale; with int8 every key and every value of a head has one
_FIRST_CAPACITY = 64
_MOST_KEPT = 4  # copies that `keep` makes


class KVCache:
    """Keys and values of one sequence. `model.new_cache()` makes it, and `model.forward(tokens, cache)` fills it.

    tokens      the ids of all tokens that have gone through a complete pass, in order: also of those whose keys a ring
                has overwritten since
    length      the number of these tokens
    chunk       number of tokens in the longest pass; `model.forward` splits a longer input
    max_tokens  maximum of `length`; None: no maximum
    dtype       number format of the stored keys and values. "int8" stores whole numbers from -127 to 127, and one scale
                for each head's key and one for its value
    check_memory    whether the cache refuses to grow if less memory is left than that takes

    A pass may stop before its end, because of an exception or because a walk is abandoned. Then `tokens` does not
    change, and no key or value that later queries see changes. With dtype "float16" numbers above 65504 become
    infinite.
    """

    def __init__(
        self,
        config: ModelConfig,
        ops: Ops,
        *,
        chunk: int = DEFAULT_CHUNK,
        max_tokens: int | None = None,
        dtype: str | None = None,
        check_memory: bool = True,
        weights: Weights | None = None,
    ) -> None:
        self.check_memory = check_memory
        self.chunk = checked_int("chunk", chunk, least=1)
        self.max_tokens = None if max_tokens is None else checked_int("max_tokens", max_tokens, least=1)
        self.dtype = ops.dtype.name if dtype is None else dtype
        if self.dtype == "int4":
            raise InputError("dtype is 'int4'; expected more bits: 15 different numbers are too few for keys")
        checked_choice("dtype", self.dtype, ops.cache_dtypes)
        self.config, self.ops = config, ops
        self._tokens: list[int] = []
        self._kept: list[KVCache] = []
        self._weights = weights
        # A pass stores this number when it begins. If it has changed since, the pass stops with a CacheError.
        self._n_passes = 0
        self.rings = [self._new_ring(window) for window in config.sliding_window]

    def _new_ring(self, window: int | None) -> Ring:
        in_ring = None if window is None else window + self.chunk - 1
        max_capacity = min((n for n in (in_ring, self.max_tokens) if n is not None), default=None)
        capacity = _FIRST_CAPACITY if max_capacity is None else min(_FIRST_CAPACITY, max_capacity)
        return Ring(window, max_capacity, capacity, store=self._new_store(capacity))

    def _new_store(self, capacity: int) -> Any:
        return self.ops.new_store(capacity, self.config.n_kv_heads, self.config.head_dim, self.dtype)

    @property
    def tokens(self) -> list[int]:
        """The ids of all tokens that have gone through a complete pass, in order."""
        return self._tokens.copy()

    @property
    def length(self) -> int:
        """Number of tokens that have gone through a complete pass."""
        return len(self._tokens)

    def __repr__(self) -> str:
        return f"<KVCache of {self.length} tokens, {self.dtype}, chunk {self.chunk}, max_tokens {self.max_tokens}>"

    def bytes_for(self, length: int) -> int:
        """Return the bytes of memory that keys and values take if the cache holds `length` tokens."""
        kv_width = self.config.n_kv_heads * self.config.head_dim
        scales = self.config.n_kv_heads * SCALE_BYTES if self.dtype == "int8" else 0
        return sum(2 * ring.capacity_for(length) for ring in self.rings) * (
            kv_width * np.dtype(self.dtype).itemsize + scales
        )

    def begin(self, n_tokens: int) -> Pass:
        """Start a pass of `n_tokens` tokens: make room, and return the Pass that reads and writes this cache.

        Raises CacheError if the tokens are more than `chunk`, or as `require_room` does.
        """
        if n_tokens > self.chunk:
            raise CacheError(
                f"a pass has {n_tokens} tokens; expected at most {self.chunk}: new_cache(chunk=...) sets this number"
            )
        self.make_room(n_tokens)
        for ring in self.rings:
            ring.oldest = max(ring.oldest, self.length + n_tokens - ring.capacity)
        self._n_passes += 1
        return Pass(self, self.length, n_tokens, self._n_passes)

    def require_room(self, n_tokens: int) -> None:
        """Raise CacheError if `n_tokens` more tokens would be more than `max_tokens`, or more than memory holds."""
        end = self.length + n_tokens
        if self.max_tokens is not None and end > self.max_tokens:
            raise CacheError(
                f"the cache would hold {end} tokens; expected at most {self.max_tokens}: new_cache(max_tokens=...) "
                "sets this number"
            )
        if self.check_memory and any(ring.capacity_for(end) > ring.capacity for ring in self.rings):
            hint = "" if self.dtype == "int8" else "new_cache(dtype='int8') takes less"
            more = self.bytes_for(end) - self.bytes_for(self.length)
            require_memory(more, f"a cache that grows from {self.length} to {end} tokens", hint, CacheError)

    def make_room(self, n_tokens: int) -> None:
        """Grow the rings once for `n_tokens` more tokens, whatever the number of passes that bring them.

        Raises CacheError as `require_room` does.
        """
        self.require_room(n_tokens)
        for ring in self.rings:
            self._grow(ring, ring.capacity_for(self.length + n_tokens))

    def _grow(self, ring: Ring, capacity: int) -> None:
        if capacity == ring.capacity:
            return
        store = self._new_store(capacity)
        # A ring below its maximum has overwritten nothing, so that slot p holds position p in every ring. Stores are
        # tuples of arrays, in which slots follow each other along one axis.
        for old, new in zip(ring.store, store, strict=True):
            both = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
            new[both] = old[both]
        ring.capacity, ring.store = capacity, store

    def commit(self, finished: Pass, tokens_T: Sequence[int] | np.ndarray) -> Pass:
        """End a pass: its token ids (T,), or only the first of them, are now the cache's last ones.

        Return the pass of the tokens that are left. They may become the cache's later on, in the same way, until
        another pass begins. Raises CacheError if another pass has used the cache since this one began.
        """
        finished.check()
        assert len(tokens_T) <= finished.n_tokens
        self._tokens += map(int, tokens_T)
        self._n_passes += 1
        return Pass(self, self.length, finished.n_tokens - len(tokens_T), self._n_passes)

    def truncate(self, length: int) -> None:
        """Take back the last tokens: `length` tokens remain.

        While no ring has overwritten a key, the cache can go back to any length. After that it can go back by `chunk`
        tokens from the furthest position that a pass has written. Abandoned passes count too. Raises CacheError if the
        next token would see a key that is overwritten, and InputError unless 0 <= length <= self.length.
        """
        length = checked_int("length", length, least=0, most=self.length)
        for number, ring in enumerate(self.rings):
            # The next token is at position `length`. All keys that it sees must be there, except its own.
            if ring.first_visible(length) < min(ring.oldest, length):
                raise CacheError(
                    f"cannot go back to {length} tokens: token {length} would see token {ring.first_visible(length)}, "
                    f"but layer {number} has overwritten all tokens before {ring.oldest}"
                )
        for ring in self.rings:
            ring.oldest = min(ring.oldest, length)
        del self._tokens[length:]
        self._n_passes += 1

    def keep(self) -> None:
        """Keep a copy of the cache as it is now: `keep_shared` can go back to it, however far the rings have wrapped.

        The newest four copies are kept; each takes as much memory as the cache. They are not saved. Without windows a
        cache can always go back, and nothing is kept. Raises CacheError if memory has no room for a copy.
        """
        if all(ring.window is None for ring in self.rings):
            return
        require_memory(self.bytes_for(self.length), f"a copy of the cache with {self.length} tokens", kind=CacheError)
        twin = self.copy()
        twin._kept = []
        self._kept = [*self._kept, twin][-_MOST_KEPT:]

    def keep_shared(self, ids: Sequence[int]) -> int:
        """Take back every token from the first one on that is not as in `ids`; return how many tokens remain.

        If the next token would see a key that a ring has overwritten (see `truncate`), the cache becomes what `keep`
        has kept and shares most tokens with `ids`, or empty. A warning then says how many tokens are read again.
        """
        shared = shared_length(self._tokens, ids)
        best = max([self, *self._kept], key=lambda one: one.shared_with(ids))
        length = best.shared_with(ids)
        if best is not self:
            twin = best.copy()
            self.rings, self._tokens = twin.rings, twin._tokens
        self.truncate(length)
        if length < shared:
            warn(
                f"the cache shares {shared} tokens with the prompt, but a ring has overwritten keys that the next "
                f"token sees; {shared - length} tokens are read again (cache.keep() keeps a copy to go back to)"
            )
        return self.length

    def shared_with(self, ids: Sequence[int]) -> int:
        """Return how many tokens this cache shares with `ids`; 0 if `truncate` cannot go back to them."""
        length = shared_length(self._tokens, ids)
        return length if all(ring.first_visible(length) >= min(ring.oldest, length) for ring in self.rings) else 0

    def copy(self) -> KVCache:
        """Return an independent copy. With copies several texts can continue one prompt."""
        twin = object.__new__(type(self))
        twin.__dict__ |= vars(self) | {
            "rings": copy.deepcopy(self.rings), "_tokens": self.tokens, "_kept": self._kept.copy()
        }  # fmt: skip
        return twin

    def __copy__(self) -> KVCache:
        return self.copy()

    def __deepcopy__(self, memo: object) -> KVCache:
        return self.copy()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        raise CacheError("a KVCache cannot be pickled; cache.save(path) writes it, and model.load_cache(path) reads it")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache as a safetensors file: its tokens, and layers.N.k and layers.N.v (S, G, K), oldest first.

        The file gets its name only when it is complete. Raises CacheError if it cannot be written.
        """
        settings = {"chunk": self.chunk, "max_tokens": self.max_tokens, "dtype": self.dtype}
        settings["weights"] = None if self._weights is None else fingerprint(self._weights)
        layers = (self.ops.read(ring.store, ring.slots(ring.oldest, self.length)) for ring in self.rings)
        write_cache_file(path, self.config, settings, self._tokens, layers)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], config: ModelConfig, ops: Ops, weights: Weights | None = None
    ) -> KVCache:
        """Return the cache that `save` wrote, for a model of the same configuration and weights.

        `ops` may be of another backend than the one that wrote the file. If `ops` cannot store the file's dtype, the
        cache gets the dtype of `ops`. Raises CacheError if the file is not a saved cache, is damaged, or belongs to
        another configuration or to other weights.
        """
        settings, tokens, layers = read_cache_file(path, config)
        found, expected = settings.pop("weights"), None if weights is None else fingerprint(weights)
        if found != expected and None not in (found, expected):
            raise CacheError(f"{local_path(path)}: this cache belongs to a model with other weights")
        if settings["dtype"] not in ops.cache_dtypes:
            settings["dtype"] = None
        try:
            cache = cls(config, ops, **settings, weights=weights)
            for ring, (k_SGK, v_SGK) in zip(cache.rings, layers, strict=True):
                cache._restore(ring, len(tokens), k_SGK, v_SGK)
            cache._tokens = tokens.tolist()
        except (ValueError, MemoryError) as error:
            raise not_a_cache(path, error) from None
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


def check_cache(cache: object, config: ModelConfig, ops: Ops, name: str = "cache") -> None:
    """Raise InputError unless an argument is a cache or None, and CacheError if it is another model's."""
    if cache is None:
        return
    if not isinstance(cache, KVCache):
        raise InputError(f"{name} is {short_repr(cache)}; expected one from this model's new_cache()")
    if cache.ops is not ops or cache.config != config:
        found, expected = (
            {"dtype": str(ops.dtype), "backend": ops.name, **asdict(config)}
            for ops, config in ((cache.ops, cache.config), (ops, config))
        )
        difference = first_difference(found, expected) or "its settings are the same"
        raise CacheError(f"{name} belongs to another model: {difference}; expected one from this model's new_cache()")


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences share from their beginning on.

    >>> shared_length([1, 5, 6, 7], [1, 5, 8])
    2
    """
    pairs = zip(first, second, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@dataclass(frozen=True, eq=False)
class Pass:
    """One pass over a cache: the tokens at positions start to start + n_tokens - 1. `cache.begin` makes it.

    cache       the cache
    start       position of the first token
    n_tokens    number of tokens in the pass
    number      the cache's counter when this pass began; every later pass and every truncate changes the counter
    """

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

    @property
    def last(self) -> slice:
        """Which of the tokens is the last one."""
        return slice(self.n_tokens - 1, None)

    def check(self) -> None:
        """Raise CacheError if another pass, or truncate, has used the cache since this one began."""
        if self.cache._n_passes != self.number:
            raise CacheError("another pass, or truncate, has used the cache since this pass began; it cannot go on")

    def write(self, layer: int, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None:
        """Put this pass's keys and values of one layer in their slots. No query will see the keys that they overwrite.

        Raises CacheError as `check` does.
        """
        self.check()
        ring = self.cache.rings[layer]
        self.cache.ops.write(ring.store, ring.slots(self.start, self.stop), k_TGK, v_TGK)

    def views(self, layer: int, rows: slice = slice(None)) -> list[KeyView]:
        """Return one view: the keys and values of one layer that the queries of this pass see, or its tokens `rows`.

        They reach from the oldest key that the first query sees to the key of the last query.
        """
        ring = self.cache.rings[layer]
        queries = range(self.start, self.stop)[rows]
        keys = range(ring.first_visible(queries.start), queries.stop)
        return [KeyView(ring.store, ring.slots(keys.start, keys.stop), keys, queries, ring.window)]

    def commit(self, tokens_T: Sequence[int] | np.ndarray) -> None:
        """End this pass: see `KVCache.commit`."""
        self.cache.commit(self, tokens_T)
