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
from mistral_ref.passes import pass_lengths
from mistral_ref.reading import ReadingModel
from mistral_ref.sampling import Distribution, SamplingSettings, distribution
from mistral_ref.transformer import Transformer

MOST = 15  # tokens in a draft
_EACH = 0.2  # what a pass takes longer for a token of a draft, as a part of a token's time, until more is known
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

    The draft has the same vocabulary. It may have more ids, without pieces; only the first n_ids are drafted. Its cache
    may hold the beginning of the text.
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

    def begin(self, ids: Sequence[int]) -> None:
        """Read the text so far, except its last token and what the cache holds of it."""
        before = list(ids[:-1])
        self._cache.truncate(self._cache.shared_with(before))
        unread = before[self._cache.length :]
        if unread and self._left(ids) > 0:
            passes.last_logits(self._transformer, unread, self._cache)
        self._n_read = self._cache.length

    def guesses(self, ids: Sequence[int], n: int) -> list[Guess]:
        """Return n tokens, or fewer: none beyond the longest sequence, and none that only the draft model has."""
        cache, n = self._cache, min(n, self._left(ids))
        if n <= 0:
            return []
        # What was drafted last is in the cache too, right or wrong. The last token is read for its logits.
        agreed = self._n_read + shared_length(cache.tokens[self._n_read :], ids[self._n_read : -1])
        cache.truncate(agreed)
        self._n_read = len(ids) - 1
        unread, text = ids[agreed:], list(ids)
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


class Pace:
    """How many tokens to draft: it follows how many were right lately, and how long passes took.

    right       how often guesses were right lately
    trust       how often they are until more is known
    one         seconds of a pass of one token; None: not known yet
    first, each a pass with a draft of n tokens, and writing the draft, take one * (1 + first + each * n) seconds

    If a share r of the guesses is right, a draft of n tokens gives 1 + r + r^2 + ... + r^n tokens. So few tokens are
    drafted where few are right, and none where a draft takes longer than the tokens it saves:

    >>> pace = Pace(trust=0.5)
    >>> pace.one = 0.1
    >>> [pace.length(MOST) for pace.right in (0.2, 0.5, 0.8, 0.9)]
    [0, 1, 4, 7]
    >>> pace.first = 1.5
    >>> [pace.length(MOST) for pace.right in (0.5, 0.9)]
    [0, 11]
    """

    def __init__(self, trust: float) -> None:
        self.right = self.trust = trust
        self.one: float | None = None
        self.first, self.each = 0.0, _EACH

    def saw(self, is_right: bool | None) -> None:
        """Take into account whether a guess was right. None: there was none, and trust comes back slowly."""
        self.right += (self.trust - self.right) / 256 if is_right is None else (is_right - self.right) / 4

    def took(self, n: int, seconds: float) -> None:
        """Take into account how long a draft of n tokens took, written and verified; or 0 tokens."""
        if n == 0:
            self.one = seconds if self.one is None else min(seconds, self.one + (seconds - self.one) / 8)
            self.first -= self.first / 64  # so that a pass that something held up is forgotten
            self.each += (_EACH - self.each) / 64
        elif self.one:
            # A step of least squares: the line moves half of the way to this point. Something else may have held the
            # pass up, so it counts as twice as long as expected at most.
            expected = 1 + self.first + self.each * n
            error = (min(seconds / self.one, 2 * expected, 2 * MOST) - expected) / (1 + n * n) / 2
            self.first, self.each = max(self.first + error, 0), max(self.each + error * n, 0)

    def length(self, most: int) -> int:
        """Return how many tokens to draft."""
        best, tokens, chance, length = 1.0, 1.0, 1.0, 0
        for n in range(1, most + 1 if self.one else 0):
            chance *= self.right
            tokens += chance
            rate = tokens / (1 + self.first + self.each * n)
            if rate > best:
                best, length = rate, n
        return length


class Ahead:
    """The logits behind the tokens of a text, one after another; drafts are verified on the way.

    drafted     how many drafted tokens have gone through the model

    The cache holds exactly the tokens that the text has. Behind them lie the keys of a draft until they are accepted or
    overwritten.
    """

    def __init__(self, transformer: Transformer, cache: KVCache, drafter: Drafter) -> None:
        self.drafted = 0
        self._transformer, self._cache, self._drafter = transformer, cache, drafter
        self._pace = Pace(drafter.trust)
        self._guesses: list[Guess] = []  # of the next tokens
        self._rows: list[np.ndarray] = []  # the logits behind these, if they have gone through the model
        self._pass: Pass  # of which these are the last tokens

    def prepare(self, n_tokens: int) -> None:
        """Make what verifying drafts after a prompt of so many tokens needs."""
        passes.prepare(self._transformer, self._cache, {2, MOST + 1})
        self._drafter.prepare(n_tokens)

    @property
    def guess(self) -> Guess | None:
        """What was drafted for the next token, if it has gone through the model."""
        return self._guesses[0] if self._rows else None

    def logits_after(self, token: int, n_left: int) -> np.ndarray:
        """Append the text's next token; return the logits (V,) behind it.

        n_left      how many tokens there may be after it

        Raises CacheError if another pass has used the cache meanwhile.
        """
        is_right = self._guesses[0].token == token if self._guesses else None
        self._pace.saw(is_right)
        if is_right and self._rows:
            del self._guesses[0]
        else:
            self._read(token, n_left)
        self._pass = self._cache.commit(self._pass, [token])
        return self._rows.pop(0)

    def _read(self, token: int, n_left: int) -> None:
        """Take a token and a draft through the model."""
        text = [*self._cache.tokens, token]
        if self._pace.one is None:
            self._drafter.begin(text)
        started = time.perf_counter()
        n = self._pace.length(min(MOST, n_left - 1, self._cache.chunk - 1))
        # A guess that costs nothing is made even if it is not verified: the next token tells whether it was right.
        self._guesses = self._drafter.guesses(text, max(n, int(self._drafter.is_free)))
        ids = [token, *(guess.token for guess in self._guesses[:n])]
        self.drafted += len(ids) - 1
        logits_TV, self._pass = passes.logits_ahead(self._transformer, ids, self._cache)
        self._rows = list(logits_TV)
        self._pace.took(len(ids) - 1, time.perf_counter() - started)


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
