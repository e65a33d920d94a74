"""Drafts: the next tokens are guessed, and one pass of the model verifies all of them.

A pass reads every weight once, for one token or for a few. So a few guessed tokens, a draft, can go through the model
with the newest token at little cost. Behind each of them stand the logits of what follows it. As long as the token that
is chosen from them is the drafted one, it is accepted, and needs no pass of its own:

    text            the cat sat and the
    draft                               cat ran off
    in one pass                     the cat ran off
    chosen                              cat ran away        two tokens are accepted, and "away" is the third

Every token is chosen from the model's own logits, with its own random number, as without a draft. So the text is the
same. With `draft_sampling` the draft draws its tokens, and some are accepted by chance (sampling.choose_drafted): all
texts are then as likely as without a draft, but the same seed gives another one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mistral_ref import passes
from mistral_ref.cache import KVCache, Pass, shared_length
from mistral_ref.errors import InputError
from mistral_ref.pace import MOST, Pace, PassTimes
from mistral_ref.passes import pass_lengths
from mistral_ref.reading import ReadingModel
from mistral_ref.sampling import Distribution, SamplingSettings, distribution
from mistral_ref.transformer import Transformer

_SHORTEST, _LONGEST = 2, 12  # of the newest tokens, as many are looked up
_CHARACTERS = 0x110000


class Guess(NamedTuple):
    """A drafted token; if it was drawn, the distribution it was drawn from."""

    token: int
    drawn_from: Distribution | None = None


class Drafter(Protocol):
    """What writes drafts.

    trust       how often its guesses are right until more is known
    is_free     whether guessing costs nothing, so that only verifying does
    """

    trust: float
    is_free: bool

    def prepare(self, n_tokens: int) -> None:
        """Make what drafts for a text of so many tokens need, such as compiled kernels."""

    def begin(self, ids: Sequence[int]) -> None:
        """Read the text so far."""

    def guesses(self, ids: Sequence[int], n: int) -> list[Guess]:
        """Return at most n tokens that may follow the text `ids`. The text only grows from call to call."""
        ...


class Lookup:
    """Drafts what followed the newest tokens where they stand earlier in the text.

    The longest match counts; of equally long ones, the newest.

    >>> [guess.token for guess in Lookup().guesses([7, 8, 9, 5, 7, 8], 3)]
    [9, 5, 7]
    """

    trust, is_free = 0.2, True

    def __init__(self) -> None:
        self._text = ""  # a character for each token: Python searches strings fast

    def prepare(self, n_tokens: int) -> None:
        """Nothing needs to be prepared."""

    def begin(self, ids: Sequence[int]) -> None:
        """The text is read when tokens are looked up."""

    def guesses(self, ids: Sequence[int], n: int) -> list[Guess]:
        """Return n tokens, or none: then the last two tokens stand nowhere earlier in the text."""
        # Tokens beyond the last character share characters with others. Then a guess may be wrong.
        self._text += "".join(chr(token % _CHARACTERS) for token in ids[len(self._text) :])
        text, start = self._text, None
        end = len(text) - 1
        for length in range(_SHORTEST, min(_LONGEST, end) + 1):
            found = text.rfind(text[-length:], 0, end)
            if found < 0:
                break
            start = end = found + length  # a longer match ends here, or earlier
        if start is None:
            return []
        period = len(text) - start  # what follows the text is again what follows the match
        return [Guess(ids[start + number % period]) for number in range(n)]


class DraftModel:
    """Drafts what a second model says: its likeliest tokens or, with `sampling`, tokens drawn from it.

    The draft has the same vocabulary. It may have more ids, without pieces; only the first n_ids are drafted. It may
    have fewer; behind an id that it lacks it drafts nothing. Its cache may hold the beginning of the text.
    """

    trust, is_free = 0.5, False

    def __init__(
        self, draft: ReadingModel, cache: KVCache, n_ids: int, sampling: SamplingSettings | None, seed: int | None
    ) -> None:
        self._transformer, self._cache, self._n_ids, self._sampling = draft.transformer, cache, n_ids, sampling
        self._rng = np.random.default_rng(None if seed is None else (seed, 1))
        self._n_read = 0  # so much of the text is known to be in the cache

    def prepare(self, n_tokens: int) -> None:
        """Compile the kernels for reading so many tokens, and then a few at a time."""
        lengths = {1, MOST + 1, *pass_lengths(n_tokens, self._cache.chunk)}
        passes.prepare(self._transformer, self._cache, lengths, last_only=True)

    def _left(self, ids: Sequence[int]) -> int:
        """Return how many tokens may follow a text in the longest sequence that the model is meant for."""
        longest = self._transformer.config.max_seq_len
        return MOST if longest is None else longest - len(ids)

    def _has(self, ids: Sequence[int]) -> bool:
        return max(ids) < self._transformer.config.vocab_size

    def begin(self, ids: Sequence[int]) -> None:
        """Read the text so far, except its last token and what the cache holds of it."""
        before = list(ids[:-1])
        self._cache.truncate(self._cache.shared_with(before))
        unread = before[self._cache.length :]
        if unread and self._left(ids) > 0 and self._has(unread):
            passes.last_logits(self._transformer, unread, self._cache)
        self._n_read = self._cache.length

    def guesses(self, ids: Sequence[int], n: int) -> list[Guess]:
        """Return n tokens, or fewer: none beyond the longest sequence, and none that only one of the models has."""
        cache, n = self._cache, min(n, self._left(ids))
        if n <= 0:
            return []
        # What was drafted last is in the cache too, right or wrong. The last token is read for its logits.
        agreed = self._n_read + shared_length(cache.tokens[self._n_read :], ids[self._n_read : -1])
        cache.truncate(agreed)
        self._n_read = agreed
        unread, text = ids[agreed:], list(ids)
        if not self._has(unread):
            return []
        self._n_read = len(ids) - 1
        drafted: list[Guess] = []
        while len(drafted) < n:
            logits_V = passes.last_logits(self._transformer, unread, cache)[0]
            guess = self._choose(logits_V, text)
            if guess.token >= self._n_ids:
                break
            drafted.append(guess)
            text.append(guess.token)
            unread = [guess.token]
        return drafted

    def _choose(self, logits_V: np.ndarray, text: Sequence[int]) -> Guess:
        if self._sampling is None:
            return Guess(int(np.argmax(logits_V)))
        drawn_from = distribution(logits_V, self._sampling, text)
        return Guess(drawn_from.draw(self._rng), drawn_from)


class Ahead:
    """The logits behind the newest token of a text; drafts of the tokens after it are verified on the way.

    cache       holds exactly the tokens that the text has. Behind them lie the keys of a draft until they are accepted
                or overwritten
    logits_V    the logits (V,) behind the text; None: `verify` has to compute them
    drafted     how many drafted tokens have gone through the model
    """

    def __init__(self, transformer: Transformer, cache: KVCache, drafter: Drafter | None) -> None:
        self.transformer, self.cache, self.drafted = transformer, cache, 0
        self.logits_V: np.ndarray | None = None
        self._drafter, self._has_begun = drafter, False
        self._pace = Pace(0 if drafter is None else drafter.trust)
        self._token, self._n_left = 0, 0  # the newest token, and how many there may be after it
        self._guesses: list[Guess] = []  # of the next tokens
        self._rows: list[np.ndarray] = []  # the logits behind these, if they have gone through the model
        self._pass: Pass  # of which these are the last tokens

    def prepare(self, n_tokens: int) -> None:
        """Make what verifying drafts after a prompt of so many tokens needs."""
        passes.prepare(self.transformer, self.cache, {2, 3, MOST + 1})
        if self._drafter is not None:
            self._drafter.prepare(n_tokens)

    @property
    def guess(self) -> Guess | None:
        """What was drafted for the next token, if it has gone through the model."""
        return self._guesses[0] if self._rows else None

    def push(self, token: int, n_left: int) -> None:
        """Append the text's next token. If it was drafted and verified, the logits behind it are here.

        n_left      how many tokens there may be after it

        Raises CacheError if another pass has used the cache meanwhile.
        """
        is_right = self._guesses[0].token == token if self._guesses else None
        self._pace.saw(is_right)
        self._token, self._n_left, self.logits_V = token, n_left, None
        if is_right and self._rows:
            del self._guesses[0]
            self._accept()

    def logits_after(self, token: int, n_left: int, times: PassTimes) -> np.ndarray:
        """Append the text's next token, as `push`; return the logits (V,) behind it. It may take a pass."""
        self.push(token, n_left)
        if self.logits_V is None:
            verify([self], times)
        assert self.logits_V is not None
        return self.logits_V

    def _accept(self) -> None:
        self._pass = self.cache.commit(self._pass, [self._token])
        self.logits_V = self._rows.pop(0)

    def begin(self) -> None:
        """Let the drafter read the text so far, once."""
        if self._drafter is not None and not self._has_begun:
            self._drafter.begin([*self.cache.tokens, self._token])
            self._has_begun = True

    def unread(self, times: PassTimes) -> list[int]:
        """Return what the next pass has to take: the newest token and a draft."""
        if self._drafter is None:
            return [self._token]
        text = [*self.cache.tokens, self._token]
        n = self._pace.length(times, min(times.most, self._n_left - 1, self.cache.chunk - 1))
        # A guess that costs nothing is made even if it is not verified: the next token tells whether it was right.
        self._guesses = self._drafter.guesses(text, max(n, int(self._drafter.is_free)))
        drafted = [guess.token for guess in self._guesses[:n]]
        self.drafted += len(drafted)
        return [self._token, *drafted]

    def take(self, logits_TV: np.ndarray, this_pass: Pass) -> None:
        """Take the logits behind the tokens that `unread` has returned, and their pass."""
        self._rows, self._pass = list(logits_TV), this_pass
        self._accept()


def verify(texts: Sequence[Ahead], times: PassTimes) -> None:
    """Compute the logits behind some texts, and behind what is drafted for them, in one pass.

    Raises CacheError if another pass has used a cache meanwhile.
    """
    for text in texts:
        text.begin()  # a long text takes long, and says nothing of how long a pass takes
    started = time.perf_counter()
    parts = [(text.unread(times), text.cache) for text in texts]
    for text, (logits_TV, this_pass) in zip(texts, passes.logits_ahead(texts[0].transformer, parts), strict=True):
        text.take(logits_TV, this_pass)
    times.took(sum(len(ids) - 1 for ids, _ in parts), time.perf_counter() - started)


def check_vocabulary(draft: ReadingModel, own: ReadingModel) -> None:
    """Raise InputError unless the ids of a draft mean what the model's own do: each has the same piece."""
    found, expected = (
        f"{model.config.vocab_size} ids without a tokenizer"
        if model.tokenizer is None
        else f"{model.tokenizer.vocab_size} ids"
        for model in (draft, own)
    )
    if found == expected and draft.tokenizer is not None and own.tokenizer is not None:
        for token in range(own.tokenizer.vocab_size):
            found, expected = (f"id {token} is {one.piece(token)!r}" for one in (draft.tokenizer, own.tokenizer))
            if found != expected:
                break
    if found != expected:
        raise InputError(f"draft has another vocabulary: {found}; expected {expected}, as in the model")
