"""Pace: how many tokens to draft, so that texts come sooner with drafts (drafts.py) than without."""

from __future__ import annotations

MOST = 15  # tokens in a draft
_SAME_BITS = 24  # up to so many tokens in a pass, compiled kernels give a token of float weights the same bits as alone
_EACH = 0.2  # what a pass takes longer for a token of a draft, as a part of a token's time, until more is known


class PassTimes:
    """How long passes take that go on with n texts, with and without drafts.

    n_texts     every pass takes the newest token of each
    one         seconds of a pass without drafts; None: fewer than two have been measured
    first, each a pass with n drafted tokens in all, and writing them, take one * (1 + first + each * n) seconds
    """

    def __init__(self, n_texts: int = 1) -> None:
        self.n_texts = n_texts
        self.one: float | None = None
        self._only: float | None = None  # seconds of the first
        self.first, self.each = 0.0, _EACH

    @property
    def most(self) -> int:
        """How many tokens to draft for each text at most, so that kernels give every token the same bits as alone."""
        return min(MOST, _SAME_BITS // self.n_texts - 1)

    def took(self, n: int, seconds: float) -> None:
        """Take into account how long a pass with n drafted tokens took, written and verified; or with 0."""
        if n == 0:
            if self._only is None:  # it may have been held up, by a disk for example
                self._only = seconds
                return
            before = self.one or self._only
            self.one = min(seconds, before + (seconds - before) / 8)
            self.first -= self.first / 64  # so that a pass that something held up is forgotten
            self.each += (_EACH - self.each) / 64
        elif self.one:
            # A step of least squares: the line moves half of the way to this point. Something else may have held the
            # pass up, so it counts as twice as long as expected at most.
            expected = 1 + self.first + self.each * n
            error = (min(seconds / self.one, 2 * expected, 2 * MOST) - expected) / (1 + n * n) / 2
            self.first, self.each = max(self.first + error, 0), max(self.each + error * n, 0)


class Pace:
    """How many tokens to draft for a text: it follows how many were right lately.

    right       how often guesses were right lately
    trust       how often they are until more is known

    If a share r of the guesses is right, a draft of n tokens gives r + r^2 + ... + r^n tokens more. So few tokens are
    drafted where few are right, and none where a draft takes longer than the tokens it saves:

    >>> pace, times = Pace(trust=0.5), PassTimes()
    >>> times.one = 0.1
    >>> [pace.length(times, MOST) for pace.right in (0.2, 0.5, 0.8, 0.9)]
    [0, 1, 4, 7]
    >>> times.first = 1.5
    >>> [pace.length(times, MOST) for pace.right in (0.5, 0.9)]
    [0, 11]
    """

    def __init__(self, trust: float) -> None:
        self.right = self.trust = trust

    def saw(self, is_right: bool | None) -> None:
        """Take into account whether a guess was right. None: there was none, and trust comes back slowly."""
        self.right += (self.trust - self.right) / 256 if is_right is None else (is_right - self.right) / 4

    def length(self, times: PassTimes, most: int) -> int:
        """Return how many tokens to draft, as if this text alone had a draft."""
        best = tokens = float(times.n_texts)
        chance, length = 1.0, 0
        for n in range(1, most + 1 if times.one else 0):
            chance *= self.right
            tokens += chance
            rate = tokens / (1 + times.first + times.each * n)
            if rate > best:
                best, length = rate, n
        return length
