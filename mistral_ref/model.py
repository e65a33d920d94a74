"""Model: weights, tokenizer and operations in one object. `load` (loading.py) makes it from a directory.

What it computes of a text that it reads is in reading.py; what is here generates text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Unpack
from weakref import WeakSet

from mistral_ref.batch import Row, Waiting, generate_batch, seed_of_each
from mistral_ref.cache import KVCache, check_cache
from mistral_ref.drafts import Ahead, Drafter, DraftModel, Lookup, check_vocabulary
from mistral_ref.errors import InputError, Progress, checked_function, checked_int, checked_settings, short_repr
from mistral_ref.generation import BatchSettings, Generation, GenerationSettings, answer, cache_for, generate
from mistral_ref.prompt import Prompt, checked_ids, of_prompt
from mistral_ref.reading import ReadingModel
from mistral_ref.request import LogitsProcessor, request_for
from mistral_ref.sampling import SamplingSettings
from mistral_ref.stops import Stop
from mistral_ref.text.chat import encode_chat
from mistral_ref.text.reply import ReplyReader


class Model(ReadingModel):
    """A transformer with its tokenizer. It reads texts as every ReadingModel does, and continues them.

    Its attributes are those of a ReadingModel (reading.py): config, weights, ops, tokenizer, eos_ids, check_memory.
    """

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
        draft: ReadingModel | None = None,
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
                            This model itself will do, too. With `prompt_cache` it also reads only what is new. Not
                            together with `lookup`
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
        check_cache(prompt_cache, self.config, self.ops, "prompt_cache")
        if cache is not None and prompt_cache is not None:
            raise InputError("cache and prompt_cache are both given; expected one of them")
        request = request_for(
            self, self.token_ids(prompt, cache), seed, shares_prompt=prompt_cache is not None, progress=progress,
            max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repetition_penalty=repetition_penalty, stop=stop, logits_processor=logits_processor,
            top_logprobs=top_logprobs, max_seconds=max_seconds,
        )  # fmt: skip
        used = cache_for(self, request, prompt_cache if cache is None else cache)
        before = request.prompt_ids if follows is None else checked_ids("follows", follows, self.config.vocab_size)
        stream = self.text_stream(before)
        drafter = self._drafter(lookup, draft, request.sampling if draft_sampling else None, request.seed, prompt_cache)
        ahead = None if drafter is None else Ahead(self.transformer, used, drafter)
        return Generation(generate(request, self._prepare, self._next_logits, used, stream, ahead), ahead)

    @cached_property
    def _checked_drafts(self) -> WeakSet[ReadingModel]:
        """Models whose vocabulary has been found to be this model's."""
        return WeakSet([self])

    def _drafter(
        self,
        lookup: bool,
        draft: ReadingModel | None,
        sampling: SamplingSettings | None,
        seed: int | None,
        prompt_cache: KVCache | None,
    ) -> Drafter | None:
        """Return what writes drafts; None if nothing does. `sampling` says how a draft draws its tokens."""
        if draft is None:
            if sampling is not None:
                raise InputError("draft_sampling is given without a draft; expected draft=, a model")
            return Lookup() if lookup else None
        if not isinstance(draft, ReadingModel):
            raise InputError(f"draft is {short_repr(draft)}; expected a model, as load() returns it")
        if lookup:
            raise InputError("lookup and draft are both given; expected one of them")
        if draft not in self._checked_drafts:
            check_vocabulary(draft, self)  # once: it takes up to a second
            self._checked_drafts.add(draft)
        cache = draft.new_cache()
        if prompt_cache is not None:
            cache = draft.caches_beside.setdefault(prompt_cache, cache)
        return DraftModel(draft, cache, self.config.vocab_size, sampling, seed)

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        at_once: int = 8,
        seed: int | Sequence[int] | None = None,
        cache_dtype: str | None = None,
        lookup: bool = False,
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
        lookup      draft each text as in `generate`. A text whose draft was right gets tokens in rows in which the
                    others have None
        progress    called with (texts that have ended, texts in all)
        settings    as in `generate`, the same for all prompts

        All arguments are checked before this function returns. Raises InputError.
        """
        checked_function("progress", progress)
        checked_settings(settings, BatchSettings.__annotations__)
        all_ids = self._ids_of_each(prompts)
        seeds = seed_of_each(seed, len(all_ids))
        requests = [request_for(self, ids, one, **settings) for ids, one in zip(all_ids, seeds, strict=True)]
        for number, request in enumerate(requests):
            with of_prompt(number):
                request.require_positions(len(request.prompt_ids))
        if requests:
            requests[0].warn_of_mistakes([], None)
        texts = [Waiting(n, request, self.text_stream(request.prompt_ids)) for n, request in enumerate(requests)]
        at_once = checked_int("at_once", at_once, least=1)
        self.new_cache(dtype=cache_dtype)  # refuses a wrong dtype

        def begin(n_tokens: int) -> Ahead:
            cache = self.new_cache(max_tokens=n_tokens, dtype=cache_dtype)
            return Ahead(self.transformer, cache, Lookup() if lookup else None)

        return generate_batch(
            texts,
            self._next_logits,
            begin,
            at_once=at_once,
            progress=progress,
        )

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

    def complete(self, prompt: Prompt, **settings: Unpack[GenerationSettings]) -> str:
        """Return the whole text that `generate` yields for a prompt. It takes the same settings."""
        return "".join(token.text for token in self.generate(prompt, **settings))
