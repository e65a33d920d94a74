"""What a model computes of a text: logits, log-probabilities, a vector, a walk. A pass takes a chunk of the tokens."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mistral_ref.cache import KVCache, Pass
from mistral_ref.config import ModelConfig
from mistral_ref.errors import Progress
from mistral_ref.sampling import likeliest, log_softmax
from mistral_ref.transformer import Transformer, drain
from mistral_ref.walk import Edit, Walk


class Scores(NamedTuple):
    """What `Model.score` returns with `top`: the log-probabilities of the tokens of a text after its first one.

    logprobs        of each token, given the tokens before it: (T-1,)
    top_ids         the N tokens that are the likeliest there, the likeliest first: (T-1, N)
    top_logprobs    their log-probabilities (T-1, N)
    """

    logprobs: np.ndarray
    top_ids: np.ndarray
    top_logprobs: np.ndarray


def pass_lengths(n_tokens: int, chunk: int) -> set[int]:
    """Return the different numbers of tokens in the passes that together take `n_tokens` tokens.

    >>> [sorted(pass_lengths(n, 400)) for n in (1000, 800, 7, 0)]
    [[200, 400], [400], [7], []]
    """
    return {min(n_tokens, chunk), (n_tokens - 1) % chunk + 1} if n_tokens else set()


def prepare(transformer: Transformer, cache: KVCache, lengths: Collection[int], *, last_only: bool = False) -> None:
    """Make what passes of these numbers of tokens need, such as compiled kernels."""
    transformer.ops.prepare(transformer.config, transformer.weights, cache.dtype, lengths, last_only=last_only)


def begin_pass(transformer: Transformer, cache: KVCache, n_tokens: int) -> Pass:
    """Begin a pass of `n_tokens` tokens. Raises CheckpointError if a file with weights has become shorter."""
    prepare(transformer, cache, {n_tokens})
    transformer.weights.check_files()
    return cache.begin(n_tokens)


def _passes(
    transformer: Transformer, ids: Sequence[int], cache: KVCache, *, last_only: bool = False
) -> Iterator[tuple[int, np.ndarray, Pass]]:
    """Yield the passes that take these ids through the model: the first index, the ids (T,) and the Pass of each."""
    cache.make_room(len(ids))
    prepare(transformer, cache, pass_lengths(len(ids), cache.chunk), last_only=last_only)
    for start in range(0, len(ids), cache.chunk):
        transformer.weights.check_files()
        chunk = np.array(ids[start : start + cache.chunk])
        yield start, chunk, cache.begin(len(chunk))


def logits(transformer: Transformer, ids: Sequence[int], cache: KVCache) -> np.ndarray:
    """Append ids to the tokens in a cache; return their logits (T, V)."""
    logits_TV = np.empty((len(ids), transformer.config.vocab_size), transformer.ops.dtype)
    for start, chunk, this_pass in _passes(transformer, ids, cache):
        logits_TV[start : start + len(chunk)] = drain(transformer.forward_steps(chunk, this_pass), transformer.ops)
    return logits_TV


def logits_ahead(transformer: Transformer, ids: Sequence[int], cache: KVCache) -> tuple[np.ndarray, Pass]:
    """Return the logits (T, V) of ids that follow the tokens in a cache, and their pass, which `commit` can end."""
    this_pass = begin_pass(transformer, cache, len(ids))
    return drain(transformer.forward_steps(np.array(ids), this_pass), transformer.ops, until="logits"), this_pass


def end_of_keys(config: ModelConfig) -> str:
    """Return the name of the first step that comes after all keys and values have been written."""
    return f"layers.{config.n_layers - 1}.heads"


def last_logits(
    transformer: Transformer, ids: Sequence[int], cache: KVCache, progress: Progress | None = None
) -> np.ndarray:
    """Append ids to the tokens in a cache; return the logits (1, V) of the last one.

    `progress(done, total)` is called before each pass and at the end. Of a pass that is not the last one only keys and
    values are needed, so it ends at the first step after them.
    """
    report = progress or (lambda done, total: None)
    for start, chunk, this_pass in _passes(transformer, ids, cache, last_only=True):
        report(start, len(ids))
        steps = transformer.forward_steps(chunk, this_pass, last_only=True)
        if start + len(chunk) < len(ids):
            drain(steps, transformer.ops, until=end_of_keys(transformer.config))
            cache.commit(this_pass, chunk)
    logits_1V = drain(steps, transformer.ops)
    report(len(ids), len(ids))
    return logits_1V


def walk(
    transformer: Transformer,
    ids: Sequence[int],
    cache: KVCache,
    *,
    observe_attention: bool,
    edits: Mapping[str, Edit],
) -> Walk:
    """Return a Walk through one pass of these ids, which follow the tokens in the cache.

    observe_attention   whether the steps inside attention are among those that can be seen and edited
    """
    ops = transformer.ops
    this_pass = begin_pass(transformer, cache, len(ids))
    steps = transformer.forward_steps(np.array(ids), this_pass, observe_attention=observe_attention)
    return Walk(steps, ops, edits)


def scores(transformer: Transformer, ids: Sequence[int], cache: KVCache, n_top: int) -> Scores:
    """Return the Scores of a text, with the `n_top` likeliest tokens at each place. The cache holds no token yet.

    The logits of one chunk are in memory at a time.
    """
    n_scored, ops = len(ids) - 1, transformer.ops
    found = Scores(np.empty(n_scored), np.empty((n_scored, n_top), np.int64), np.empty((n_scored, n_top)))
    for start, chunk, this_pass in _passes(transformer, ids[:-1], cache):
        logits_TV = drain(transformer.forward_steps(chunk, this_pass), ops)
        for at, logits_V in enumerate(logits_TV, start):  # one by one, because log-probabilities are float64
            logprobs_V = log_softmax(logits_V)
            found.logprobs[at] = logprobs_V[ids[at + 1]]
            if n_top:
                found.top_ids[at] = likeliest(logprobs_V, n_top)
                found.top_logprobs[at] = logprobs_V[found.top_ids[at]]
        del logits_TV, logits_V  # before the next pass makes others
    return found


def embedding(transformer: Transformer, ids: Sequence[int], cache: KVCache) -> np.ndarray:
    """Return the mean of the step "norm" over the tokens of a text, (D,) float32. The cache holds no token yet."""
    sum_D = np.zeros(transformer.config.dim)
    for _, chunk, this_pass in _passes(transformer, ids, cache, last_only=True):
        norm_TD = drain(transformer.forward_steps(chunk, this_pass), transformer.ops, until="norm")
        cache.commit(this_pass, chunk)  # the pass ends before the logits, which nobody needs
        sum_D += norm_TD.sum(axis=0, dtype=np.float64)
    return (sum_D / len(ids)).astype(np.float32)
