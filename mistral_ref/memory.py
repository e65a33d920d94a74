"""How much memory a model needs, predicted before any of it is taken.

A process needs memory for four things. Weights that are views of a mapped file are not counted with the others: the
system can drop their pages and read them again.

    mapped      weights in mapped files
    weights     weights in memory: rounded when they were loaded, norms that were widened to float32
    cache       keys and values of the tokens
    workspace   what a pass computes with, while it computes: the values of a block, and the logits

Python and the compiled kernels take some 30 to 80 MiB beside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mistral_ref.cache import DEFAULT_CHUNK, KVCache
from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError, InputError, size
from mistral_ref.host import available_memory, lacking_memory
from mistral_ref.reference_ops import SCORE_ELEMENTS, ReferenceOps
from mistral_ref.weights import Weights, matrices

_LONGEST = 2**24  # tokens; no text is longer


class MemoryNeeds(NamedTuple):
    """The bytes that a model needs; this module's docstring explains the parts."""

    mapped: int
    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """The bytes that must be there: all but those of the mapped weights."""
        return self.weights + self.cache + self.workspace


def memory_needs(
    config: ModelConfig,
    weights: Weights | None,
    length: int,
    *,
    backend: str = "numba",
    dtype: str = "float32",
    cache_dtype: str | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> MemoryNeeds:
    """Return what a model needs for a text of so many tokens, prompt and answer together.

    weights         None: they are not counted
    backend, dtype  as in `load`
    cache_dtype, chunk      as in `Model.new_cache`

    >>> import mistral_ref
    >>> model = mistral_ref.load(backend="numpy")
    >>> memory_needs(model.config, model.weights, 256, cache_dtype="int8").cache
    184320
    """
    cache = KVCache(config, ReferenceOps(dtype), max_tokens=length, chunk=chunk, dtype=cache_dtype)
    mapped, own = (0, 0) if weights is None else _weight_bytes(weights)
    return MemoryNeeds(mapped, own, cache.bytes_for(length), workspace(cache, length, min(chunk, length), backend))


def longest_context(
    config: ModelConfig,
    weights: Weights,
    *,
    backend: str = "numba",
    dtype: str = "float32",
    cache_dtype: str | None = None,
) -> int | None:
    """Return the most tokens of a text for which memory is left now, with all weights in memory, mapped ones too.

    It is at most max_seq_len; 0: not even one token. None: the system does not tell how much is left.
    """
    left = available_memory()
    if left is None:
        return None
    left -= sum(_weight_bytes(weights))

    def needs(length: int) -> int:
        return memory_needs(config, None, length, backend=backend, dtype=dtype, cache_dtype=cache_dtype).total

    return _most(config.max_seq_len or _LONGEST, needs, left)


def _most(most: int, needs: Callable[[int], int], available: int) -> int:
    """Return the most tokens, up to `most`, of which needs(tokens) is at most `available`; 0: not even one fits.

    >>> _most(50, lambda tokens: 100 * tokens, available=1234)
    12
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needs(middle) <= available else (low, middle - 1)
    return low


def _weight_bytes(weights: Weights) -> tuple[int, int]:
    """Return how many bytes of weights are in mapped files, and how many are in memory."""
    parts: list[np.ndarray | None] = [weights.norm]
    parts += [norm for layer in weights.layers for norm in (layer.attention_norm, layer.ffn_norm)]
    for matrix in matrices(weights):
        parts += [matrix.data, matrix.scale, getattr(matrix, "scales", None)]
    sizes = [0, 0]
    for part in parts:
        if part is not None:
            sizes[not any(file.holds(part) for file in weights.files)] += part.nbytes
    return sizes[0], sizes[1]


def workspace(
    cache: KVCache, length: int, n_tokens: int, backend: str, *, n_logits: int = 1, observed: bool = False
) -> int:
    """Return the most bytes that passes of at most `n_tokens` tokens take at once, the last of them up to `length`.

    cache       the keys and values, of this configuration, dtype and chunk
    n_logits    how many tokens of a pass have logits
    observed    whether the steps inside attention are yielded

    The values of a block live until its end. At the end of the feed-forward there are T tokens, or N pairs of a token
    and an expert:

        T D     x before the block, after attention, and after it; attention_norm, attention_out, ffn_norm, ffn_out
        T H K   q_rotated, heads
        T G K   k, k_rotated, v
        N F     gate, up, ffn_hidden; and the inputs of the last product, laid out or rounded for it
        N D     with experts: their inputs and outputs; and N F that the kernels keep, since no two experts get as many
        N F     with adapters: what one adds; and N D

    The NumPy backend computes scores for some queries at a time, and has three arrays of them at once; and it widens
    keys and values that are stored in another dtype, or that the end of a ring divides.
    """
    config, n_keys = cache.config, length
    if None not in config.sliding_window:
        n_keys = min(length, max(window or 0 for window in config.sliding_window) + n_tokens - 1)
    q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    pairs = n_tokens * (1 if config.moe is None else config.moe.num_experts_per_tok)
    values = n_tokens * (7 * config.dim + 2 * q_width + 3 * kv_width) + 4 * pairs * config.hidden_dim
    if config.moe is not None:
        values += pairs * (2 * config.dim + (config.hidden_dim if backend == "numba" else 0))
    if config.adapted:
        values += pairs * (config.hidden_dim + config.dim)
    n_scores = n_tokens * config.n_heads * n_keys
    if backend != "numba":
        at_once = min(n_scores, max(SCORE_ELEMENTS, config.n_heads * n_keys))
        attention = n_tokens * (2 * config.dim + 3 * q_width + 2 * kv_width) + 3 * at_once
        is_copied = cache.dtype != cache.ops.dtype.name or n_keys < length
        values = max(values, attention + (2 * n_keys * kv_width if is_copied else 0))
    values += 3 * n_scores if observed else 0
    return cache.ops.dtype.itemsize * (values + n_logits * config.vocab_size)


def require(
    cache: KVCache, n_tokens: int, *,
    is_new: bool, at_once: int | None = None, n_logits: int = 1, observed: bool = False,
    kept: Callable[[int], int] = lambda n_tokens: 0, hint: str = "",
) -> None:  # fmt: skip
    """Raise an error if `n_tokens` more tokens in a cache, and the work on them, take more memory than is left.

    is_new              whether the cache was made for these tokens, so that fewer would get a smaller one
    at_once             how many of them come together, in passes of the cache's chunk; None: all
    n_logits, observed  as in `workspace`
    kept                returns how many more values are kept of so many tokens
    hint                what would take less, beside what all texts can do

    It is a CacheError if keys and values take most of it, or else an InputError.
    """
    if not cache.check_memory:
        return
    longest_pass = min(cache.chunk, n_tokens if at_once is None else at_once)

    def needs(n: int) -> tuple[int, int]:
        end = cache.length + n
        work = workspace(cache, end, min(n, longest_pass), cache.ops.name, n_logits=min(n, n_logits), observed=observed)
        made = cache
        if is_new and n < n_tokens:
            made = KVCache(cache.config, cache.ops, chunk=cache.chunk, max_tokens=n, dtype=cache.dtype)
        return made.bytes_for(end) - cache.bytes_for(cache.length), work + kept(n) * cache.ops.dtype.itemsize

    growth, work = needs(n_tokens)
    left = lacking_memory(growth + work)
    if left is None:
        return
    fit = _most(n_tokens, lambda n: sum(needs(n)), left)
    hints = [f"{fit} tokens fit" if fit else "", hint]
    is_cache = growth > work
    if is_cache and cache.dtype != "int8":
        hints.append("keys and values of int8 take less: new_cache(dtype='int8'), --cache-dtype int8")
    hints.append("load(check_memory=False), --no-memory-check tries it")
    after = f" after the {cache.length} in the cache" if cache.length else ""
    of_cache = f", {size(growth)} of it for keys and values," if is_cache else ""
    raise (CacheError if is_cache else InputError)(
        f"{n_tokens} tokens{after} would take {size(growth + work)} of memory{of_cache} and {size(left)} are left; "
        + "; ".join(filter(None, hints))
    )
