"""GenerationRequest: what is asked for when a text is generated, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from mistral_ref.cache import shared_length
from mistral_ref.errors import InputError, Progress, checked_float, checked_function, checked_int, short_repr, warn
from mistral_ref.reading import ReadingModel
from mistral_ref.sampling import SamplingSettings, likeliest
from mistral_ref.stops import Stop, split_stops

FinishReason = Literal["eos", "stop", "length", "model_length", "time", "tool_calls"]
LogitsProcessor = Callable[[list[int], np.ndarray], np.ndarray]  # the ids so far, logits (V,) -> logits (V,)

_REPEATED = 4  # as many tokens that begin a prompt and also a cache are no chance


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
        checked_function("progress", self.progress)
        checked_function("logits_processor", self.logits_processor)

    def require_positions(self, n_tokens: int) -> None:
        """Raise InputError if so many tokens, the prompt's end, leave the model no position for another one."""
        if self.max_seq_len is not None and n_tokens >= self.max_seq_len:
            raise InputError(
                f"the prompt fills the model's {self.max_seq_len} positions (max_seq_len); expected a shorter one"
            )

    def most_in_cache(self, end: int) -> int:
        """Return how many tokens a cache may have to hold for a text whose prompt ends with its `end`-th token."""
        last = end + self.max_tokens - 1  # the last token is not in the cache
        return last if self.max_seq_len is None else min(last, max(end, self.max_seq_len))

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


def request_for(
    model: ReadingModel,
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
    """Return what is asked of a model; `sampling` are the settings of SamplingSettings. Raises InputError."""
    stop_strings, stop_ids = split_stops(stop, model.config.vocab_size, model.tokenizer)
    return GenerationRequest(
        prompt_ids=ids,
        shares_prompt=shares_prompt,
        sampling=SamplingSettings(**sampling),
        max_tokens=max_tokens,
        seed=seed,
        stop_strings=stop_strings,
        stop_ids=stop_ids,
        eos_ids=model.eos_ids,
        max_seq_len=model.config.max_seq_len,
        progress=progress,
        logits_processor=logits_processor,
        top_logprobs=checked_int("top_logprobs", top_logprobs, least=0, most=model.config.vocab_size),
        max_seconds=max_seconds,
    )
