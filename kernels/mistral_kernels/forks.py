"""Locks of a process that forks. The child has one thread, and a copy of every lock, also of those that others held."""

from __future__ import annotations

import os
import threading


def open_in_children(lock: threading.RLock) -> threading.RLock:
    """Return a lock that is never held by another thread when the process forks: the fork waits for it.

    So the child finds it open, and finds what it guards as complete as the parent does.
    """
    if hasattr(os, "register_at_fork"):  # Windows has no fork
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
    return lock
