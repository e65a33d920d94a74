"""BranchedPass: many variants of one text in one pass, each from the token on at which it departs from the text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.ops import KeyView, Ops, Rows
from mistral_ref.ring import Ring

KeysAndValues = tuple[np.ndarray, np.ndarray]  # (T, G, K) each


class BranchedPass:
    """One pass of several branches of a text, laid end to end, so that every matrix is read once for all of them.

    A branch has the tokens of the text from one position on, with other values. The keys and values of the tokens
    before are those of the text. So they are stored once, before those of the branches:

        starts 2, 4 of 5 tokens
        branch              0 0 0   1
        row                 0 1 2   3
        position            2 3 4   4
        slot    0 1 2 3     4 5 6   7
        holds   the text    branch 0, 1

    text        layer -> keys and values of the text, for the layers of this pass
    starts      the position at which each branch begins
    n_tokens    the number of tokens in the text
    last        the rows of each branch's last token
    """

    def __init__(
        self, config: ModelConfig, ops: Ops, text: Mapping[int, KeysAndValues], starts: Sequence[int], n_tokens: int
    ) -> None:
        self._config, self._ops, self._text, self._n_tokens = config, ops, text, n_tokens
        self.starts = starts
        ends = [0, *accumulate(n_tokens - start for start in starts)]
        self.rows = [slice(*pair) for pair in pairwise(ends)]
        self.last: Rows = np.array(ends[1:]) - 1
        self._n_before = max(starts)
        self._store: Any = None

    @property
    def positions(self) -> np.ndarray:
        """The positions (T,) of the tokens, each in its branch."""
        return np.concatenate([np.arange(start, self._n_tokens) for start in self.starts])

    def write(self, layer: int, k_TGK: np.ndarray, v_TGK: np.ndarray) -> None:
        """Store the keys and values of one layer behind those of the text. They stay until the next layer."""
        config, ops, n_before = self._config, self._ops, self._n_before
        n_slots = n_before + len(k_TGK)
        self._store = ops.new_store(n_slots, config.n_kv_heads, config.head_dim, ops.dtype.name)
        if n_before:
            k_SGK, v_SGK = self._text[layer]
            ops.write(self._store, slice(0, n_before), k_SGK[:n_before], v_SGK[:n_before])
        ops.write(self._store, slice(n_before, n_slots), k_TGK, v_TGK)

    def views(self, layer: int, rows: Any = slice(None)) -> list[KeyView]:
        """Return for each branch the keys and values that its queries see; `rows` are all tokens, or `last`."""
        window, stop = self._config.sliding_window[layer], self._n_tokens
        views = []
        for start, own in zip(self.starts, self.rows, strict=True):
            queries = range(start if isinstance(rows, slice) else stop - 1, stop)
            keys = range(Ring(window, None, 1).first_visible(queries.start), stop)
            at_S = np.array(keys)
            slots_S = np.where(at_S < start, at_S, at_S - start + self._n_before + own.start)
            views.append(KeyView(self._store, slots_S, keys, queries, window))
        return views

    def commit(self, tokens_T: np.ndarray) -> None:
        """End the pass; nothing is kept."""
