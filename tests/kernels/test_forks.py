"""Processes that fork after kernels have run, and Ctrl-C between taking a turn and giving it back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from support.errors import assert_says

from mistral_kernels import threads
from mistral_kernels.forks import open_in_children

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

# Prints what a forked child computes: a result as the parent's, by one thread, with a notice. Meanwhile other threads
# of the parent run kernels and compile one.
FORK = """
import multiprocessing, warnings
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
    return (logits == expected).all(), [str(warning.message) for warning in caught]

for task in (work, lambda: panels.write("uint16")):
    Thread(target=task, daemon=True).start()
with multiprocessing.get_context("fork").Pool(1) as pool:
    [(same, messages)] = pool.map_async(child, [0]).get(60)
busy = False
print(same, len(messages), messages[0])
"""


@needs_fork
@pytest.mark.parametrize(
    "layer", [pytest.param("omp", id="openmp"), pytest.param("workqueue", id="workqueue", marks=pytest.mark.slow)]
)
def test_a_forked_child_computes_on_one_thread_and_says_so(layer: str) -> None:
    environment = os.environ | {"NUMBA_THREADING_LAYER": layer}
    done = subprocess.run(
        [sys.executable, "-c", FORK], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True 1 ")
    assert_says(done.stdout.removesuffix("\n"), "forked", "one thread", "spawn")


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


@pytest.mark.parametrize("where", ["get_num_threads", "set_num_threads"])
def test_a_turn_that_is_interrupted_is_given_back(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "layer", lambda: "workqueue")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threads.numba, where, interrupted)
        with pytest.raises(KeyboardInterrupt), threads.using(1):
            pass
    taken: list[bool] = []

    def take() -> None:
        taken.append(threads._TURN.acquire(timeout=1))
        if taken[0]:
            threads._TURN.release()  # a thread that has ended would keep it for ever

    other = threading.Thread(target=take)
    other.start()
    other.join()
    assert taken == [True]
