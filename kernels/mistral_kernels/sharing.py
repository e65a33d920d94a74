"""How a kernel shares out its work: in pieces, which the threads of a team take one after the other.

The thread that calls a kernel puts a job into the team's memory, and then takes pieces itself. The team's other threads
(team.py) watch that memory for a while after each job and take pieces too. So nobody waits for a thread that has
not begun, because another program has its processor: what it does not take, others do. Only a piece that was taken is
waited for.

A team's memory is an array of int64. Numbers that different threads write lie in cache lines of their own:

    TICKET      the job's pieces that are taken, and how many there are, and how many threads may take them. A piece is
                taken by writing a new ticket in place of the one that was read, so no piece is taken twice
    FUNCTION, DATA, N       what does units first, ..., last - 1 of a job, and how many units there are
    DONE        the pieces that are done
    FAILED      whether memory was missing for one of them
    OWNER       1 while a kernel uses the team; another kernel then works alone
"""

from __future__ import annotations

from typing import Any

import numba
from numba import types

from mistral_kernels.compiling import FIRST, kernel, made_once, part
from mistral_kernels.processor import IS_ARM, IS_X86
from mistral_kernels.value import I64, Value, bound, call_at, kept_until_here, operation, run

TICKET, FUNCTION, DATA, N, DONE, FAILED, OWNER, SIZE = 0, 16, 17, 18, 32, 33, 48, 64
_PIECES, _THREADS = 24, 48  # the bits of a ticket where these begin; the number of the next piece begins at 0
_MASK = 2**24 - 1


@operation(types.intp, types.intp, types.intp)
def _get(team: Value, place: Value) -> Value:
    return (team.address(I64) + place).load_atomic()


@operation(types.void, types.intp, types.intp, types.intp)
def _put(team: Value, place: Value, number: Value) -> None:
    (team.address(I64) + place).store_atomic(number)


@operation(types.void, types.intp, types.intp)
def _count(team: Value, place: Value) -> None:
    (team.address(I64) + place).add_atomic(1)


@operation(types.boolean, types.intp, types.intp, types.intp, types.intp)
def _replace(team: Value, place: Value, before: Value, after: Value) -> Value:
    return (team.address(I64) + place).replace_atomic(before, after)


@operation(types.void)
def _pause() -> None:
    """Let the processor know that this loop waits for another thread."""
    if IS_X86:
        run("llvm.x86.sse2.pause")
    elif IS_ARM:
        run("llvm.aarch64.hint", 1)


@operation(types.int32, types.intp, types.intp, types.intp, types.intp)
def _do(function: Value, data: Value, first: Value, last: Value) -> Value:
    return call_at(function, data, first, last)


@part(borrows=True)
def _take(team: int, thread: int) -> int:
    """Take a piece of the job, and return its number; -1 if there is none for this thread."""
    while True:
        ticket = _get(team, TICKET)
        piece, pieces, threads = ticket & _MASK, (ticket >> _PIECES) & _MASK, ticket >> _THREADS
        if piece >= pieces or thread >= threads:
            return -1
        if _replace(team, TICKET, ticket, ticket + 1):
            return piece


@part(borrows=True)
def _do_pieces(team: int, thread: int, piece: int) -> None:
    """Do a piece that was taken, and then others until none is left."""
    while piece >= 0:
        # No job ends before its pieces are done, so this is the job that the piece belongs to.
        n, pieces = _get(team, N), (_get(team, TICKET) >> _PIECES) & _MASK
        if _do(_get(team, FUNCTION), _get(team, DATA), n * piece // pieces, n * (piece + 1) // pieces) != 0:
            _put(team, FAILED, 1)
        _count(team, DONE)
        piece = _take(team, thread)


@part(borrows=True)
def _together(team: int, n_threads: int, function: int, data: int, n: int, pieces: int) -> bool:
    """Do a job with the threads of a team; return False if memory was missing."""
    _put(team, FUNCTION, function)
    _put(team, DATA, data)
    _put(team, N, n)
    _put(team, DONE, 0)
    _put(team, FAILED, 0)
    _put(team, TICKET, n_threads << _THREADS | pieces << _PIECES)
    _do_pieces(team, FIRST, _take(team, FIRST))
    while _get(team, DONE) < pieces:
        _pause()
    went_well = _get(team, FAILED) == 0
    _put(team, OWNER, 0)
    return went_well


@part(borrows=True)
def count_of(threads: int) -> int:
    """Return how many threads a kernel may use; `threads` is as in shared_out."""
    return 1 if threads == 1 else _get(threads, 0)


@part(borrows=True)
def _job(threads: int, function: int, data: int, n: int) -> bool:
    """Do n units of a job; return False if memory was missing. `threads` is as in shared_out."""
    pieces = min(n, count_of(threads))
    if pieces > 1:
        team = _get(threads, 1)
        if _replace(team, OWNER, 0, 1):
            return _together(team, count_of(threads), function, data, n, pieces)
    return _do(function, data, 0, n) == 0


@numba.njit(nogil=True, error_model="numpy", inline="always")
def shared_out(work: Any, n: int, threads: int, arguments: Any) -> None:
    """Call work(first, last, *arguments) for consecutive parts of range(n), by the threads of a team.

    threads     1, or the address of two int64: how many threads, and where their team's memory is (team.team)
    """
    function, data = bound(work, arguments)
    went_well = _job(threads, function, data, n)
    kept_until_here(arguments)
    if not went_well:
        raise MemoryError


@made_once
def serve() -> Any:
    """Return a kernel: serve(team, thread, patience, asleep) does pieces until there was none for `patience` rounds.

    Then it puts 1 at the address `asleep`: from there on the thread has to be woken.
    """

    @kernel(types.void(types.intp, types.intp, types.intp, types.intp))
    def serve(team: int, thread: int, patience: int, asleep: int) -> None:
        idle = 0
        while idle < patience:
            piece = _take(team, thread)
            if piece < 0:
                _pause()
                idle += 1
            else:
                _do_pieces(team, thread, piece)
                idle = 0
        _put(asleep, 0, 1)

    return serve
