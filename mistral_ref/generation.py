"""From a prompt to a stream of tokens: prefill in chunks, then one pass a token, until there is a reason to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mistral_ref.cache import KVCache
from mistral_ref.errors import CacheError, InputError, Progress, checked_int
from mistral_ref.sampling import SamplingSettings, log_softmax, sample
from mistral_ref.text.stream import TokenStream

FinishReason = Literal["eos", "stop", "length", "model_length"]
Stop = str | int | Iterable[str | int] | None
NextLogits = Callable[[Sequence[int], KVCache], np.ndarray]  # takes tokens through a model, returns what follows, (V,)


@dataclass(frozen=True)
class Token:
    """One generated token.

    id              in the model's vocabulary
    text            the text that has become certain with it; pieces of a character, or of what may turn out to be a
                    stop string, are held back until they are decided
    logprob         natural logarithm of its probability by the model alone, before any sampling setting
    finish_reason   None but for the last token: "eos" (the model ended), "stop" (a stop string or id), "length"
                    (max_tokens, or the cache is full), "model_length" (the longest sequence the model is meant for)
    """

    id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None


class StopStrings:
    """Watches a stream of text for the first of some strings, and holds back what may become one.

    >>> watch = StopStrings(["END"])
    >>> watch.push("one E"), watch.push("N"), watch.push("tre END two"), watch.found
    ('one ', '', 'ENtre ', True)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the text that no stop string can claim any more; all before a stop string once one is found."""
        text = self._held + text
        starts = [start for string in self._strings if (start := text.find(string)) >= 0]
        if starts:
            self.found = True
            self._held = ""
            return text[: min(starts)]
        longest = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - longest :]
        return text[: len(text) - longest]

    def flush(self) -> str:
        """Return what is held back, at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Return how many characters at the end of `text` are the beginning of `string`."""
    return next(n for n in range(min(len(text), len(string) - 1), -1, -1) if text.endswith(string[:n]))


def split_stops(stop: Stop, vocab_size: int) -> tuple[tuple[str, ...], frozenset[int]]:
    """Return the stop strings and the stop ids among `stop`, which may be a single one or None."""
    stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else () if stop is None else (stop,)
    if "" in stops:
        raise InputError("stop holds an empty string; expected text, or token ids")
    ids = (checked_int("stop", one, least=0, most=vocab_size - 1) for one in stops if not isinstance(one, str))
    return tuple(one for one in stops if isinstance(one, str)), frozenset(ids)


def prefill(next_logits: NextLogits, ids: Sequence[int], cache: KVCache, progress: Progress | None) -> np.ndarray:
    """Take a prompt through the model, at most `cache.chunk` tokens at a time; return the last token's logits (V,).

    `progress(done, total)` is called before the first chunk and after each.
    """
    for start in range(0, len(ids), cache.chunk):
        if progress is not None:
            progress(start, len(ids))
        logits_V = next_logits(ids[start : start + cache.chunk], cache)
    if progress is not None:
        progress(len(ids), len(ids))
    return logits_V


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """What `Model.generate` was asked for, checked.

    prompt_ids      the prompt
    sampling        how each token is chosen
    max_tokens      how many tokens at most
    seed            makes the draws reproducible; None draws differently each time
    stop_strings, stop_ids      what ends the text; see `split_stops`
    eos_ids         the ids with which the model itself ends a text
    max_seq_len     the longest sequence that the model is meant for; None where it has no limit
    progress        called with (tokens done, tokens in all) while the prompt is read

    Raises InputError for `max_tokens` below 1, and for a seed below 0.
    """

    prompt_ids: Sequence[int]
    sampling: SamplingSettings
    max_tokens: int
    seed: int | None
    stop_strings: tuple[str, ...]
    stop_ids: frozenset[int]
    eos_ids: frozenset[int]
    max_seq_len: int | None
    progress: Progress | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_tokens", checked_int("max_tokens", self.max_tokens, least=1))
        if self.seed is not None:
            object.__setattr__(self, "seed", checked_int("seed", self.seed, least=0))


def generate(
    request: GenerationRequest, next_logits: NextLogits, cache: KVCache, stream: TokenStream | None
) -> Iterator[Token]:
    """Yield tokens until the model ends, a stop is met, `max_tokens` are made or the sequence is `max_seq_len` long.

    Each token is yielded as soon as it is known; the pass for the next one runs when it is asked for, and none runs
    after the last. Texts are empty without a `stream`, for a model without tokenizer, and for ids that the tokenizer
    has no piece for, where the model's vocabulary is larger.
    """
    logits_V = prefill(next_logits, request.prompt_ids, cache, request.progress)
    rng = np.random.default_rng(request.seed)
    length = cache.length
    watch = StopStrings(request.stop_strings)
    seen = list(request.prompt_ids)
    for count in range(1, request.max_tokens + 1):
        token = sample(logits_V, request.sampling, rng, seen)
        logprob = float(log_softmax(logits_V)[token])
        seen.append(token)
        reason: FinishReason | None = "length" if count == request.max_tokens or length == cache.max_tokens else None
        if request.max_seq_len is not None and length + 1 >= request.max_seq_len:
            reason = "model_length"
        text = ""
        if token in request.eos_ids or token in request.stop_ids:
            reason = "eos" if token in request.eos_ids else "stop"
        elif stream and token < stream.tokenizer.vocab_size:
            text = watch.push(stream.push(token))
        if reason is not None and stream and not watch.found:
            text += watch.push(stream.flush()) + watch.flush()
        if watch.found:
            reason = "stop"
        yield Token(token, text, logprob, reason)
        if reason is not None:
            return
        if cache.length != length:
            raise CacheError("the cache has been used by another pass since the last token; this text cannot go on")
        logits_V = next_logits([token], cache)
        length += 1
