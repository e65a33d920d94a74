"""mistral-ref quantize, and the options of other commands that quantized weights brought, as a user meets them."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from support.command import COMMAND, run, start
from support.errors import assert_complains

import mistral_ref
from mistral_ref.loading import DEMO_MODEL


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demonstration model in 4 bits, made by the command."""
    target = tmp_path_factory.mktemp("models") / "small"
    done = run("quantize", "demo", target)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{target}: 1.77 MiB for 5.52 MiB, 5.13 bits a weight for 16.00, in ")
    return target


def test_the_result_loads_like_any_other(small: Path) -> None:
    done = run("generate", "--model", small, "--temperature", 0, "--max-tokens", 12, "Once upon a time")
    text = mistral_ref.load(quantize=4).complete("Once upon a time", max_tokens=12)
    assert (done.returncode, done.stdout) == (0, f"Once upon a time{text}\n")
    in_memory = run("generate", "--quantize", 4, "--temperature", 0, "--max-tokens", 12, "Once upon a time")
    assert in_memory.stdout == done.stdout


def test_info_says_what_is_stored_how(small: Path) -> None:
    told = run("info", "--model", small).stdout
    assert "parameters          2,898,336\n" in told
    assert "int4 (2,437,120), int8 (458,752), F32 (2,464)" in told
    assert "bits a weight       5.13\n" in told


def test_every_option_reaches_the_library(tmp_path: Path) -> None:
    options = ("--bits", 8, "--group-size", 64, "--embedding", "keep", "--head", "keep")
    assert run("quantize", "demo", tmp_path / "ours", *options).returncode == 0
    mistral_ref.quantize(DEMO_MODEL, tmp_path / "theirs", 8, group_size=64, embedding=None, head=None)
    ours, theirs = (
        (tmp_path / name / "consolidated.safetensors").read_bytes() for name in ("ours", "theirs")
    )  # fmt: skip
    assert ours == theirs


TEXT = "Once upon a time there was a cat. " * 20


@pytest.mark.parametrize("name", ["--quantized-inputs", "--bf16-inputs"])
def test_what_inputs_are_rounded_to_is_chosen(name: str, small: Path) -> None:
    """They change what a model says only a little, but to the last digit they do."""
    if name == "--quantized-inputs":
        model, ways = small, {"int16": (), "int8": (), "float": ("--backend", "numpy")}
    else:
        model, ways = DEMO_MODEL, dict.fromkeys(("float32", "bfloat16"), ("--backend", "numpy"))
    prompt = ("perplexity", "--model", model, "--context", "64", "--json", "-")
    figures = [run(*prompt, name, way, *more, stdin=TEXT) for way, more in ways.items()]
    assert {done.returncode for done in figures} == {0}
    assert len({done.stdout.split("perplexity")[1] for done in figures}) == len(ways)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("quantize", "demo"), ("OUT",)),
        (("quantize", "nowhere", "x"), (Path("nowhere"), "no such directory")),
        (("quantize", "demo", "."), (".:", "already", "new directory")),
        (("quantize", "demo", "/nowhere/x"), (Path("/nowhere/x"), Path("/nowhere"), "no directory")),
        (("quantize", "demo", "x", "--bits", 5), ("--bits", 5, 8, 4)),
        (("quantize", "demo", "x", "--group-size", 48), ("--group-size", 48, 32, 64, 128)),
        (("quantize", "demo", "x", "--head", 4), ("embedding", 8, "head", 4, "both")),
        (("generate", "--quantized-inputs", "float", "A"), ("quantized_inputs", "'float'", "backend='numpy'")),
        (("generate", "--bf16-inputs", "int8", "A"), ("--bf16-inputs", "'int8'", "float32", "bfloat16")),
        (("generate", "--quantize", 3, "A"), ("--quantize", 3, 8, 4)),
    ],
)
def test_a_mistake_is_one_line(
    arguments: tuple[object, ...], facts: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert done.returncode == 2
    assert_complains(done.stderr, *facts)
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_model_is_not_quantized_again(small: Path, tmp_path: Path) -> None:
    for arguments in (("quantize", small, tmp_path / "x"), ("generate", "--model", small, "--quantize", 8, "A")):
        done = run(*arguments)
        assert done.returncode == 2
        assert_complains(done.stderr, "quantized already", "float weights")


@pytest.mark.parametrize(("ended_by", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_what_ends_it_by_a_signal_leaves_nothing(ended_by: str, status: int, tmp_path: Path) -> None:
    from mistral_ref.measure.shapes import SHAPES  # noqa: PLC0415
    from mistral_ref.measure.synthetic import make_checkpoint  # noqa: PLC0415

    config = SHAPES["tiny"].replace(n_layers=64, sliding_window=(None,) * 64)
    make_checkpoint(tmp_path / "in", config)
    process = start(*COMMAND, "quantize", tmp_path / "in", tmp_path / "out", text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*.partial/consolidated.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(getattr(signal, ended_by))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "")
    assert not err.strip()
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
