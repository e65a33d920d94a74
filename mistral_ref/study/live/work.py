"""Work: the computations that readers ask for, one after another, in one thread. A newer question ends an older one.

Each reader, a tab of a browser, looks at one subject at a time, a text with its changes. Questions about the subject
that it looked at before have become useless: they end between two steps of their pass.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from threading import Condition
from typing import Any, NamedTuple, NoReturn, TypeVar

from mistral_ref.errors import Progress

_T = TypeVar("_T")
_MOST_READERS = 64  # of which the subject is known


class StaleError(Exception):
    """The reader has asked for something else meanwhile."""


class _Job(NamedTuple):
    reader: str
    subject: Hashable
    compute: Callable[[Progress], Any]
    can_wait: bool
    result: Future[Any]


class Work:
    """Computations, in the order in which they were asked for. `run` makes them; any other thread may ask."""

    def __init__(self) -> None:
        self._jobs, self._later = deque[_Job](), deque[_Job]()
        self._subjects: OrderedDict[str, Hashable] = OrderedDict()  # of each reader
        self._changed = Condition()
        self._place: tuple[str, int, int] | None = None

    def ask(self, reader: str, subject: Hashable, compute: Callable[[Progress], _T], *, can_wait: bool = False) -> _T:
        """Return what `compute(progress)` returns in the thread that runs. Raises StaleError, and what it raises.

        can_wait    whatever else is asked for comes first, also when the computation has begun: it then goes on
                    afterwards
        """
        job = _Job(reader, subject, compute, can_wait, Future())
        with self._changed:
            self._subjects[reader] = subject
            self._subjects.move_to_end(reader)
            if len(self._subjects) > _MOST_READERS:
                self._subjects.popitem(last=False)
            (self._later if can_wait else self._jobs).append(job)
            self._changed.notify()
        return job.result.result()

    def place(self, reader: str) -> tuple[int, int] | None:
        """Return (done, in all) of the computation for a reader; None if another is computed, or none."""
        place = self._place
        return None if place is None or place[0] != reader else place[1:]

    def run(self) -> NoReturn:
        """Compute what is asked for, for ever. Ctrl-C, or an exit, ends it, and the computation with it."""
        while True:
            with self._changed:
                while not self._jobs and not self._later:
                    self._changed.wait()
                job = (self._jobs or self._later).popleft()
            self._take(job)

    def _take(self, job: _Job) -> None:
        def progress(done: int, total: int) -> None:
            while job.can_wait and self._jobs:
                self._take(self._jobs.popleft())
            self._place = job.reader, done, total
            if self._subjects.get(job.reader, job.subject) != job.subject:
                raise StaleError

        try:
            progress(0, 1)
            job.result.set_result(job.compute(progress))
        except Exception as error:  # which belongs to whoever asked
            job.result.set_exception(error)
        finally:
            self._place = None
