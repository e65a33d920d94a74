"""Model: one object over weights, tokenizer and operations. loading.py makes one from a directory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mistral_ref.cache import DEFAULT_CHUNK, KVCache
from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError, InputError, Progress, short_repr, warn
from mistral_ref.generation import GenerationRequest, Stop, Token, generate, split_stops
from mistral_ref.ops import Ops
from mistral_ref.sampling import SamplingSettings, log_softmax
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.text.stream import TokenStream
from mistral_ref.trace import Trace
from mistral_ref.transformer import Transformer, drain
from mistral_ref.walk import (
    Edit,
    Walk,
    check_edits,
    inside_attention,
    matching_steps,
)
from mistral_ref.weights import Weights

Prompt = str | Sequence[int] | np.ndarray


class Model:
    """A transformer with its tokenizer.

    config      ModelConfig
    weights     the tensors, under Mistral's own names
    ops         the operations that compute with them
    tokenizer   None where the directory has none; prompts are then token ids
    eos_ids     the ids that end a text
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        ops: Ops,
        *,
        tokenizer: SentencePieceTokenizer | None = None,
        eos_ids: Sequence[int] = (),
    ) -> None:
        self.config, self.weights, self.ops, self.tokenizer = config, weights, ops, tokenizer
        self.eos_ids = frozenset(eos_ids) or frozenset([tokenizer.eos_id] if tokenizer else [])
        self.transformer = Transformer(config, weights, ops)

    def __repr__(self) -> str:
        tokenizer = "no tokenizer" if self.tokenizer is None else repr(self.tokenizer)
        return f"<Model of {self.config.n_parameters:,} parameters, {self.ops.dtype} by {self.ops.name}, {tokenizer}>"

    def new_cache(
        self, *, max_tokens: int | None = None, chunk: int = DEFAULT_CHUNK, dtype: str | None = None
    ) -> KVCache:
        """Return an empty cache for one sequence.

        max_tokens  bound on its length; without it the cache grows as needed
        chunk       the longest single pass, and how many tokens can be taken back; a ring has W + chunk - 1 slots
        dtype       what keys and values are stored as: the operations' own, "float16" in half the memory, or "int8" in
                    a quarter of it
        """
        return KVCache(self.config, self.ops, chunk=chunk, max_tokens=max_tokens, dtype=dtype)

    def load_cache(self, path: str | os.PathLike[str]) -> KVCache:
        """Return the cache that `cache.save(path)` wrote."""
        return KVCache.load(path, self.config, self.ops)

    def token_ids(self, prompt: Prompt, cache: KVCache | None = None) -> list[int]:
        """Return a prompt as token ids, each checked to be in [0, V).

        Text is encoded, with BOS in front unless the cache holds tokens already; ids are taken as they are. Raises
        InputError if there is no token, an id is out of range, or the sequence gets longer than the model is meant for.
        """
        self._check_cache(cache)
        length = 0 if cache is None else cache.length
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("this model has no tokenizer; expected token ids, as in generate([1, 2])")
            prompt = self.tokenizer.encode(prompt, bos=length == 0)
        try:
            array = np.asarray(prompt)
        except ValueError:  # rows of different lengths
            array = np.empty(0)
        if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
            raise InputError(
                f"tokens are {short_repr(prompt)}; expected text, or a flat sequence of at least one token id"
            )
        outside = array[(array < 0) | (array >= self.config.vocab_size)]
        if outside.size:
            raise InputError(
                f"token id {outside[0]} is outside the vocabulary; expected 0 to {self.config.vocab_size - 1}"
            )
        longest = self.config.max_seq_len
        if longest is not None and length + array.size > longest:
            raise InputError(f"{length + array.size} tokens; the model is meant for at most {longest} (max_seq_len)")
        ids: list[int] = array.tolist()
        if self.tokenizer is not None and ids[:2] == [self.tokenizer.bos_id] * 2:
            warn("the prompt begins with BOS twice; the model has never seen that")
        return ids

    def forward(
        self,
        tokens: Prompt,
        cache: KVCache | None = None,
        *,
        last_only: bool = False,
        edits: Mapping[str, Edit] | None = None,
    ) -> np.ndarray:
        """Return logits (T, V), or (1, V) of the last token with `last_only`.

        With a cache the tokens follow those in it and are appended; any split into calls gives the same logits. Without
        one nothing is kept. A call that is interrupted keeps the chunks that it has finished: `cache.length` tells.

        `edits` maps names of steps, or globs, to an array or a function of the step's value. An edited pass is never
        split, so T is at most the cache's chunk.
        """
        ids = self.token_ids(tokens, cache)
        if edits:
            touched = check_edits(edits, self.config)
            return self._walk(ids, cache, last_only, inside_attention(touched), edits).finish().copy()
        cache = self.new_cache(max_tokens=len(ids)) if cache is None else cache
        return self._logits(ids, cache, last_only)

    def _logits(self, ids: Sequence[int], cache: KVCache, last_only: bool) -> np.ndarray:
        """Take checked ids through the model, a chunk at a time; return logits of all, or (1, V) of the last."""
        cache.require_room(len(ids))
        logits_TV = np.empty((1 if last_only else len(ids), self.config.vocab_size), self.ops.dtype)
        for start in range(0, len(ids), cache.chunk):
            chunk = np.array(ids[start : start + cache.chunk])
            steps = self.transformer.forward_steps(chunk, cache.begin(len(chunk)), last_only=last_only)
            rows = slice(None) if last_only else slice(start, start + len(chunk))
            logits_TV[rows] = drain(steps, self.ops)
        return logits_TV

    def _next_logits(self, ids: Sequence[int], cache: KVCache) -> np.ndarray:
        return self._logits(ids, cache, last_only=True)[0]

    def steps(self, tokens: Prompt, cache: KVCache | None = None, *, edits: Mapping[str, Edit] | None = None) -> Walk:
        """Return a Walk through the forward pass of these tokens: iterate over it to get every Step.

        With a cache the pass starts after the tokens in it, takes at most `cache.chunk` tokens, and counts once the
        walk has reached its end. `edits` as in `forward`.
        """
        edits = {} if edits is None else edits
        check_edits(edits, self.config)
        return self._walk(self.token_ids(tokens, cache), cache, last_only=False, observe_attention=True, edits=edits)

    def trace(
        self,
        tokens: Prompt,
        *,
        keep: str | Iterable[str] = "*",
        cache: KVCache | None = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> Trace:
        """Return a Trace of the forward pass of these tokens: the values of the steps that `keep` names.

        keep    names or globs of steps, such as "layers.*.attention_weights"; memory is bounded by what they choose
        cache   as in `steps`: the pass starts after the tokens in it, and they are appended
        edits   as in `forward`; what is kept is what the pass went on with
        """
        ids = self.token_ids(tokens, cache)
        edits = {} if edits is None else edits
        touched = check_edits(edits, self.config)
        kept = matching_steps(keep, self.config)
        start = 0 if cache is None else cache.length
        walk = self._walk(ids, cache, False, inside_attention([*kept, *touched]), edits)
        steps = [step for step in walk if step.name in kept]
        pieces = [self.piece(token) for token in ids]
        return Trace(steps, ids, pieces, start=start, made_by=f"{self.ops.dtype} by {self.ops.name}")

    def piece(self, token: int) -> str:
        """Return what a token id stands for, safe to print: its piece, or the id itself where there is none."""
        if self.tokenizer is None or token >= self.tokenizer.vocab_size:
            return f"[{token}]"
        return self.tokenizer.piece(token)

    def _walk(
        self,
        ids: list[int],
        cache: KVCache | None,
        last_only: bool,
        observe_attention: bool,
        edits: Mapping[str, Edit],
    ) -> Walk:
        cache = self.new_cache(max_tokens=len(ids), chunk=len(ids)) if cache is None else cache
        steps = self.transformer.forward_steps(
            np.array(ids), cache.begin(len(ids)), last_only=last_only, observe_attention=observe_attention
        )
        return Walk(steps, self.ops, edits)

    def _check_cache(self, cache: KVCache | None) -> None:
        if cache is None:
            return
        if not isinstance(cache, KVCache):
            raise InputError(f"cache is {short_repr(cache)}; expected one from this model's new_cache()")
        if cache.ops is not self.ops or cache.config != self.config:
            raise CacheError("the cache was made by another model; expected one from this model's new_cache()")

    def score(self, tokens: Prompt) -> np.ndarray:
        """Return the log-probability (T-1,) of each token after the first, given those before it; float64, in nats.

        Memory stays bounded: logits exist for one chunk at a time.
        """
        ids = self.token_ids(tokens)
        cache = self.new_cache(max_tokens=len(ids))
        scores = [np.empty(0)]
        for start in range(0, len(ids) - 1, cache.chunk):
            following = ids[start + 1 : start + cache.chunk + 1]
            logprobs_TV = log_softmax(self._logits(ids[start : start + len(following)], cache, last_only=False))
            scores.append(logprobs_TV[np.arange(len(following)), following])
        return np.concatenate(scores)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: Stop = (),
        cache: KVCache | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Token]:
        """Yield the tokens that follow a prompt, one by one.

        max_tokens          how many at most
        temperature, top_k, top_p, min_p    see sampling.py; temperature 0 takes the likeliest token
        repetition_penalty  concerns the tokens of this prompt and those generated
        seed                makes the draws reproducible
        stop                strings and token ids that end the text; a stop string is not part of it
        cache               holds what comes before the prompt; afterwards also the prompt and all tokens but the last
        progress            called with (tokens done, tokens in all) while the prompt is read

        The texts joined are what decoding prompt and ids together adds to the prompt. Everything is checked before this
        returns. Raises InputError.
        """
        stop_strings, stop_ids = split_stops(stop, self.config.vocab_size)
        if stop_strings and self.tokenizer is None:
            raise InputError("this model has no tokenizer; expected stops as token ids")
        request = GenerationRequest(
            prompt_ids=self.token_ids(prompt, cache),
            sampling=SamplingSettings(
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
            ),
            max_tokens=max_tokens,
            seed=seed,
            stop_strings=stop_strings,
            stop_ids=stop_ids,
            eos_ids=self.eos_ids,
            max_seq_len=self.config.max_seq_len,
            progress=progress,
        )
        n_prompt, longest = len(request.prompt_ids), self.config.max_seq_len
        cache = self.new_cache() if cache is None else cache
        cache.require_room(n_prompt)
        if longest is not None and cache.length + n_prompt >= longest:
            raise InputError(f"the prompt fills the model's {longest} positions (max_seq_len)")
        return generate(request, self._next_logits, cache, self.text_stream(request.prompt_ids))

    def text_stream(self, prompt_ids: Sequence[int]) -> TokenStream | None:
        """Return the stream of the text that follows these ids; None for a model without tokenizer."""
        if self.tokenizer is None:
            return None
        n_pieces = self.tokenizer.vocab_size  # the model's vocabulary may be larger
        return self.tokenizer.stream(token for token in prompt_ids if token < n_pieces)

    def complete(self, prompt: Prompt, **settings: object) -> str:
        """Return the text that `generate` yields for a prompt, all at once; it takes the same settings."""
        return "".join(token.text for token in self.generate(prompt, **settings))  # type: ignore[arg-type]
