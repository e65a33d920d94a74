"""Model: weights, tokenizer and operations in one object. `load` (loading.py) makes it from a directory."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Never, SupportsIndex, Unpack, overload
from weakref import WeakSet

import numpy as np

from mistral_ref import memory, passes
from mistral_ref.batch import Row, Waiting, generate_batch, of_prompt
from mistral_ref.cache import DEFAULT_CHUNK, KVCache, check_cache
from mistral_ref.config import ModelConfig
from mistral_ref.drafts import Ahead, Drafter, DraftModel, LoadedModel, Lookup, check_vocabulary
from mistral_ref.errors import InputError, Progress, checked_int, short_repr
from mistral_ref.generation import (
    BatchSettings,
    Generation,
    GenerationRequest,
    GenerationSettings,
    LogitsProcessor,
    answer,
    generate,
)
from mistral_ref.ops import Ops
from mistral_ref.passes import Scores, pass_lengths
from mistral_ref.prompt import Prompt, prompt_ids
from mistral_ref.sampling import SamplingSettings
from mistral_ref.steps import count_values
from mistral_ref.stops import Stop, split_stops
from mistral_ref.text.chat import encode_chat
from mistral_ref.text.reply import ReplyReader
from mistral_ref.text.stream import TokenStream
from mistral_ref.text.tokenizer import Tokenizer
from mistral_ref.trace import Trace
from mistral_ref.transformer import Transformer
from mistral_ref.walk import Edit, Walk, check_edits, inside_attention, matching_steps
from mistral_ref.weights import Weights


class Model:
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
        self._checked_drafts: WeakSet[LoadedModel] = WeakSet([self])
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
        edits: Mapping[str, Edit] | None = None,
    ) -> np.ndarray:
        """Return logits (T, V); with `last_only` the last token's logits (1, V).

        cache       the tokens continue the sequence in the cache and are appended to it. One call with many tokens and
                    several calls with parts of them give the same logits. None: nothing is kept
        edits       a map from names of steps, or globs, to an array or to a function of the step's value. A pass with
                    edits is never split, so T is at most the cache's chunk. Its steps have all tokens, also with
                    `last_only`

        An interrupted call keeps the chunks that are finished: `cache.tokens` holds their tokens. Raises InputError or
        CacheError, also if less memory is left than the logits take.
        """
        ids = self.token_ids(tokens, cache)
        if edits:
            touched = check_edits(edits, self.config)
            logits_TV = self._walk(ids, cache, inside_attention(touched), edits).finish()
            return (logits_TV[-1:] if last_only else logits_TV).copy()
        cache = self.new_cache(max_tokens=len(ids)) if cache is None else cache
        n_logits = 1 if last_only else len(ids)
        if len(ids) > 1:  # one token takes little
            memory.require(
                cache, len(ids), n_logits=min(n_logits, cache.chunk), kept=n_logits * self.config.vocab_size,
                hint="" if last_only else "last_only=True keeps the logits of the last token, and score(tokens) none",
            )  # fmt: skip
        return (passes.last_logits if last_only else passes.logits)(self.transformer, ids, cache)

    def _prepare(self, n_tokens: int, cache: KVCache) -> None:
        """Make what the passes of so many tokens, and then of one token each, need."""
        passes.prepare(self.transformer, cache, {1, *pass_lengths(n_tokens, cache.chunk)}, last_only=True)

    def _next_logits(self, ids: Sequence[int], cache: KVCache, progress: Progress | None = None) -> np.ndarray:
        return passes.last_logits(self.transformer, ids, cache, progress)[0]

    def steps(self, tokens: Prompt, cache: KVCache | None = None, *, edits: Mapping[str, Edit] | None = None) -> Walk:
        """Return a Walk through the forward pass of these tokens. Iterate over it to get every Step.

        cache   the pass starts after the tokens in the cache and takes at most `cache.chunk` tokens. The cache counts
                them when the walk has reached its end
        edits   as in `forward`

        Raises InputError or CacheError.
        """
        edits = {} if edits is None else edits
        check_edits(edits, self.config)
        return self._walk(self.token_ids(tokens, cache), cache, observe_attention=True, edits=edits)

    def trace(
        self,
        tokens: Prompt,
        *,
        keep: str | Iterable[str] = "*",
        cache: KVCache | None = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> Trace:
        """Return a Trace of the forward pass of these tokens: the values of the steps that `keep` names.

        keep    names or globs of steps, for example "layers.*.attention_weights"; only these take memory
        cache   as in `steps`: the pass starts after the tokens in the cache, and its tokens are appended
        edits   as in `forward`; the Trace holds the edited values

        Raises InputError or CacheError.
        """
        ids = self.token_ids(tokens, cache)
        edits = {} if edits is None else edits
        touched = check_edits(edits, self.config)
        kept = matching_steps(keep, self.config)
        start = 0 if cache is None else cache.length
        walk = self._walk(ids, cache, inside_attention([*kept, *touched]), edits, kept)
        steps = [step for step in walk if step.name in kept]
        pieces = [self.piece(token) for token in ids]
        made_by, windows = f"{self.ops.dtype} by {self.ops.name}", self.config.sliding_window
        return Trace(steps, ids, pieces, start=start, made_by=made_by, windows=windows)

    def piece(self, token: int) -> str:
        """Return the tokenizer's piece of a token id, safe to print; "[7]" for an id 7 without a piece."""
        if self.tokenizer is None or token >= self.tokenizer.vocab_size:
            return f"[{token}]"
        return self.tokenizer.piece(token)

    def _walk(
        self,
        ids: list[int],
        cache: KVCache | None,
        observe_attention: bool,
        edits: Mapping[str, Edit],
        kept: Collection[str] = (),
    ) -> Walk:
        cache = self.new_cache(max_tokens=len(ids), chunk=len(ids)) if cache is None else cache
        hint = "keep=... keeps fewer steps" if kept else "over a cache, a pass of fewer tokens has fewer scores"
        memory.require(
            cache, len(ids), n_logits=len(ids), observed=observe_attention,
            kept=count_values(self.config, len(ids), cache.length, kept), hint=hint,
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
            memory.require(cache, n_tokens, n_logits=cache.chunk)
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
        memory.require(cache, len(ids))
        return passes.embedding(self.transformer, ids, cache)

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
        progress: Progress | None = None,
        cache: KVCache | None = None,
        prompt_cache: KVCache | None = None,
        lookup: bool = False,
        draft: LoadedModel | None = None,
        draft_sampling: bool = False,
        logits_processor: LogitsProcessor | None = None,
        top_logprobs: int = 0,
        max_seconds: float | None = None,
        follows: Sequence[int] | None = None,
    ) -> Generation:
        """Return the tokens that follow a prompt: an iterator, which computes each token when it is asked for.

        max_tokens          how many at most
        temperature, top_k, top_p, min_p    see sampling.py. Temperature 0 takes the likeliest token, so the other three
                            change nothing. The command line has other defaults: temperature 0.7 and top_p 0.9
        repetition_penalty  see sampling.py; it applies to the tokens of this prompt and the generated tokens
        seed                the same seed gives the same draws; None: different draws each time
        stop                strings and token ids that end the text; a stop string is not part of the text. The name of
                            a control token, such as "<|im_end|>", is its id too
        progress            called with (tokens done, tokens in all) while the prompt is read
        cache               the prompt follows the tokens in it. Afterwards it also holds the prompt and all generated
                            tokens except the last one; a prompt that goes on there begins with the last token's id
        prompt_cache        the prompt is the whole text, and what the cache holds of its beginning is not computed
                            again. The logits are those over an empty cache, up to rounding. Afterwards it holds the
                            prompt and all generated tokens except the last one. Not together with `cache`
        lookup              draft what followed the newest tokens where they stand earlier in the text, and verify the
                            draft in one pass (drafts.py). The text is the same, and comes sooner if it repeats itself
        draft               a model with the same vocabulary, mostly a smaller one, that drafts its likeliest tokens.
                            This model itself will do, too. Not together with `lookup`
        draft_sampling      the draft draws its tokens, as this model does. Then more of them are accepted at high
                            temperatures. Any text is as likely as without a draft, but the same seed gives another one
        logits_processor    called as logits_processor(ids, logits) before every token: `ids` are those of the prompt
                            and of the generated tokens, `logits` (V,) a copy of the model's. The token is chosen from
                            the logits (V,) that it returns, in which -inf makes a token impossible
        top_logprobs        for how many of the likeliest tokens `Token.top_logprobs` holds the log-probability
        max_seconds         ends the text at the first token that comes so long after the first one was asked for
        follows             the ids that the text of the tokens follows; None: those of the prompt. SentencePiece drops
                            the space before a text that follows nothing

        Decode the prompt and the tokens together: the part after the prompt equals the joined texts of the tokens.
        Log-probabilities are the model's own, before the logits processor and before every sampling setting. All
        arguments are checked before this function returns. Raises InputError or CacheError.
        """
        check_cache(prompt_cache, self.config, self.ops)
        if cache is not None and prompt_cache is not None:
            raise InputError("cache and prompt_cache are both given; expected one of them")
        request = self._request(
            self.token_ids(prompt, cache), seed, shares_prompt=prompt_cache is not None, progress=progress,
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, stop=stop, logits_processor=logits_processor,
            top_logprobs=top_logprobs, max_seconds=max_seconds,
        )  # fmt: skip
        held, longest = [] if cache is None else cache.tokens, self.config.max_seq_len
        end = len(held) + len(request.prompt_ids)
        last = end + request.max_tokens - 1  # the last token is not in the cache
        last = last if longest is None else min(last, max(end, longest))
        used = prompt_cache if cache is None else cache
        used = self.new_cache(max_tokens=last) if used is None else used
        used.require_room(end - used.length)
        n_more, in_prompt = min(last, used.max_tokens or last) - used.length, len(request.prompt_ids)
        memory.require(used, max(n_more, in_prompt), at_once=in_prompt, hint="max_tokens=... asks for a shorter text")
        self._require_positions(end)
        request.warn_of_mistakes(held, None if self.tokenizer is None else self.tokenizer.bos_id)
        stream = self.text_stream(request.prompt_ids if follows is None else follows)
        drafter = self._drafter(lookup, draft, request.sampling if draft_sampling else None, request.seed)
        ahead = None if drafter is None else Ahead(self.transformer, used, drafter)
        return Generation(generate(request, self._prepare, self._next_logits, used, stream, ahead), ahead)

    def _request(
        self,
        ids: list[int],
        seed: int | None,
        *,
        shares_prompt: bool = False,
        progress: Progress | None = None,
        max_tokens: int = 256,
        stop: Stop = (),
        logits_processor: LogitsProcessor | None = None,
        top_logprobs: int = 0,
        max_seconds: float | None = None,
        **sampling: Any,
    ) -> GenerationRequest:
        """Return the checked arguments of `generate`. `sampling` are those of SamplingSettings."""
        stop_strings, stop_ids = split_stops(stop, self.config.vocab_size, self.tokenizer)
        return GenerationRequest(
            prompt_ids=ids,
            shares_prompt=shares_prompt,
            sampling=SamplingSettings(**sampling),
            max_tokens=max_tokens,
            seed=seed,
            stop_strings=stop_strings,
            stop_ids=stop_ids,
            eos_ids=self.eos_ids,
            max_seq_len=self.config.max_seq_len,
            progress=progress,
            logits_processor=logits_processor,
            top_logprobs=checked_int("top_logprobs", top_logprobs, least=0, most=self.config.vocab_size),
            max_seconds=max_seconds,
        )

    def _require_positions(self, n_tokens: int) -> None:
        longest = self.config.max_seq_len
        if longest is not None and n_tokens >= longest:
            raise InputError(f"the prompt fills the model's {longest} positions (max_seq_len); expected a shorter one")

    def _drafter(
        self, lookup: bool, draft: LoadedModel | None, sampling: SamplingSettings | None, seed: int | None
    ) -> Drafter | None:
        """Return what writes drafts; None if nothing does. `sampling` says how a draft draws its tokens."""
        if draft is None:
            if sampling is not None:
                raise InputError("draft_sampling is given without a draft; expected draft=, a model")
            return Lookup() if lookup else None
        if not isinstance(draft, Model):
            raise InputError(f"draft is {short_repr(draft)}; expected a model, as load() returns it")
        if lookup:
            raise InputError("lookup and draft are both given; expected one of them")
        if draft not in self._checked_drafts:
            check_vocabulary(draft, self)  # once: it takes up to a second
            self._checked_drafts.add(draft)
        return DraftModel(draft, self.config.vocab_size, sampling, seed)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        at_once: int = 8,
        seed: int | Sequence[int] | None = None,
        cache_dtype: str | None = None,
        progress: Progress | None = None,
        **settings: Unpack[BatchSettings],
    ) -> Iterator[Row]:
        """Return the tokens that follow several prompts: an iterator over rows, each with an entry for each prompt.

        An entry is the prompt's next Token, or None if this row has none for it. One pass makes the next token of each
        text that has begun and not ended, so many texts take little longer than one. Each gets the tokens that
        `generate` gives it, with a cache and a stream of random numbers of its own.

        at_once     how many texts are in a pass at most. There are fewer while the memory that is left holds no more
                    caches
        seed        a seed for each prompt; one seed s: s, s + 1, ... for the prompts in order; None: different draws
                    each time
        cache_dtype number format of the caches, as in `new_cache`
        progress    called with (texts that have ended, texts in all)
        settings    as in `generate`, the same for all prompts

        All arguments are checked before this function returns. Raises InputError.
        """
        all_ids = self._ids_of_each(prompts)
        seeds = _seed_of_each(seed, len(all_ids))
        requests = [self._request(ids, one, **settings) for ids, one in zip(all_ids, seeds, strict=True)]
        for number, ids in enumerate(all_ids):
            with of_prompt(number):
                self._require_positions(len(ids))
        if requests:
            requests[0].warn_of_mistakes([], None)
        texts = [Waiting(n, request, self.text_stream(request.prompt_ids)) for n, request in enumerate(requests)]
        at_once = checked_int("at_once", at_once, least=1)
        self.new_cache(dtype=cache_dtype)  # refuses a wrong dtype
        return generate_batch(
            texts,
            self._next_logits,
            self._joined_logits,
            lambda n_tokens: self.new_cache(max_tokens=n_tokens, dtype=cache_dtype),
            at_once=at_once,
            progress=progress,
        )

    def _joined_logits(self, ids: Sequence[int], caches: Sequence[KVCache]) -> np.ndarray:
        return passes.joined_logits(self.transformer, [([one], cache) for one, cache in zip(ids, caches, strict=True)])

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        reasoning_effort: str | None = None,
        chat_format: str | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> Generation:
        """Return the tokens of the answer to a conversation. The settings are those of `generate`, without `cache`.

        messages, tools, reasoning_effort, chat_format      see `mistral_ref.text.encode_chat`

        `Token.kind` says what a token belongs to: "text", "thinking" or "tool_call". `parse_reply` makes a message of
        the tokens' ids. With `prompt_cache` each turn of a conversation computes only what is new in it.

        Raises InputError or CacheError.
        """
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer; a conversation cannot be encoded")
        if settings.get("cache") is not None:
            raise InputError("cache is given; expected prompt_cache, since a conversation is the whole text")
        ids = encode_chat(
            messages, self.tokenizer, tools=tools, reasoning_effort=reasoning_effort, chat_format=chat_format
        )
        goes_on = bool(messages[-1].get("prefix"))  # the answer's first words are the last message
        settings["follows"] = None if goes_on else ()
        tokens = self.generate(ids, **settings)
        return Generation(answer(tokens, ReplyReader(self.tokenizer)), tokens.ahead)

    def text_stream(self, prompt_ids: Sequence[int]) -> TokenStream | None:
        """Return a TokenStream for the text of the ids that follow `prompt_ids`; None for a model without tokenizer."""
        if self.tokenizer is None:
            return None
        n_ids = self.tokenizer.vocab_size  # the model's vocabulary may be larger
        return self.tokenizer.stream(token for token in prompt_ids if token < n_ids)

    def complete(self, prompt: Prompt, **settings: Unpack[GenerationSettings]) -> str:
        """Return the whole text that `generate` yields for a prompt. It takes the same settings."""
        return "".join(token.text for token in self.generate(prompt, **settings))


def _seed_of_each(seed: int | Sequence[int] | None, n: int) -> Sequence[int | None]:
    """Return a seed for each of n prompts; see `Model.generate_batch`."""
    if seed is None:
        return [None] * n
    if isinstance(seed, Sequence):
        if len(seed) != n:
            raise InputError(f"there are {len(seed)} seeds for {n} prompts; expected one seed for each prompt")
        return seed
    first = checked_int("seed", seed, least=0)
    return range(first, first + n)
