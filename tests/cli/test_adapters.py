"""--adapter in every command that loads a model, and what `info` shows of an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.adapters import draw_deltas, write_finetune, write_peft
from support.command import run
from support.errors import assert_complains

import mistral_ref


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the demonstration model that changes what it tells."""
    config = mistral_ref.load(backend="numpy").config
    return write_peft(tmp_path_factory.mktemp("adapter=1"), config, draw_deltas(config, rank=4, scale=2.0))


def told(*options: str | Path) -> str:
    done = run("generate", "--temperature", "0", "--max-tokens", "6", *map(str, options), "Once upon a time")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_adapter_changes_what_is_told_and_a_scale_of_0_does_not(adapter: Path) -> None:
    plain, adapted = told(), told("--adapter", adapter)
    model = mistral_ref.load(adapters=[adapter])
    assert adapted == f"Once upon a time{model.complete('Once upon a time', max_tokens=6)}\n" != plain
    assert told("--adapter", f"{adapter}=0") == plain
    assert told("--adapter", adapter, "--adapter", f"{adapter}=-1") == plain
    model = mistral_ref.load(adapters=[(adapter, 0.5), adapter])
    assert told("--adapter", f"{adapter}=0.5", "--adapter", adapter) == (
        f"Once upon a time{model.complete('Once upon a time', max_tokens=6)}\n"
    )


def test_compare_shows_what_an_adapter_changes(adapter: Path) -> None:
    done = run("compare", "demo", "demo", "--adapter", str(adapter), "--backend", "numpy", "Once")
    assert done.returncode == 1
    assert "the first is layers.0.q," in done.stdout
    assert "layers.0.q_lora_a" in done.stdout
    done = run("compare", "demo", "demo", "--adapter-b", str(adapter), "--backend", "numpy", "Once")
    assert "the first is layers.0.q," in done.stdout
    both = ("--adapter", str(adapter), "--adapter-b", str(adapter))
    done = run("compare", "demo", "demo", *both, "--backend", "numba,numpy", "--all", "Once")
    assert done.returncode == 0
    assert "layers.0.q_lora_a" in done.stdout


def test_trace_and_perplexity_and_warm_take_adapters(adapter: Path, tmp_path: Path) -> None:
    done = run("trace", "--adapter", str(adapter), "--backend", "numpy", "Once upon")
    assert "layers.4.ffn_out_lora_b" in done.stdout
    (tmp_path / "text").write_text("Once upon a time there was a little girl. " * 3)
    perplexity = ("perplexity", "--backend", "numpy", "--context", "16", str(tmp_path / "text"))
    plain, adapted = run(*perplexity), run(*perplexity, "--adapter", str(adapter))
    assert plain.returncode == adapted.returncode == 0
    assert plain.stdout != adapted.stdout
    assert run("warm", "--adapter", str(adapter)).returncode == 0


def test_quantize_merges_for_good(adapter: Path, tmp_path: Path) -> None:
    done = run("quantize", "demo", str(tmp_path / "tuned"), "--bits", "8", "--adapter", str(adapter))
    assert done.returncode == 0, done.stderr
    tuned, adapted, plain = (
        mistral_ref.load(path, adapters=adapters).forward("Once upon a time", last_only=True)
        for path, adapters in ((tmp_path / "tuned", []), (None, [adapter]), (None, []))
    )
    assert np.abs(tuned - adapted).max() < 0.1 * np.abs(adapted - plain).max()


def test_info_shows_an_adapter(adapter: Path, tmp_path: Path) -> None:
    done = run("info", "--adapter", f"{adapter}=2")
    rows = dict(line.strip().split(maxsplit=1) for line in done.stdout.splitlines()[1:] if line.split()[0] != "made")
    assert (rows["rank"], rows["scale"], rows["layers"]) == ("4", "4", "5")
    assert "PEFT" in done.stdout
    assert "5 wq, 5 wk" in rows["matrices"]
    done = run("info", "--model", "demo", "--adapter", str(adapter))
    assert "RoPE" in done.stdout
    assert "PEFT" in done.stdout
    other = mistral_ref.load(backend="numpy").config.replace(dim=8)
    path = write_finetune(tmp_path, other, draw_deltas(other))
    assert_complains(run("info", "--model", "demo", "--adapter", str(path)).stderr, path / "lora.safetensors", 224)


@pytest.mark.parametrize(
    ("option", "facts"),
    [("nowhere", ("nowhere", "no such")), ("nowhere=2", ("nowhere", "no such")), ("a=b", ("a=b", "no such"))],
)
def test_mistakes_are_one_line(option: str, facts: tuple[str, ...]) -> None:
    done = run("generate", "--adapter", option, "Once")
    assert done.returncode == 2
    assert_complains(done.stderr, *facts)
