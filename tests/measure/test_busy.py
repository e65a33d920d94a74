"""How much of the processors' time goes to other programs: what Linux counts, and what it is when one computes."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from mistral_ref.measure import busy
from mistral_ref.measure.busy import ProcessorTime, processor_time, share_of_others

TICKS = 100
STAT = """cpu  9 9 9 9 9 9 9 9 9 9
cpu0 100 20 30 500 50 4 3 2 60 1
cpu1 {} 0 0 400 0 0 0 0 0 0
cpu2 900 0 0 0 0 0 0 0 0 0
intr 12 0
"""


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "stat"
    monkeypatch.setattr(busy, "_STAT", path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: TICKS)
    return path


def test_time_is_counted_on_the_processors_that_this_process_may_use(
    stat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "process_time", lambda: 0.5)
    stat.write_text(STAT.format(100))
    before = processor_time()
    # guests are a part of user already; of cpu0 159 ticks are busy, and 550 idle
    assert before == ProcessorTime(busy=(159 + 100) / TICKS, total=(709 + 500) / TICKS, own=0.5)
    monkeypatch.setattr(time, "process_time", lambda: 0.75)
    stat.write_text(STAT.format(200))
    assert share_of_others(before, processor_time()) == pytest.approx(0.75)


@pytest.mark.parametrize("text", [None, "", "cpu0 1 2\n", "cpu0 a b c d e\n", "cpu2 1 2 3 4 5 6 7 8\n"])
def test_a_system_that_does_not_tell_is_unknown(stat: Path, text: str | None) -> None:
    if text is not None:
        stat.write_text(text)
    assert processor_time() is None
    assert share_of_others(None, ProcessorTime(1, 2, 1)) is None


def test_a_share_is_from_0_to_1_and_none_for_a_moment() -> None:
    before = ProcessorTime(1, 10, 1)
    assert share_of_others(before, ProcessorTime(2, 20, 3)) == 0  # this process counts more finely than the system
    assert share_of_others(before, ProcessorTime(12, 20, 1)) == 1
    assert share_of_others(before, ProcessorTime(1.01, 10.01, 1)) is None


def compute() -> None:
    while True:
        pass


def test_another_program_is_seen_and_this_one_is_not() -> None:
    if processor_time() is None:
        pytest.skip("the system does not say how busy it is")
    other = multiprocessing.get_context("spawn").Process(target=compute, daemon=True)
    other.start()
    try:
        time.sleep(1)  # until it computes
        before = processor_time()
        time.sleep(0.5)
        share = share_of_others(before, processor_time())
    finally:
        other.kill()
        other.join()
    assert share is not None
    assert share > 0.3 / len(os.sched_getaffinity(0))
