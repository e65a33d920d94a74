"""Caches that are wrong on purpose: rings with the wrong number of slots, or keys read from the wrong ones."""

from __future__ import annotations

import dataclasses

import numpy as np

from mistral_ref.cache import KVCache, Pass
from mistral_ref.ops import KeyView
from mistral_ref.ring import Ring


class ShortRingCache(KVCache):
    """Rings of W + chunk - 2 slots, one too few. In a full pass the newest key overwrites the oldest visible key."""

    def _new_ring(self, window: int | None) -> Ring:
        return dataclasses.replace(super()._new_ring(window and max(window - 1, 1)), window=window)


class SmallRingCache(KVCache):
    """Rings of W slots. A pass of several tokens overwrites keys that its own first queries still see."""

    def _new_ring(self, window: int | None) -> Ring:
        ring = super()._new_ring(window)
        if window is None:
            return ring
        capacity = min(ring.capacity, window)
        return Ring(window, min(window, ring.max_capacity or window), capacity, store=self._new_store(capacity))


class _OtherWindows(KVCache):
    """Windows that are wider or narrower than the model's, in the first pass (`first`) or in later ones (`later`)."""

    first = later = 0

    def _new_ring(self, window: int | None) -> Ring:
        return dataclasses.replace(super()._new_ring(window and window + 1), window=window)

    def begin(self, n_tokens: int) -> Pass:
        """Start a pass with windows of their width in this pass."""
        more = self.later if self.length else self.first
        for ring, window in zip(self.rings, self.config.sliding_window, strict=True):
            ring.window = window and max(window + more, 1)
        return super().begin(n_tokens)


class PromptSeesMoreCache(_OtherWindows):
    """In the first pass a query sees W + 1 keys, in later passes W."""

    first = 1


class CacheSeesLessCache(_OtherWindows):
    """In the first pass a query sees W keys, in later passes W - 1."""

    later = -1


class SlotOrderCache(KVCache):
    """Keys are read in the order of their slots, and taken to be in the order of their positions."""

    def begin(self, n_tokens: int) -> Pass:
        """Start a pass that reads its keys in the wrong order."""
        right = super().begin(n_tokens)
        return _SlotOrderPass(right.cache, right.start, right.n_tokens, right.number)


class _SlotOrderPass(Pass):
    def views(self, layer: int, rows: slice = slice(None)) -> list[KeyView]:
        """Return the visible keys; if they go around the end of the ring, they are in the order of their slots."""
        (view,) = super().views(layer, rows)
        return [view if isinstance(view.slots, slice) else view._replace(slots=np.sort(view.slots))]
