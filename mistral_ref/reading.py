"""ReadingModel: what a model computes of a text that it reads. Model (model.py) writes texts, too."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from typing import Never, SupportsIndex, overload
from weakref import WeakKeyDictionary

import numpy as np

from mistral_ref import memory, passes
from mistral_ref.cache import DEFAULT_CHUNK, KVCache, check_cache
from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError, Progress, checked_int, printable, short_repr
from mistral_ref.ops import Ops
from mistral_ref.passes import Scores, pass_lengths
from mistral_ref.prompt import Prompt, of_prompt, prompt_ids
from mistral_ref.steps import count_values
from mistral_ref.text.stream import TokenStream
from mistral_ref.text.tokenizer import Tokenizer
from mistral_ref.trace import Trace
from mistral_ref.transformer import Transformer
from mistral_ref.walk import Edit, Edits, Walk, checked_edits, inside_attention, matching_steps
from mistral_ref.weights import Weights


class ReadingModel:
    """A transformer with its tokenizer.

    config      ModelConfig
    weights     the tensors, under Mistral's own names
    ops         the operations that compute with them
    tokenizer   None if the directory has no tokenizer; prompts must then be token ids
    eos_ids     the ids that end a text
    check_memory    whether work is refused that takes more memory than is left
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        *,
        tokenizer: Tokenizer | None = None,
        eos_ids: Sequence[int] = (),
        check_memory: bool = True,
    ) -> None:
        self.config, self.weights, self.ops, self.tokenizer = config, weights, ops, tokenizer
        own = None if tokenizer is None else tokenizer.eos_id
        self.eos_ids = frozenset(eos_ids) or frozenset([] if own is None else [own])
        self.transformer = Transformer(config, weights, ops)
        self.check_memory = check_memory
        self._cache_type = KVCache

    def __repr__(self) -> str:
        tokenizer = "no tokenizer" if self.tokenizer is None else repr(self.tokenizer)
        return f"<Model of {self.config.n_parameters:,} parameters, {self.ops.dtype} by {self.ops.name}, {tokenizer}>"

    def __reduce_ex__(self, protocol: SupportsIndex) -> Never:
        raise InputError(
            "a Model cannot be copied or pickled: threads share one Model, with a cache for each text (new_cache), and "
            "another process calls load() itself"
        )

    def new_cache(
        self, *, max_tokens: int | None = None, chunk: int = DEFAULT_CHUNK, dtype: str | None = None
    ) -> KVCache:
        """Return an empty cache for one sequence.

        max_tokens  maximum of its length; None: the cache grows as needed
        chunk       number of tokens in the longest pass, and how many tokens `truncate` can always take back; a layer
                    with a window W has W + chunk - 1 slots
        dtype       number format of the stored keys and values: "float16" takes half the memory of float32, "int8" a
                    quarter. None: the operations' own dtype

        Raises InputError for a value that cannot be used.
        """
        return self._cache_type(
            self.config,
            self.ops,
            chunk=chunk,
            max_tokens=max_tokens,
            dtype=dtype,
            check_memory=self.check_memory,
            weights=self.weights,
        )

    def load_cache(self, path: str | os.PathLike[str]) -> KVCache:
        """Return the cache that `cache.save(path)` wrote. Raises CacheError as `KVCache.load` does."""
        cache = self._cache_type.load(path, self.config, self.ops, self.weights)
        cache.check_memory = self.check_memory
        return cache

    @cached_property
    def caches_beside(self) -> WeakKeyDictionary[KVCache, KVCache]:
        """A draft's caches: what it has read of the text in another cache, which is `prompt_cache` of several texts."""
        return WeakKeyDictionary()

    def token_ids(self, prompt: Prompt, cache: KVCache | None = None) -> list[int]:
        """Return the token ids of a prompt. Each id is checked to be in [0, V).

        A text is encoded, with the added tokens in it ("<|im_start|>"). BOS is put in front unless the cache already
        holds tokens. Ids stay as they are. Raises InputError if there is no token, if an id is out of range, or if the
        sequence becomes longer than max_seq_len.
        """
        check_cache(cache, self.config, self.ops)
        return prompt_ids(prompt, self.tokenizer, self.config, 0 if cache is None else cache.length)

    def forward(
        self,
        tokens: Prompt,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        edits: Edits | None = None,
    ) -> np.ndarray:
        """Return logits (T, V); with `last_only` the last token's logits (1, V).

        cache       the tokens continue the sequence in the cache and are appended to it. One call with many tokens and
                    several calls with parts of them give the same logits. None: nothing is kept
        edits       a map from names of steps, or globs, to an array or to a function of the step's value; or a list of
                    such pairs. They apply in their order. A pass with edits is never split, so T is at most the cache's
                    chunk. Its steps have all tokens, also with `last_only`

        An interrupted call keeps the chunks that are finished: `cache.tokens` holds their tokens. Raises InputError or
        CacheError, also if less memory is left than the logits take.
        """
        ids = self.token_ids(tokens, cache)
        if edits:
            pairs, touched = checked_edits(edits, self.config)
            logits_TV = self._walk(ids, cache, inside_attention(touched), pairs).finish()
            return (logits_TV[-1:] if last_only else logits_TV).copy()
        is_new = cache is None
        cache = self.new_cache(max_tokens=len(ids)) if cache is None else cache
        n_logits = 1 if last_only else len(ids)
        if len(ids) > 1:  # one token takes little
            memory.require(
                cache, len(ids), is_new=is_new, n_logits=min(n_logits, cache.chunk),
                kept=lambda n: min(n, n_logits) * self.config.vocab_size,
                hint="" if last_only else "last_only=True keeps the logits of the last token, and score(tokens) none",
            )  # fmt: skip
        return (passes.last_logits if last_only else passes.logits)(self.transformer, ids, cache)

    def _prepare(self, n_tokens: int, cache: KVCache) -> None:
        """Make what the passes of so many tokens, and then of one token each, need."""
        passes.prepare(self.transformer, cache, {1, *pass_lengths(n_tokens, cache.chunk)}, last_only=True)

    def _next_logits(self, ids: Sequence[int], cache: KVCache, progress: Progress | None = None) -> np.ndarray:
        return passes.last_logits(self.transformer, ids, cache, progress)[0]

    def steps(self, tokens: Prompt, cache: KVCache | None = None, *, edits: Edits | None = None) -> Walk:
        """Return a Walk through the forward pass of these tokens. Iterate over it to get every Step.

        cache   the pass starts after the tokens in the cache and takes at most `cache.chunk` tokens. The cache counts
                them when the walk has reached its end
        edits   as in `forward`

        Raises InputError or CacheError.
        """
        pairs, _ = checked_edits(edits, self.config)
        return self._walk(self.token_ids(tokens, cache), cache, observe_attention=True, edits=pairs)

    def trace(
        self,
        tokens: Prompt,
        *,
        keep: str | Iterable[str] = "*",
        cache: KVCache | None = None,
        edits: Edits | None = None,
    ) -> Trace:
        """Return a Trace of the forward pass of these tokens: the values of the steps that `keep` names.

        keep    names or globs of steps, for example "layers.*.attention_weights"; only these take memory
        cache   as in `steps`: the pass starts after the tokens in the cache, and its tokens are appended
        edits   as in `forward`; the Trace holds the edited values

        Raises InputError or CacheError.
        """
        ids = self.token_ids(tokens, cache)
        pairs, touched = checked_edits(edits, self.config)
        kept = matching_steps(keep, self.config)
        start = 0 if cache is None else cache.length
        walk = self._walk(ids, cache, inside_attention([*kept, *touched]), pairs, kept)
        steps = [step for step in walk if step.name in kept]
        pieces = [self.piece(token) for token in ids]
        made_by, windows = f"{self.ops.dtype} by {self.ops.name}", self.config.sliding_window
        return Trace(steps, ids, pieces, start=start, made_by=made_by, windows=windows)

    def piece(self, token: int) -> str:
        """Return the tokenizer's piece of a token id, safe to print; "[7]" for an id 7 without a piece.

        At most 200 characters are kept.
        """
        token = checked_int("token", token, least=0)
        if self.tokenizer is None or token >= self.tokenizer.vocab_size:
            return f"[{token}]"
        return printable(self.tokenizer.piece(token))

    def _walk(
        self,
        ids: list[int],
        cache: KVCache | None,
        observe_attention: bool,
        edits: Sequence[tuple[str, Edit]],
        kept: Collection[str] = (),
    ) -> Walk:
        is_new = cache is None
        cache = self.new_cache(max_tokens=len(ids), chunk=len(ids)) if cache is None else cache
        start = cache.length
        hint = "keep=... keeps fewer steps" if kept else "over a cache, a pass of fewer tokens has fewer scores"
        memory.require(
            cache, len(ids), is_new=is_new, n_logits=len(ids), observed=observe_attention,
            kept=lambda n: count_values(self.config, n, start, kept), hint=hint,
        )  # fmt: skip
        return passes.walk(self.transformer, ids, cache, observe_attention=observe_attention, edits=edits)

    @overload
    def score(self, tokens: Prompt, *, top: None = None) -> np.ndarray: ...

    @overload
    def score(self, tokens: Prompt, *, top: int) -> Scores: ...

    def score(self, tokens: Prompt, *, top: int | None = None) -> np.ndarray | Scores:
        """Return the log-probability of each token after the first, given the tokens before it: (T-1,), in nats.

        top     return Scores: also the ids and the log-probabilities of so many of the likeliest tokens at each place

        The results are float64. Only the logits of one chunk are in memory at a time. Raises InputError.
        """
        ids = self.token_ids(tokens)
        n_top = 0 if top is None else checked_int("top", top, least=1, most=self.config.vocab_size)
        (found,) = self.scores_of_ids([ids], n_top)
        return found.logprobs if top is None else found

    @overload
    def score_batch(self, texts: Sequence[Prompt], *, top: None = None) -> Iterator[np.ndarray]: ...

    @overload
    def score_batch(self, texts: Sequence[Prompt], *, top: int) -> Iterator[Scores]: ...

    def score_batch(
        self, texts: Sequence[Prompt], *, top: int | None = None
    ) -> Iterator[np.ndarray] | Iterator[Scores]:
        """Return an iterator over what `score` returns for each text. Texts that fit into one chunk share a pass.

        All texts are checked before this function returns. Raises InputError.
        """
        all_ids = self._ids_of_each(texts)
        n_top = 0 if top is None else checked_int("top", top, least=1, most=self.config.vocab_size)
        found = self.scores_of_ids(all_ids, n_top)
        return (one.logprobs for one in found) if top is None else found

    def scores_of_ids(self, all_ids: Iterable[Sequence[int]], n_top: int = 0) -> Iterator[Scores]:
        """Yield the Scores of texts whose ids have been checked. They are taken as they are needed."""

        def new_cache(n_tokens: int) -> KVCache:
            cache = self.new_cache(max_tokens=n_tokens)
            memory.require(cache, n_tokens, is_new=True, n_logits=cache.chunk)
            return cache

        return passes.scores(self.transformer, all_ids, new_cache, n_top)

    def _ids_of_each(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str) or not isinstance(prompts, Sequence):
            raise InputError(f"prompts are {short_repr(prompts)}; expected a list of texts or of lists of token ids")
        all_ids = []
        for number, prompt in enumerate(prompts):
            with of_prompt(number):
                all_ids.append(self.token_ids(prompt))
        return all_ids

    def embed(self, tokens: Prompt) -> np.ndarray:
        """Return a vector for a text, (D,) float32: the mean of the step "norm" over its tokens.

        Raises InputError as `token_ids`.
        """
        ids = self.token_ids(tokens)
        cache = self.new_cache(max_tokens=len(ids))
        memory.require(cache, len(ids), is_new=True)
        return passes.embedding(self.transformer, ids, cache)

    def text_stream(self, prompt_ids: Sequence[int]) -> TokenStream | None:
        """Return a TokenStream for the text of the ids that follow `prompt_ids`; None for a model without tokenizer."""
        if self.tokenizer is None:
            return None
        n_ids = self.tokenizer.vocab_size  # the model's vocabulary may be larger
        return self.tokenizer.stream(token for token in prompt_ids if token < n_ids)
