"""Generate tokens: the prompt goes through the model in chunks, then each new token in a pass of its own."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import numpy as np

from mistral_ref import memory
from mistral_ref.cache import KVCache
from mistral_ref.drafts import Ahead, Guess
from mistral_ref.errors import CacheError, InputError, Progress
from mistral_ref.pace import PassTimes
from mistral_ref.reading import ReadingModel
from mistral_ref.request import FinishReason, GenerationRequest, LogitsProcessor
from mistral_ref.sampling import choose_drafted, distribution, log_softmax, sample
from mistral_ref.stops import Stop, StopStrings
from mistral_ref.text.reply import Kind, ReplyReader
from mistral_ref.text.stream import TokenStream

Prepare = Callable[[int, KVCache], None]  # how many tokens the prompt has beyond the cache, the cache
# Token ids, a cache, and what is called with (tokens done, tokens in all) -> the last token's logits (V,).
NextLogits = Callable[[Sequence[int], KVCache, Progress | None], np.ndarray]


class BatchSettings(TypedDict, total=False):
    """The settings of `Model.generate` that `Model.generate_batch` takes as well."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    stop: Stop
    logits_processor: LogitsProcessor | None
    top_logprobs: int
    max_seconds: float | None


class GenerationSettings(BatchSettings, total=False):
    """The settings of `Model.generate`, for functions that hand them on. Its docstring explains them."""

    seed: int | None
    progress: Progress | None
    cache: KVCache | None
    prompt_cache: KVCache | None
    lookup: bool
    draft: ReadingModel | None
    draft_sampling: bool
    follows: Sequence[int] | None


@dataclass(frozen=True)
class Token:
    """One generated token.

    id              the token's number in the model's vocabulary
    text            the text that this token makes certain. Two kinds of text are held back for later tokens: a part of
                    a character, and text that may be the beginning of a stop string
    logprob         natural logarithm of the token's probability by the model alone, before any sampling setting
    finish_reason   for the last token the reason to end; None for the tokens before. "eos": the model ended the text;
                    "stop": a stop string or stop id; "length": max_tokens, or the cache is full; "model_length": the
                    longest sequence that the model is meant for; "time": max_seconds; "tool_calls": the model ended an
                    answer (`Model.chat`) in which it calls tools
    kind            what the token belongs to in an answer: "text", "thinking" or "tool_call"; elsewhere "text"
    stop            the stop string or the stop id that ended the text; None unless the reason is "stop"
    top_logprobs    the likeliest tokens here, as many as asked for: pairs of an id and its logprob, the likeliest first
    from_draft      whether a draft had this token, so that it needed no pass of its own
    """

    id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None
    kind: Kind = "text"
    stop: str | int | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    from_draft: bool = False


class Generation(Iterator[Token]):
    """The tokens of one text, each computed when it is asked for. `Model.generate` returns it.

    `async for token in ...` computes each token in another thread, so the event loop goes on meanwhile. A task that is
    cancelled ends the text after the pass that is running.

    accepted    how many of the tokens so far a draft had
    ahead       what verifies drafts; None without drafts
    """

    def __init__(self, tokens: Generator[Token, None, None], ahead: Ahead | None = None) -> None:
        self._tokens, self.ahead = tokens, ahead
        self.accepted = 0

    @property
    def drafted(self) -> int:
        """How many drafted tokens have gone through the model so far."""
        return 0 if self.ahead is None else self.ahead.drafted

    def __next__(self) -> Token:
        if inspect.getgeneratorstate(self._tokens) == inspect.GEN_RUNNING:
            raise InputError("another thread waits for this text's next token; expected one thread at a time")
        token = next(self._tokens)
        self.accepted += token.from_draft
        return token

    async def __aiter__(self) -> AsyncIterator[Token]:
        while (token := await asyncio.to_thread(next, self, None)) is not None:
            yield token

    def close(self) -> None:
        """End the text here: there are no more tokens."""
        self._tokens.close()


class NewText:
    """The text after a prompt, token by token: `push` takes logits and returns the token that is chosen from them.

    length      number of tokens in the cache when the next token is chosen
    cache_size  the most tokens that the cache holds; None: no maximum
    stream      makes text of ids; None for a model without tokenizer
    """

    def __init__(
        self, request: GenerationRequest, length: int, cache_size: int | None, stream: TokenStream | None
    ) -> None:
        self.length = length
        self._request, self._cache_size, self._stream = request, cache_size, stream
        self._count, self._started = 0, time.monotonic()
        self._rng = np.random.default_rng(request.seed)
        self._watch = StopStrings(request.stop_strings)
        self._seen = list(request.prompt_ids)

    @property
    def n_left(self) -> int:
        """How many tokens there may still be."""
        sizes = [self._cache_size, None if self._request.max_seq_len is None else self._request.max_seq_len - 1]
        room = (size - self.length + 1 for size in sizes if size is not None)
        return min([self._request.max_tokens - self._count, *room])

    def push(self, logits_V: np.ndarray, guess: Guess | None = None) -> Token:
        """Return the next token. `logits_V` (V,) are those after the tokens before it, `guess` what was drafted for it.

        Its text is empty without a stream, and for an id without a piece (the model's vocabulary may be larger than the
        tokenizer's).
        """
        request = self._request
        token = self._choose(request.processed(self._seen, logits_V), guess)
        logprobs_V = log_softmax(logits_V)
        self._seen.append(token)
        self._count += 1
        reason = request.limit(self._count, self.length, self._cache_size, time.monotonic() - self._started)
        self.length += 1
        text, reason, stop = self._text_of(token, reason)
        return Token(
            token, text, float(logprobs_V[token]), reason, "text", stop, request.top_of(logprobs_V),
            from_draft=guess is not None and guess.token == token,
        )  # fmt: skip

    def _choose(self, logits_V: np.ndarray, guess: Guess | None) -> int:
        sampling = self._request.sampling
        if guess is None or guess.drawn_from is None:
            return sample(logits_V, sampling, self._rng, self._seen)
        own = distribution(logits_V, sampling, self._seen)
        return choose_drafted(guess.token, guess.drawn_from, own, self._rng)

    def _text_of(self, token: int, reason: FinishReason | None) -> tuple[str, FinishReason | None, str | int | None]:
        """Return a token's text, the reason to end and the stop; `reason` is the limit that the text has reached."""
        request, stream, watch = self._request, self._stream, self._watch
        text = ""
        stop: str | int | None = None
        if token in request.eos_ids:
            reason = "eos"
        elif token in request.stop_ids:
            reason, stop = "stop", token
        elif stream and token < stream.tokenizer.vocab_size:
            text = watch.push(stream.push(token))
        if reason is not None and stream and watch.found is None:
            text += watch.push(stream.flush()) + watch.flush()
        if watch.found is not None:
            reason, stop = "stop", watch.found
        return text, reason, stop


def cache_for(model: ReadingModel, request: GenerationRequest, given: KVCache | None) -> KVCache:
    """Return the cache of a text: the one that is given, or a new one. Warns of what the request does by mistake.

    Raises InputError or CacheError if the text has no room: in the cache, in memory, or in the model's positions.
    """
    held = [] if given is None or request.shares_prompt else given.tokens
    in_prompt = len(request.prompt_ids)
    end = len(held) + in_prompt
    last = request.most_in_cache(end)
    cache = model.new_cache(max_tokens=last) if given is None else given
    cache.require_room(end - cache.length)
    n_more = min(last, cache.max_tokens or last) - cache.length
    memory.require(
        cache, max(n_more, in_prompt), is_new=given is None, at_once=in_prompt,
        hint="max_tokens=... asks for a shorter text",
    )  # fmt: skip
    request.require_positions(end)
    request.warn_of_mistakes(held, None if model.tokenizer is None else model.tokenizer.bos_id)
    return cache


def generate(
    request: GenerationRequest,
    prepare: Prepare,
    next_logits: NextLogits,
    cache: KVCache,
    stream: TokenStream | None,
    ahead: Ahead | None,
) -> Generator[Token, None, None]:
    """Yield tokens until there is a reason to end (`Token.finish_reason`).

    Each token is yielded as soon as it is known. The pass for the next token runs when the caller asks for that token,
    unless it has been verified as a part of a draft (`ahead`). No pass runs after the last token.

    Raises CacheError if the cache is full, or if another pass uses it between two tokens.
    """
    n_kept = cache.keep_shared(request.prompt_ids[:-1]) if request.shares_prompt else 0
    unread = request.prompt_ids[n_kept:]
    prepare(len(unread), cache)
    if ahead is not None:
        ahead.prepare(cache.length + len(unread))
    new_text, times = NewText(request, cache.length + len(unread), cache.max_tokens, stream), PassTimes()
    logits_V = next_logits(unread, cache, request.progress)
    while True:
        token = new_text.push(logits_V, None if ahead is None else ahead.guess)
        yield token
        if token.finish_reason is not None:
            return
        if cache.length != new_text.length - 1:
            raise CacheError("another pass has used the cache since the last token; this text cannot go on")
        if ahead is None:
            logits_V = next_logits([token.id], cache, None)
        else:
            logits_V = ahead.logits_after(token.id, new_text.n_left, times)


def answer(tokens: Generation, reader: ReplyReader) -> Generator[Token, None, None]:
    """Yield the tokens of an answer; each says its kind, and the last one whether the answer calls tools."""
    for token in tokens:
        kind = reader.push(token.id)
        calls_tools = token.finish_reason == "eos" and reader.calls_tools
        yield replace(token, kind=kind, finish_reason="tool_calls" if calls_tools else token.finish_reason)
