"""Ring: in which slot of a layer the key of a position lies, and when a new key may overwrite it.

The capacity of a ring is the number of its slots. The key of position p lies in slot p % capacity. A layer with a
window of W has a ring of W + chunk - 1 slots; `chunk` is the number of tokens in the longest pass. So a pass, which
writes its keys first and reads afterwards, overwrites no key that one of its queries sees. A layer without a window
keeps every key, and its ring grows.

Example: a window of 3 and passes of at most 2 tokens need 4 slots. The pass of tokens 4 and 5 overwrites 0 and 1. Its
first query, token 4, sees tokens 2, 3 and 4. All three are in the ring:

    slot        0  1  2  3
    positions   4  5  2  3

`reference_ops.attends` defines which keys a query sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Ring:
    """The slots of one layer. Position p lies in slot p % capacity.

    window      how many keys a query sees, itself included; None: all
    max_capacity    the ring doubles its capacity up to this number; after that a new key overwrites an old one.
                None: no maximum
    capacity    the number of slots now
    oldest      the oldest position that is not overwritten
    store       the keys and values, as `ops.new_store` returned them

    >>> ring = Ring(window=3, max_capacity=4, capacity=4)
    >>> ring.slots(4, 6), ring.slots(3, 6)
    (slice(0, 2, None), array([3, 0, 1]))
    >>> ring.first_visible(4)
    2
    """

    window: int | None
    max_capacity: int | None
    capacity: int
    oldest: int = 0
    store: Any = None

    def slots(self, start: int, stop: int) -> slice | np.ndarray:
        """Return the slots of positions start to stop - 1, in this order: a slice if the slots are neighbours.

        Otherwise it is an array of integers (stop - start,).
        """
        first = start % self.capacity
        if first + stop - start <= self.capacity:
            return slice(first, first + stop - start)
        return np.arange(start, stop) % self.capacity

    def first_visible(self, query: int) -> int:
        """Return the oldest position that the query at position `query` sees."""
        return 0 if self.window is None else max(0, query - self.window + 1)

    def capacity_for(self, length: int) -> int:
        """Return the capacity for `length` positions: doubled until they fit, at most `max_capacity`."""
        capacity = self.capacity
        while capacity < length and capacity != self.max_capacity:
            capacity = 2 * capacity if self.max_capacity is None else min(2 * capacity, self.max_capacity)
        return capacity
