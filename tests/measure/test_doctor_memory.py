"""The doctor on memory: a text of a given length, on machines with more or less of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import write_consolidated
from support.errors import refused
from support.patients import assert_finds, assert_healthy, family, write_json
from support.published import MODELS, params_json_of

import mistral_ref
from mistral_ref.errors import InputError, size
from mistral_ref.measure.doctor import memory
from mistral_ref.memory import memory_needs


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_consolidated(tmp_path, family())
    return tmp_path


def have(left: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have so many bytes left."""
    monkeypatch.setattr(memory, "available_memory", lambda: left)


def test_a_text_that_fits_or_does_not(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = mistral_ref.load(model, backend="numpy")
    needs = memory_needs(opened.config, opened.weights, 2000)
    have(needs.total + needs.mapped, monkeypatch)
    assert "memory" in " ".join(assert_healthy(model, tokens=2000, quick=True).examined)
    have(needs.total + needs.mapped - 1, monkeypatch)
    assert_finds(model, "suspicious", model, "2,000", size(needs.mapped), size(needs.total), tokens=2000, quick=True)
    have(needs.total - 1, monkeypatch)
    assert_finds(model, "wrong", model, "2,000", size(needs.total), size(needs.cache), tokens=2000, quick=True)
    assert_healthy(model, quick=True)  # nobody asked
    have(None, monkeypatch)
    assert "memory" in " ".join(assert_healthy(model, tokens=2000, quick=True).left_out)


def test_a_text_that_is_too_long(model: Path) -> None:
    assert_healthy(model, tokens=2048, quick=True)
    assert_finds(model, "wrong", model, "2,049", "2,048", tokens=2049, quick=True)
    for tokens in (0, 2**60):
        with refused(InputError, "tokens", tokens):
            assert_healthy(model, tokens=tokens)


def test_a_lone_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "params.json"
    write_json(path, params_json_of(MODELS["Mistral-7B-v0.3"]))
    have(2**30, monkeypatch)
    assert_healthy(path, tokens=1000)
    assert_finds(path, "wrong", path, "32,768", tokens=32768)  # 8 GiB of keys and values
    write_json(path, {"dim": -1})
    assert_finds(path, "wrong", path, "missing", tokens=1000)
