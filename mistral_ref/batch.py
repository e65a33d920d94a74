"""Generate several texts at once: one pass makes the next token of each, so every matrix is read once for all of them.

    pass        prompt 0    prompt 1    prompt 2        (at most two at once)
    1           read
    2                       read
    3           token       token
    4           token       the last
    5                                   read
    6           token                   token

Each prompt is read in passes of its own, as without others. A text that has ended leaves, and the next prompt enters.

Each text may have drafts (drafts.py), verified in the same pass. Texts whose drafts were right then get their tokens
before the others, without a pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import NamedTuple

from mistral_ref import memory
from mistral_ref.drafts import Ahead, verify
from mistral_ref.errors import InputError, Progress, checked_int
from mistral_ref.generation import NewText, NextLogits, Token
from mistral_ref.host import available_memory
from mistral_ref.pace import PassTimes
from mistral_ref.prompt import of_prompt
from mistral_ref.request import GenerationRequest
from mistral_ref.text.stream import TokenStream

Row = list[Token | None]


class Waiting(NamedTuple):
    """A text that has not begun: the prompt's number, what is asked for, and what makes text of ids."""

    number: int
    request: GenerationRequest
    stream: TokenStream | None

    @property
    def most_tokens(self) -> int:
        """How many tokens its cache may have to hold."""
        return self.request.most_in_cache(len(self.request.prompt_ids))


class _Running:
    """A text that has begun."""

    def __init__(self, waiting: Waiting, ahead: Ahead) -> None:
        self.number, self.ahead, self.cache, self.most_tokens = waiting.number, ahead, ahead.cache, waiting.most_tokens
        length = len(waiting.request.prompt_ids)
        self._new_text = NewText(waiting.request, length, self.cache.max_tokens, waiting.stream)

    def next(self) -> Token:
        """Return the token that is chosen from the logits behind the text."""
        assert self.ahead.logits_V is not None
        with of_prompt(self.number):
            token = self._new_text.push(self.ahead.logits_V, self.ahead.guess)
        self.ahead.push(token.id, self._new_text.n_left)
        return token

    @property
    def bytes_to_come(self) -> int:
        """How many bytes its cache may still grow by."""
        return self.cache.bytes_for(self.most_tokens) - self.cache.bytes_for(self.cache.length)


def generate_batch(
    texts: Sequence[Waiting],
    next_logits: NextLogits,
    begin: Callable[[int], Ahead],
    *,
    at_once: int,
    progress: Progress | None,
) -> Generator[Row, None, None]:
    """Yield rows of tokens: an entry for each prompt, its next token, or None if it has none in this row.

    begin       makes the cache of a text, for at most so many tokens, and what drafts it
    at_once     at most so many texts have begun and not ended. There are fewer while their caches might grow to more
                than memory holds; one begins in any case
    progress    called with (texts that have ended, all texts) whenever one has ended, and at the beginning
    """
    waiting, running = deque(texts), list[_Running]()
    n_ended, times = 0, PassTimes()

    def row_of(given: dict[int, Token]) -> Row:
        """Return the row of some texts' tokens, after those that have ended have left."""
        nonlocal running, n_ended
        running = [one for one in running if one.number not in given or given[one.number].finish_reason is None]
        ended = sum(token.finish_reason is not None for token in given.values())
        n_ended += ended
        if ended and progress is not None:
            progress(n_ended, len(texts))
        return [given.get(number) for number in range(len(texts))]

    if progress is not None:
        progress(0, len(texts))
    while waiting or running:
        while waiting and len(running) < at_once:
            if running and not _has_room(running, waiting[0]):
                break
            text = waiting.popleft()
            prompt_ids, one = text.request.prompt_ids, _Running(text, begin(text.most_tokens))
            running.append(one)
            with of_prompt(one.number):
                memory.require(one.cache, one.most_tokens, is_new=True, at_once=len(prompt_ids))
                one.ahead.logits_V = next_logits(prompt_ids, one.cache, None)
            yield row_of({one.number: one.next()})
        ready = [one for one in running if one.ahead.logits_V is not None]  # these go on with an accepted draft
        if running and not ready:
            times = times if times.n_texts == len(running) else PassTimes(len(running))
            verify([one.ahead for one in running], times)
            ready = running
        if ready:
            yield row_of({one.number: one.next() for one in ready})


def _has_room(running: Sequence[_Running], waiting: Waiting) -> bool:
    """Return whether memory has room for all caches if another text begins and each grows as much as it may."""
    cache = running[0].cache  # all are of one kind
    left = available_memory() if cache.check_memory else None
    needed = cache.bytes_for(waiting.most_tokens) + sum(one.bytes_to_come for one in running)
    return left is None or needed <= left


def seed_of_each(seed: int | Sequence[int] | None, n: int) -> Sequence[int | None]:
    """Return a seed for each of n prompts; see `Model.generate_batch`. Raises InputError."""
    if seed is None:
        return [None] * n
    if isinstance(seed, Sequence):
        if len(seed) != n:
            raise InputError(f"there are {len(seed)} seeds for {n} prompts; expected one seed for each prompt")
        return seed
    first = checked_int("seed", seed, least=0)
    return range(first, first + n)
