"""Generate tokens: the prompt goes through the model in chunks, then each new token in a pass of its own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import numpy as np

from mistral_ref.cache import KVCache, shared_length
from mistral_ref.drafts import Ahead, Guess, LoadedModel
from mistral_ref.errors import CacheError, InputError, Progress, checked_float, checked_int, short_repr, warn
from mistral_ref.sampling import SamplingSettings, choose_drafted, distribution, likeliest, log_softmax, sample
from mistral_ref.stops import Stop, StopStrings
from mistral_ref.text.reply import Kind, ReplyReader
from mistral_ref.text.stream import TokenStream

FinishReason = Literal["eos", "stop", "length", "model_length", "time", "tool_calls"]
LogitsProcessor = Callable[[list[int], np.ndarray], np.ndarray]  # the ids so far, logits (V,) -> logits (V,)
Prepare = Callable[[int, KVCache], None]  # how many tokens the prompt has beyond the cache, the cache
# Token ids, a cache, and what is called with (tokens done, tokens in all) -> the last token's logits (V,).
NextLogits = Callable[[Sequence[int], KVCache, Progress | None], np.ndarray]

_REPEATED = 4  # as many tokens that begin a prompt and also a cache are no chance


class GenerationSettings(TypedDict, total=False):
    """The settings of `Model.generate`, for functions that hand them on. Its docstring explains them."""

    max_tokens: int
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int | None
    stop: Stop
    progress: Progress | None
    cache: KVCache | None
    prompt_cache: KVCache | None
    lookup: bool
    draft: LoadedModel | None
    draft_sampling: bool
    logits_processor: LogitsProcessor | None
    top_logprobs: int
    max_seconds: float | None
    follows: Sequence[int] | None


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
        token = next(self._tokens)
        self.accepted += token.from_draft
        return token

    async def __aiter__(self) -> AsyncIterator[Token]:
        while (token := await asyncio.to_thread(next, self, None)) is not None:
            yield token

    def close(self) -> None:
        """End the text here: there are no more tokens."""
        self._tokens.close()


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """The checked arguments of `Model.generate`.

    prompt_ids      the token ids of the prompt
    shares_prompt   whether the cache may hold a beginning of the prompt; else the prompt follows what the cache holds
    sampling        how each token is chosen
    max_tokens      generate at most this number of tokens
    seed            the same seed gives the same draws; None: different draws each time
    stop_strings, stop_ids      strings and ids that end the text; see `split_stops`
    eos_ids         the model ends a text with one of these ids
    max_seq_len     length of the longest sequence that the model is meant for; None: no maximum
    progress        called with (tokens done, tokens in all) while the prompt is read
    logits_processor, top_logprobs, max_seconds     as in `Model.generate`

    Raises InputError for a value that cannot be used.
    """

    prompt_ids: Sequence[int]
    shares_prompt: bool
    sampling: SamplingSettings
    max_tokens: int
    seed: int | None
    stop_strings: tuple[str, ...]
    stop_ids: frozenset[int]
    eos_ids: frozenset[int]
    max_seq_len: int | None
    progress: Progress | None
    logits_processor: LogitsProcessor | None
    top_logprobs: int
    max_seconds: float | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_tokens", checked_int("max_tokens", self.max_tokens, least=1))
        if self.seed is not None:
            object.__setattr__(self, "seed", checked_int("seed", self.seed, least=0))
        if self.max_seconds is not None:
            checked_float("max_seconds", self.max_seconds, least=0, most=1e9)
        for name in ("progress", "logits_processor"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise InputError(f"{name} is {short_repr(getattr(self, name))}; expected a function")

    def warn_of_mistakes(self, held: Sequence[int], bos_id: int | None) -> None:
        """Warn of settings without effect, and of a prompt that repeats the tokens `held` by the cache it follows.

        The prompt repeats them if all of it, or at least half of them, is shared.
        """
        without_effect = self.sampling.without_effect
        if self.sampling.temperature == 0 and self.seed is not None:
            without_effect.append("seed")
        if without_effect:
            warn(f"temperature is 0, so the likeliest token is always taken; ignored: {', '.join(without_effect)}")
        prompt, before = (ids[1:] if ids[:1] == [bos_id] else ids for ids in (list(self.prompt_ids), list(held)))
        n_shared = shared_length(prompt, before)
        if n_shared >= max(_REPEATED, min(len(prompt), len(before) / 2)):
            warn(
                f"the prompt begins with {n_shared} tokens that the cache begins with too, and they are read a second "
                "time; if the prompt is the whole text, give the cache as prompt_cache="
            )

    def limit(self, count: int, length: int, cache_size: int | None, seconds: float) -> FinishReason | None:
        """Return the limit that a text has reached with its `count`-th token; None if it may go on.

        length      number of tokens in the cache, which does not hold this token yet
        cache_size  the most tokens that the cache holds; None: no maximum
        seconds     how long ago the text began
        """
        if self.max_seq_len is not None and length + 1 >= self.max_seq_len:
            return "model_length"
        if count == self.max_tokens or length == cache_size:
            return "length"
        return "time" if self.max_seconds is not None and seconds >= self.max_seconds else None

    def top_of(self, logprobs_V: np.ndarray) -> tuple[tuple[int, float], ...]:
        """Return the `top_logprobs` likeliest tokens: pairs of an id and its log-probability, the likeliest first."""
        if not self.top_logprobs:
            return ()
        return tuple((int(token), float(logprobs_V[token])) for token in likeliest(logprobs_V, self.top_logprobs))

    def processed(self, ids: Sequence[int], logits_V: np.ndarray) -> np.ndarray:
        """Return the logits (V,) that the logits processor makes of the model's; raise InputError if they are unfit."""
        if self.logits_processor is None:
            return logits_V
        found = self.logits_processor(list(ids), logits_V.copy())
        try:
            array = np.asarray(found)
        except ValueError:  # rows of different lengths
            array = np.empty(0)
        if array.shape != logits_V.shape or array.dtype.kind not in "fiu":
            raise InputError(
                f"logits_processor returned {short_repr(found)}; expected {len(logits_V)} numbers, one for each token"
            )
        if np.isnan(array).any() and not np.isnan(logits_V).any():
            raise InputError(
                f"logits_processor returned NaN for token {np.flatnonzero(np.isnan(array))[0]}; expected a number"
            )
        return array


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
    new_text = NewText(request, cache.length + len(unread), cache.max_tokens, stream)
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
            logits_V = ahead.logits_after(token.id, new_text.n_left)


def answer(tokens: Generation, reader: ReplyReader) -> Generator[Token, None, None]:
    """Yield the tokens of an answer; each says its kind, and the last one whether the answer calls tools."""
    for token in tokens:
        kind = reader.push(token.id)
        calls_tools = token.finish_reason == "eos" and reader.calls_tools
        yield replace(token, kind=kind, finish_reason="tool_calls" if calls_tools else token.finish_reason)
