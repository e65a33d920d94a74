"""The threads that run kernels: a team, which all kernels of a process use.

The thread that calls a kernel works too. The others are threads of Python that spend their time in compiled code. After
a job they look for the next one for a moment, since a pass has many kernels, one right after the other. Then they
sleep, so that a process that computes nothing takes no processor from others. sharing.py is how they share out work.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from contextlib import suppress

import numpy as np

from mistral_kernels import sharing
from mistral_kernels.forks import open_in_children
from mistral_kernels.pool import aligned

PATIENCE = 1e-3  # seconds that a thread looks for work before it sleeps; waking it takes about 50 microseconds


class _Helper:
    """A thread of a team that does pieces of other threads' kernels."""

    def __init__(self, team: Team, number: int) -> None:
        self.team, self.number = team, number
        self._asleep = np.zeros(1, np.int64)
        self._bed = threading.Lock()
        self._bed.acquire()
        threading.Thread(target=self._serve, name=f"mistral_kernels {number}", daemon=True).start()

    def _serve(self) -> None:
        serve = sharing.serve()
        while True:
            serve(self.team.address, self.number, self.team.patience, self._asleep.ctypes.data)
            self._bed.acquire()

    @property
    def sleeps(self) -> bool:
        """Whether the thread looks for no work. Compiled code says so; Python would have to wait for its lock."""
        return bool(self._asleep[0])

    def wake(self) -> None:
        """Let the thread look for work again."""
        self._asleep[0] = 0
        with suppress(RuntimeError):  # another thread was quicker
            self._bed.release()


class Team:
    """Threads that share out the work of kernels, and the memory by which they know of it."""

    def __init__(self) -> None:
        self._memory = aligned(8 * sharing.SIZE, np.zeros).view(np.int64)
        self.address = self._memory.ctypes.data
        self.patience = self._rounds_in(PATIENCE)
        self.helpers: list[_Helper] = []
        self._sizes: dict[int, np.ndarray] = {}

    def _rounds_in(self, seconds: float) -> int:
        """Return how often a thread looks for work in some seconds."""
        serve, n, times, ignored = sharing.serve(), 3000, [], np.zeros(1, np.int64)
        for _ in range(3):
            start = time.perf_counter()
            serve(self.address, 1, n, ignored.ctypes.data)
            times.append(time.perf_counter() - start)
        return int(n * seconds / min(times))

    def sized(self, n_threads: int) -> int:
        """Return what a kernel is given to use n threads, which need not have been started."""
        if n_threads not in self._sizes:
            self._sizes.setdefault(n_threads, np.array([n_threads, self.address], np.int64))
        return self._sizes[n_threads].ctypes.data

    def grow(self, n_threads: int) -> None:
        """Start what is missing of n threads."""
        while len(self.helpers) < n_threads - 1:
            self.helpers.append(_Helper(self, len(self.helpers) + 1))

    def wake(self, n_threads: int) -> None:
        """See to it that n threads look for work."""
        for helper in self.helpers[: n_threads - 1]:
            if helper.sleeps:
                helper.wake()


class Teams:
    """The team of this process, which begins when it is first asked for."""

    def __init__(self) -> None:
        self._starting = open_in_children(threading.RLock())
        self._team: Team | None = None
        atexit.register(self._wait_until_all_sleep)
        if hasattr(os, "register_at_fork"):  # a child has the memory of its parent's team, but not its threads
            os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._team = None

    def _wait_until_all_sleep(self) -> None:
        """At its end the process gives back the memory of compiled code, which no thread may be running then."""
        deadline = time.monotonic() + 1
        while self._team and not all(helper.sleeps for helper in self._team.helpers) and time.monotonic() < deadline:
            time.sleep(0.001)

    def of(self, n_threads: int) -> int:
        team = self._team
        if team is None or len(team.helpers) < n_threads - 1:
            with self._starting:
                team = self._team = self._team or Team()
                team.grow(n_threads)
        team.wake(n_threads)
        return team.sized(n_threads)


_TEAMS = Teams()


def team(n_threads: int) -> int:
    """Return what a kernel is given as `threads` to use n threads, which are started where they are not there yet."""
    return 1 if n_threads == 1 else _TEAMS.of(n_threads)
