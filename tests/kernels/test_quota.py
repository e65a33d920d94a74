"""What a container may use, told by files of both versions of control groups, nested ones included."""

from __future__ import annotations

from pathlib import Path

import pytest

from mistral_kernels import quota, threads
from mistral_ref.host import available_memory

GIB = 2**30


def tell(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("groups", "own", "expected"),
    [
        ({}, "0::/", None),
        ({"cpu.max": "100000 100000"}, "0::/", 1.0),
        ({"cpu.max": "max 100000"}, "0::/", None),
        ({"cpu.max": "250000 100000"}, "0::/seen/from/outside", 2.5),
        ({"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 1.5),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b", 0.5),
        ({"unified/a/cpu.max": "200000 100000"}, "1:name=systemd:/\n0::/a", 2.0),
        ({"cpu/d/cpu.cfs_quota_us": "200000", "cpu/d/cpu.cfs_period_us": "100000"}, "4:cpuacct,cpu:/d\n0::/", 2.0),
        ({"cpu/d/cpu.cfs_quota_us": "-1", "cpu/d/cpu.cfs_period_us": "100000"}, "4:cpu:/d", None),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu:/not/here", 1.0),
        ({"other/cpu.max": "100000 100000"}, "0::/", None),
        ({"cpu.max": "no number"}, "no group", None),
        ({"cpu.max": ""}, "", None),
    ],
)
def test_processors(groups: dict[str, str], own: str, expected: float | None, tmp_path: Path) -> None:
    tell(tmp_path / "groups", groups)
    tell(tmp_path, {"own": own})
    assert quota.processors(tmp_path / "groups", tmp_path / "own") == expected


@pytest.mark.parametrize(
    ("groups", "own", "expected"),
    [
        ({}, "0::/", None),
        ({"memory.max": "max", "memory.current": "5"}, "0::/", None),
        ({"memory.max": f"{4 * GIB}", "memory.current": f"{GIB}"}, "0::/", 3 * GIB),
        (
            {"memory.max": f"{4 * GIB}", "memory.current": f"{3 * GIB}", "memory.stat": f"anon 1\ninactive_file {GIB}"},
            "0::/",
            2 * GIB,
        ),
        ({"memory.max": f"{GIB}", "memory.current": f"{2 * GIB}"}, "0::/", 0),
        ({"a/memory.max": f"{GIB}", "a/b/memory.max": f"{2 * GIB}", "a/b/memory.current": "0"}, "0::/a/b", GIB),
        ({"memory/memory.limit_in_bytes": f"{2**63 - 4096}"}, "4:memory:/", None),
        (
            {
                "memory/d/memory.limit_in_bytes": f"{4 * GIB}",
                "memory/d/memory.usage_in_bytes": f"{3 * GIB}",
                "memory/d/memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GIB}",
            },
            "4:memory:/d",
            3 * GIB,
        ),
    ],
)
def test_memory(groups: dict[str, str], own: str, expected: int | None, tmp_path: Path) -> None:
    tell(tmp_path / "groups", groups)
    tell(tmp_path, {"own": own})
    assert quota.memory(tmp_path / "groups", tmp_path / "own") == expected


@pytest.mark.parametrize(("allowed", "expected"), [(None, 8), (8.5, 8), (3.9, 3), (1.0, 1), (0.2, 1)])
def test_a_quota_counts_in_the_number_of_threads(
    allowed: float | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "_cores", lambda: 8)
    monkeypatch.setattr(threads, "processors", lambda: allowed)
    threads.performance_cores.cache_clear()
    try:
        assert threads.performance_cores() == expected
    finally:
        threads.performance_cores.cache_clear()


def test_a_quota_counts_in_the_memory_that_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("mistral_ref.host.quota.memory", lambda: 12345)
    assert available_memory() == 12345
