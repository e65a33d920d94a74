"""What a model computes of a text: logits, log-probabilities, a vector, a walk. A pass takes a chunk of the tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mistral_ref.cache import KVCache, Pass
from mistral_ref.config import ModelConfig
from mistral_ref.errors import Progress
from mistral_ref.joined_pass import JoinedPass
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
    if len(ids) > cache.chunk:  # a single pass makes room itself
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


Parts = Sequence[tuple[Sequence[int], KVCache]]  # ids, and the cache that holds the tokens before them


def _begin_joined(transformer: Transformer, parts: Parts) -> tuple[np.ndarray, JoinedPass]:
    """Begin a pass of several parts; return all ids (T,), end to end, and the pass."""
    lengths = [len(ids) for ids, _ in parts]
    prepare(transformer, parts[0][1], {sum(lengths), *lengths})
    transformer.weights.check_files()
    return np.concatenate([ids for ids, _ in parts]), JoinedPass([cache.begin(len(ids)) for ids, cache in parts])


def joined_logits(transformer: Transformer, parts: Parts) -> np.ndarray:
    """Append ids to the tokens in each of some caches, in one pass; return the logits (T, V) of all, end to end."""
    tokens_T, joined = _begin_joined(transformer, parts)
    return drain(transformer.forward_steps(tokens_T, joined), transformer.ops)


def logits_ahead(transformer: Transformer, parts: Parts) -> list[tuple[np.ndarray, Pass]]:
    """Return of each part the logits (T, V) of its ids, and their pass, which `commit` can end, token by token."""
    tokens_T, joined = _begin_joined(transformer, parts)
    logits_TV = drain(transformer.forward_steps(tokens_T, joined), transformer.ops, until="logits")
    return [(logits_TV[rows], one) for one, rows in joined.parts()]


def walk(
    transformer: Transformer,
    ids: Sequence[int],
    cache: KVCache,
    *,
    observe_attention: bool,
    edits: Sequence[tuple[str, Edit]],
) -> Walk:
    """Return a Walk through one pass of these ids, which follow the tokens in the cache.

    observe_attention   whether the steps inside attention are among those that can be seen and edited
    """
    ops = transformer.ops
    this_pass = begin_pass(transformer, cache, len(ids))
    steps = transformer.forward_steps(np.array(ids), this_pass, observe_attention=observe_attention)
    return Walk(steps, ops, edits, this_pass)


class _Scoring:
    """A text that is being scored: what is found so far, and the cache of the tokens that have been through a pass."""

    def __init__(self, ids: Sequence[int], cache: KVCache, n_top: int) -> None:
        n = len(ids) - 1
        self.ids, self.cache, self.n_left = ids, cache, n
        self.found = Scores(np.empty(n), np.empty((n, n_top), np.int64), np.empty((n, n_top)))

    def take(self, start: int, logits_TV: np.ndarray) -> None:
        """Put in what the logits of the tokens from `start` on say of the tokens after them."""
        n_top = self.found.top_ids.shape[1]
        for at, logits_V in enumerate(logits_TV, start):  # one by one, because log-probabilities are float64
            logprobs_V = log_softmax(logits_V)
            self.found.logprobs[at] = logprobs_V[self.ids[at + 1]]
            if n_top:
                self.found.top_ids[at] = likeliest(logprobs_V, n_top)
                self.found.top_logprobs[at] = logprobs_V[self.found.top_ids[at]]
        self.n_left -= len(logits_TV)


def scores(
    transformer: Transformer, texts: Iterable[Sequence[int]], new_cache: Callable[[int], KVCache], n_top: int
) -> Iterator[Scores]:
    """Yield the Scores of each text, with the `n_top` likeliest tokens at each place.

    new_cache   makes the cache of a text, for so many tokens

    A pass takes the tokens of as many texts as fit into one chunk, and the logits of one pass are in memory at a time.
    A text that is longer than a chunk is cut as if it were alone.
    """
    begun: deque[_Scoring] = deque()
    pieces: list[tuple[_Scoring, int, Sequence[int]]] = []

    def take_pieces() -> None:
        logits_TV = joined_logits(transformer, [(piece, text.cache) for text, _, piece in pieces])
        for text, start, piece in pieces:
            text.take(start, logits_TV[: len(piece)])
            logits_TV = logits_TV[len(piece) :]
        pieces.clear()

    for ids in texts:
        cache = new_cache(len(ids))
        begun.append(_Scoring(ids, cache, n_top))
        for start in range(0, len(ids) - 1, cache.chunk):
            piece = ids[start : min(start + cache.chunk, len(ids) - 1)]
            if sum(len(other) for _, _, other in pieces) + len(piece) > cache.chunk:
                take_pieces()
            pieces.append((begun[-1], start, piece))
        while begun and not begun[0].n_left:
            yield begun.popleft().found
    if pieces:
        take_pieces()
    yield from (text.found for text in begun)


def embedding(transformer: Transformer, ids: Sequence[int], cache: KVCache) -> np.ndarray:
    """Return the mean of the step "norm" over the tokens of a text, (D,) float32. The cache holds no token yet."""
    sum_D = np.zeros(transformer.config.dim)
    for _, chunk, this_pass in _passes(transformer, ids, cache, last_only=True):
        norm_TD = drain(transformer.forward_steps(chunk, this_pass), transformer.ops, until="norm")
        cache.commit(this_pass, chunk)  # the pass ends before the logits, which nobody needs
        sum_D += norm_TD.sum(axis=0, dtype=np.float64)
    return (sum_D / len(ids)).astype(np.float32)
