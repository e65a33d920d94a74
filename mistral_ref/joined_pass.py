"""JoinedPass: the passes of several sequences, laid end to end, so that every matrix is read once for all of them.

Only positions and keys belong to one sequence. So the forward pass asks this object for them, as it asks a Pass, and
computes everything else token by token, whosever the token is.

    sequence    first     second    third
    tokens      a b c     d         e f
    positions   0 1 2     7         3 4
    row         0 1 2     3         4 5
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from mistral_ref.cache import Pass
from mistral_ref.ops import KeyView


class JoinedPass:
    """One pass of several sequences. Each has a Pass over a cache of its own.

    passes      the passes, in the order of their tokens
    last        the tokens whose logits are computed: all
    """

    last = slice(None)

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = passes
        self._ends = np.cumsum([0, *(one.n_tokens for one in passes)]).tolist()

    def parts(self) -> Iterator[tuple[Pass, slice]]:
        """Yield each pass, and the rows of its tokens."""
        return ((one, slice(*ends)) for one, ends in zip(self.passes, pairwise(self._ends), strict=True))

    @property
    def positions(self) -> np.ndarray:
        """The positions (T,) of the tokens, each within its sequence."""
        return np.concatenate([one.positions for one in self.passes])

    def write(self, layer: int, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None:
        """Put the keys and values of one layer in the caches, as `Pass.write` does."""
        for one, rows in self.parts():
            one.write(layer, k_TGK[rows], v_TGK[rows])

    def views(self, layer: int, rows: slice = last) -> list[KeyView]:
        """Return for each sequence the keys and values of one layer that its queries see; `rows` are all tokens."""
        assert rows == self.last
        return [view for one in self.passes for view in one.views(layer)]

    def commit(self, tokens_T: Sequence[int] | np.ndarray) -> None:
        """End the pass: each cache gets its tokens. Raises CacheError, before any cache gets them, as `Pass.check`."""
        for one in self.passes:
            one.check()
        for one, rows in self.parts():
            one.commit(tokens_T[rows])
