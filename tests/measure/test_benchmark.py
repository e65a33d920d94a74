"""The benchmarks, short of their figures: shapes, synthetic checkpoints, arithmetic, and the scripts on tiny models."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from support.errors import assert_complains, refused
from support.paths import PUBLISHED_MODELS, ROOT

import mistral_ref
from mistral_ref import InputError
from mistral_ref.display import markdown_table
from mistral_ref.files.config_files import read_config
from mistral_ref.measure.benchmark import Candidate, Limit, Measurement, alternate, ratios, spread, write_json
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.shapes import SHAPES, shape
from mistral_ref.measure.synthetic import encoded, make_checkpoint, params_json, random_weights
from mistral_ref.weights import Kind, Matrix, e4m3_values

BENCHMARKS = ROOT / "benchmarks"
PUBLISHED = {
    "mistral-7b": "Mistral-7B-v0.1",
    "nemo-12b": "Mistral-Nemo-Base-2407",
    "codestral-22b": "Codestral-22B-v0.1",
    "small-24b": "Mistral-Small-3.1-24B-Instruct-2503",
    "large-123b": "Mistral-Large-Instruct-2407",
    "mixtral-8x7b": "Mixtral-8x7B-v0.1",
    "ministral-8b": "Ministral-8B-Instruct-2410",
    "ministral-3-3b": "Ministral-3-3B-2512",
    "ministral-3-8b": "Ministral-3-8B-2512",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_are_the_published_ones(name: str) -> None:
    table = json.loads(PUBLISHED_MODELS.read_text())
    published = dict(zip(table["columns"], table["models"][PUBLISHED[name]], strict=True))
    more = table["more"].get(PUBLISHED[name], {})
    windows = published.pop("sliding_window")
    pattern = windows if isinstance(windows, list) else [windows]
    config = SHAPES[name]
    assert {field: getattr(config, field) for field in published if field != "model_type"} == {
        field: value for field, value in published.items() if field != "model_type"
    }
    assert config.sliding_window == tuple(pattern) * (config.n_layers // len(pattern))
    assert (config.moe is not None, config.yarn is not None) == ("moe" in more, "rope_scaling" in more)
    assert config.tied_embeddings == more.get("tied", False)


def test_published_numbers_of_parameters() -> None:
    assert SHAPES["mistral-7b"].n_parameters == 7_241_732_096
    assert SHAPES["mixtral-8x7b"].n_parameters == 46_702_792_704


def test_a_shape_takes_other_layers_and_another_window() -> None:
    assert shape("ministral-8b", layers=5).sliding_window == (None, 32768, 32768, 32768, None)
    assert shape("mistral-7b", layers=2, window=128).sliding_window == (128, 128)
    assert shape("mistral-7b", layers=2, window=0).sliding_window == (None, None)


def test_an_unknown_shape_is_one_line() -> None:
    with refused(InputError, "shape", "'mistral-8b'", "tiny", "mistral-7b"):
        shape("mistral-8b")


@pytest.mark.parametrize("name", SHAPES)
def test_params_json_says_all_of_a_configuration(name: str, tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text(json.dumps(params_json(SHAPES[name])))
    assert read_config(tmp_path) == SHAPES[name]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_synthetic_checkpoint_loads_and_computes(kind: Kind, tmp_path: Path) -> None:
    config = shape("tiny")
    model = mistral_ref.load(make_checkpoint(tmp_path, config, kind=kind), backend="numpy")
    assert model.config == config
    assert model.weights.layers[1].wq.kind == kind
    assert model.weights.output.kind == {"fp8": "bf16", "int4": "int8"}.get(kind, kind)
    wo = model.weights.layers[0].wo.rows(slice(None), np.float32)
    assert 0.95 < wo.std() * wo.shape[1] ** 0.5 < 1.05
    logits = model.forward([1, 2, 3, 319])
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 10


@pytest.mark.parametrize("name", ["mixtral-8x7b", "ministral-3-3b"])
def test_experts_and_tied_embeddings_are_written_too(name: str, tmp_path: Path) -> None:
    config = shape(name, layers=1).replace(dim=32, hidden_dim=48, head_dim=8, vocab_size=64)
    model = mistral_ref.load(make_checkpoint(tmp_path, config), backend="numpy")
    assert model.config == config
    assert np.isfinite(model.forward([1, 2, 3])).all()


def test_weights_depend_on_the_seed_alone_and_are_reused(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def made(name: str, seed: int, window: int | None = None) -> bytes:
        def progress(done: int, total: int) -> None:
            calls.append((done, total))

        config = shape("tiny", window=window)
        return (make_checkpoint(tmp_path / name, config, seed=seed, progress=progress) / weights).read_bytes()

    weights = "consolidated.safetensors"
    first = made("a", 0)
    assert calls[-1][0] == calls[-1][1] <= len(first)
    assert made("b", 0) == first != made("c", 1)
    n_calls = len(calls)
    assert made("a", 0, window=7) == first
    assert len(calls) == n_calls, "another window writes no weights"
    assert mistral_ref.load(tmp_path / "a", backend="numpy").config.sliding_window == (7, 7)
    assert made("a", 1) != first
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [weights, "params.json"]


def test_other_weights_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "consolidated.safetensors").write_bytes(b"precious")
    with refused(InputError, tmp_path / "consolidated.safetensors", "not made here", "overwritten"):
        make_checkpoint(tmp_path, shape("tiny"))
    assert (tmp_path / "consolidated.safetensors").read_bytes() == b"precious"


def test_a_full_disk_is_noticed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**30))
    with refused(InputError, tmp_path / "consolidated.safetensors", "25.68 GiB", "1.00 GiB", "disk"):
        make_checkpoint(tmp_path, shape("mistral-7b", layers=62))
    assert not list(tmp_path.iterdir())


def test_an_unknown_kind_is_one_line(tmp_path: Path) -> None:
    with refused(InputError, "kind", "'int3'", "f32", "f16", "bf16", "fp8", "int8", "int4"):
        make_checkpoint(tmp_path, shape("tiny"), kind="int3")  # type: ignore[arg-type]


def test_every_stored_number_is_encoded_as_itself() -> None:
    codes = np.arange(256, dtype=np.uint8)
    finite = np.isfinite(e4m3_values())
    assert (encoded(e4m3_values()[finite], "fp8") == codes[finite]).all()
    bits = np.arange(2**16, dtype=np.uint16)
    values = Matrix("bits", "bf16", bits[None]).rows(slice(None), np.float32)[0]
    assert (encoded(values, "bf16") == bits)[np.isfinite(values)].all()
    assert encoded(np.float32([1 + 2**-8, 1 + 3 * 2**-8]), "bf16").tolist() == [0x3F80, 0x3F82], "ties go to even"


def test_random_weights_are_normally_distributed() -> None:
    weights = np.concatenate(list(random_weights(np.random.default_rng(0), 2**20 + 3, 0.5, "f32")))
    assert len(weights) == 2**20 + 3
    assert abs(weights.mean()) < 0.005
    assert abs(weights.std() - 0.5) < 0.005
    assert abs((abs(weights) < 0.5).mean() - 0.6827) < 0.005


def test_arithmetic_of_measurements() -> None:
    measurement = Measurement("read", "GB/s", 2.0, [0.5, 0.25, 1.0], [8.0, 10.0, 4.0])
    assert measurement.rates == [4.0, 8.0, 2.0]
    assert measurement.shares == [0.5, 0.8, 0.5]
    assert measurement.cells() == ["read", "500", "4.0", "2.0 to 8.0", "GB/s", "8.0 GB/s", "50.0", "50.0 to 80.0"]
    assert measurement.as_json()["median_share"] == 0.5
    assert spread([4, 1, 3, 2]) == (2.5, 1, 4)
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


def test_candidates_take_turns_each_after_its_limit() -> None:
    log: list[str] = []

    def limit() -> float:
        log.append("limit")
        return 1.0

    candidates = [Candidate(name, lambda name=name: log.append(name), 1.0, Limit("GB/s", limit)) for name in "ab"]
    measured = alternate(candidates, repeats=3, seconds=0)
    assert log == ["a", "a", "b", "b"] + ["limit", "a", "limit", "b"] * 3
    assert [len(m.seconds) for m in measured] == [len(m.limits) for m in measured] == [3, 3]
    with refused(InputError, "repeats", 0):
        alternate(candidates, repeats=0)


def test_tables_line_up() -> None:
    lines = markdown_table(["what", "ms"], [["a long name", "1"], ["b", "12.25"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2:] == ["| a long name |     1 |", "| b           | 12.25 |"]


def test_the_machine_is_described(tmp_path: Path) -> None:
    description = machine(3)
    write_json(tmp_path / "machine.json", description)
    assert json.loads((tmp_path / "machine.json").read_text()) == description
    assert "threads: 3" in list(machine_lines(description))
    with refused(InputError, tmp_path / "nowhere" / "machine.json", "no directory"):
        write_json(tmp_path / "nowhere" / "machine.json", description)


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "compare_peers", "start"])
def test_help_shows_examples(name: str) -> None:
    done = script(name, "--help")
    assert done.returncode == 0
    assert f"examples:\n  python benchmarks/{name}.py" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernels", "compare_peers"])
def test_a_mistake_is_one_line(name: str) -> None:
    done = script(name, "--shape", "giant")
    assert (done.returncode, done.stdout) == (2, "")
    assert_complains(done.stderr, "shape", "'giant'", "tiny", program=f"{name}.py")


@pytest.mark.slow
def test_kernels_are_measured_against_limits(tmp_path: Path) -> None:
    small = ("--quick", "--shape", "tiny", "--buffer-mib", 1, "--seconds", 0, "--repeats", 2)
    done = script("kernels", *small, "--json", tmp_path / "out.json", "--figure", tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    groups = json.loads((tmp_path / "out.json").read_text())["groups"]
    assert list(groups) == ["decode", "prompt", "attention", "depth"]
    rows = [row for group in groups.values() for row in group]
    assert all(len(row["shares"]) == 2 and min(row["shares"]) > 0 for row in rows)
    assert f"| {rows[0]['name']}" in done.stdout
    assert "times as fast as NumPy" in done.stdout


@pytest.mark.slow
def test_the_time_of_a_token_is_told_apart(tmp_path: Path) -> None:
    small = ("--tokens", 2, "--repeats", 2, "--depth", 4)
    done = script("one_token", *small, "--json", tmp_path / "out.json", "--figure", tmp_path / "out.svg")
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "out.json").read_text())
    assert len(content["plain_us"]) == 2
    assert [row[0] for row in content["rows"][-2:]] == ["between", "in all"]
    assert "<svg" in (tmp_path / "out.svg").read_text()


def compared(tmp_path: Path, *options: object) -> dict[str, dict[str, object]]:
    """Run compare_peers.py on a tiny float32 model; return what it says of each process."""
    small = ("--shape", "tiny", "--layers", 2, "--prompt", 8, "--generate", 2, "--depth", 16, "--repeats", 1)
    files = ("--work-dir", tmp_path, "--json", tmp_path / "out.json", "--figure", tmp_path / "out.svg")
    done = script("compare_peers", *small, *files, "--rest", 0, "--dtype", "f32", "--cache-dtype", "float32", *options)
    assert done.returncode == 0, done.stderr
    assert "<svg" in (tmp_path / "out.svg").read_text()
    content = json.loads((tmp_path / "out.json").read_text())
    assert {result["test"] for result in content["results"]} == {"pp8", "tg2", "tg2 @ d16"}
    assert all(len(result["samples_ts"]) == 1 for result in content["results"])
    return content["processes"]


@pytest.mark.slow
def test_ours_is_compared_with_itself_where_there_are_no_peers(tmp_path: Path) -> None:
    processes = compared(tmp_path, "--window", 4, "--peers")
    assert processes["mistral_ref"]["logits_differ"] == 0
    assert processes["mistral_ref window 4"]["logits_differ"] > 1e-3


@pytest.mark.slow
def test_llama_cpp_computes_the_same_from_our_gguf(tmp_path: Path) -> None:
    for module in ("llama_cpp", "gguf"):
        if importlib.util.find_spec(module) is None:
            pytest.skip("llama-cpp-python or gguf is not installed")
    processes = compared(tmp_path, "--window", 0, "--flash-attention", "off", "--peers", "llama.cpp")
    assert processes["llama.cpp"]["logits_differ"] < 1e-5


@pytest.mark.slow
def test_transformers_computes_the_same_from_our_directory(tmp_path: Path) -> None:
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    processes = compared(tmp_path, "--window", 0, "--peers", "transformers")
    assert processes["transformers"]["logits_differ"] < 1e-5


@pytest.mark.parametrize("kind", ["f32", "bf16"])
def test_the_huggingface_directory_holds_the_same_model(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    hf_writer = importlib.import_module("peers.hf_writer")
    ours = make_checkpoint(tmp_path / "ours", shape("tiny", window=0), kind=kind)
    hf_writer.write_huggingface(ours, tmp_path / "theirs")
    logits = [mistral_ref.load(path, backend="numpy").forward([1, 2, 3]) for path in (ours, tmp_path / "theirs")]
    np.testing.assert_allclose(logits[0], logits[1], rtol=0, atol=1e-5)
