"""Processes that fork after kernels have run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from mistral_kernels.forks import open_in_children

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# Prints what a forked child computes, with threads of its own: a result as the parent's, without a notice. Meanwhile
# other threads of the parent run kernels and compile one.
FORK = """
import multiprocessing, threading, warnings
from threading import Thread
import numpy as np
import mistral_ref
from mistral_kernels import panels

model = mistral_ref.load(threads=2)
tokens = model.token_ids("Once upon a time there was a little girl " * 20)
expected = model.forward(tokens, last_only=True)
busy = True

def work():
    while busy:
        model.forward(tokens, last_only=True)

def child(_):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits = model.forward(tokens, last_only=True)
    panels.write("uint16")
    return (logits == expected).all(), threading.active_count(), len(caught)

for task in (work, lambda: panels.write("uint16")):
    Thread(target=task, daemon=True).start()
with multiprocessing.get_context("fork").Pool(1) as pool:
    [found] = pool.map_async(child, [0]).get(60)
busy = False
print(*found)
"""


@needs_fork
def test_a_forked_child_starts_threads_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True 2 0\n"


@needs_fork
def test_a_fork_waits_for_a_lock_and_the_child_finds_it_open() -> None:
    lock, holds = open_in_children(threading.RLock()), threading.Event()

    def hold() -> None:
        with lock:
            holds.set()
            threading.Event().wait(0.2)

    other = threading.Thread(target=hold)
    other.start()
    holds.wait()
    child = os.fork()
    if child == 0:
        taken: list[bool] = []
        asking = threading.Thread(target=lambda: taken.append(lock.acquire(timeout=1)))
        asking.start()
        asking.join()
        os._exit(0 if taken == [True] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    other.join()
