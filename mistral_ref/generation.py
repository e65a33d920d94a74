"""Generate tokens: the prompt goes through the model in chunks, then each new token in a pass of its own."""

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
NextLogits = Callable[[Sequence[int], KVCache], np.ndarray]  # token ids, a cache -> the last token's logits (V,)


@dataclass(frozen=True)
class Token:
    """One generated token.

    id              the token's number in the model's vocabulary
    text            the text that this token makes certain. Two kinds of text are held back for later tokens: a part of
                    a character, and text that may be the beginning of a stop string
    logprob         natural logarithm of the token's probability by the model alone, before any sampling setting
    finish_reason   for the last token the reason to end; None for the tokens before. "eos": the model ended the text;
                    "stop": a stop string or stop id; "length": max_tokens, or the cache is full; "model_length": the
                    longest sequence that the model is meant for
    """

    id: int
    text: str
    logprob: float
    finish_reason: FinishReason | None = None


class StopStrings:
    """Watch a stream of text for stop strings. Text that may be the beginning of a stop string is held back.

    >>> watch = StopStrings(["END"])
    >>> watch.push("one E"), watch.push("N"), watch.push("tre END two"), watch.found
    ('one ', '', 'ENtre ', True)
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take the next text; return the text that cannot be part of a stop string.

        If a stop string is found, the result is the text before it, and `found` becomes true.
        """
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
        """Return the text that is held back. Call this at the end of the stream."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """Return how many characters at the end of `text` are also the beginning of `string`."""
    return next(n for n in range(min(len(text), len(string) - 1), -1, -1) if text.endswith(string[:n]))


def split_stops(stop: Stop, vocab_size: int) -> tuple[tuple[str, ...], frozenset[int]]:
    """Return the stop strings and the stop ids in `stop`. `stop` is one of them, several of them, or None.

    Raises InputError for an empty string, or for an id outside [0, vocab_size).
    """
    stops = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, str) else () if stop is None else (stop,)
    if "" in stops:
        raise InputError("stop holds an empty string; expected text, or token ids")
    ids = (checked_int("stop", one, least=0, most=vocab_size - 1) for one in stops if not isinstance(one, str))
    return tuple(one for one in stops if isinstance(one, str)), frozenset(ids)


def prefill(next_logits: NextLogits, ids: Sequence[int], cache: KVCache, progress: Progress | None) -> np.ndarray:
    """Take a prompt through the model, at most `cache.chunk` tokens a pass; return the last token's logits (V,).

    `progress(done, total)` is called before each chunk and at the end.
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
    """The checked arguments of `Model.generate`.

    prompt_ids      the token ids of the prompt
    sampling        how each token is chosen
    max_tokens      generate at most this number of tokens
    seed            the same seed gives the same draws; None: different draws each time
    stop_strings, stop_ids      strings and ids that end the text; see `split_stops`
    eos_ids         the model ends a text with one of these ids
    max_seq_len     length of the longest sequence that the model is meant for; None: no maximum
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
    """Yield tokens until there is a reason to end (`Token.finish_reason`).

    Each token is yielded as soon as it is known. The pass for the next token runs when the caller asks for that token.
    No pass runs after the last token. The text of a token is empty without a `stream` (a model without tokenizer), and
    for an id without a piece (the model's vocabulary may be larger than the tokenizer's).

    Raises CacheError if the cache is full, or if another pass uses it between two tokens.
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
            raise CacheError("another pass has used the cache since the last token; this text cannot go on")
        logits_V = next_logits([token], cache)
        length += 1
