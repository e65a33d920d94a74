"""The machine, described: power and heat, as the system tells."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mistral_ref.measure import machine


def test_power_and_heat_as_linux_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(machine, "_POWER", tmp_path / "power")
    monkeypatch.setattr(machine, "CPUS", tmp_path / "cpus")
    assert machine.power_source() is None
    assert machine.throttle_count() is None
    supplies = {"AC": {"type": "Mains", "online": "1"}, "BAT0": {"type": "Battery", "status": "Discharging"}}
    supplies["mouse"] = {"type": "Battery", "scope": "Device", "status": "Discharging"}
    for name, files in supplies.items():
        (tmp_path / "power" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "power" / name / file).write_text(f"{text}\n")
    assert machine.power_source() == "battery"
    (tmp_path / "power" / "BAT0" / "status").write_text("Not charging\n")
    assert machine.power_source() == "mains"
    for cpu, count in (("cpu0", "3"), ("cpu1", "4")):
        (tmp_path / "cpus" / cpu / "thermal_throttle").mkdir(parents=True)
        (tmp_path / "cpus" / cpu / "thermal_throttle" / "core_throttle_count").write_text(f"{count}\n")
    assert machine.throttle_count() == 7
