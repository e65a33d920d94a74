"""mistral-ref bench: tests and their names, what a run is counted as, and what is printed."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.checkpoints import FAMILIES
from support.errors import assert_complains, refused
from support.tiny import BACKENDS, model_of

from mistral_ref import InputError
from mistral_ref.cli import main
from mistral_ref.measure import machine
from mistral_ref.measure.benchmark import Limit
from mistral_ref.measure.cost import step_costs
from mistral_ref.measure.shapes import shape
from mistral_ref.measure.speed import SpeedResult, SpeedTest, measure_speed, speed_tests, work_of
from mistral_ref.measure.synthetic import checkpoint_bytes, make_checkpoint
from mistral_ref.weights import matrices

# fmt: off
LLAMA_BENCH_KEYS = {
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size",
    "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_prompt", "n_gen", "n_depth",
    "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
}
OUR_KEYS = {
    "dtype", "load_s", "first_token_s", "compile_s", "percent_of_limit", "peak_resident", "anonymous", "power_source",
    "throttled", "numba", "numpy", "blas", "threading_layer",
}
# fmt: on
READ, PEAK = Limit("GB/s", lambda: 2.0), Limit("GFLOP/s", lambda: 8.0)


def test_tests_are_named_as_llama_bench_names_them() -> None:
    tests = speed_tests([512, 0], [128], [0, 4096])
    assert [test.name for test in tests] == ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]
    assert [test.n for test in tests] == [512, 128, 512, 128]
    assert speed_tests([0], [0], [0]) == []
    with refused(InputError, "n-gen", -1):
        speed_tests([1], [-1], [0])


def test_figures_of_a_result() -> None:
    result = SpeedResult(SpeedTest(0, 10, 0), "GB/s", work=4.0, seconds=[1.0, 2.0], limits=[8.0, 4.0])
    assert result.rates == [10.0, 5.0]
    assert result.mean == 7.5
    assert result.deviation == pytest.approx(3.5355, abs=1e-4)
    assert result.work_rates == [4.0, 2.0]
    assert result.shares == [0.5, 0.5]
    assert SpeedResult(SpeedTest(1, 0, 0), "GFLOP/s", 1.0, [1.0], [1.0]).deviation == 0


def test_what_a_run_is_counted_as() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    config, weights = model.config, model.weights
    one = step_costs(config, weights, 1, 7)
    flops, n_bytes = work_of(model, SpeedTest(0, 4, 5), "float32")
    assert (flops, n_bytes) == (4 * sum(c.flops for c in one), 4 * sum(c.bytes for c in one))
    # a prompt of 3: every product for three tokens, but the output for one
    prompt, single = step_costs(config, weights, 3), step_costs(config, weights, 1)
    expected = sum(c.flops for c in prompt) - sum(c.flops for c in prompt[-2:]) + sum(c.flops for c in single[-2:])
    assert work_of(model, SpeedTest(3, 0, 0), "float32")[0] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_does_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["dense_windowed"].config, backend=backend)  # a window of 5
    monkeypatch.setattr("mistral_ref.measure.speed.CHUNK", 4)
    seen, forward = [], model.forward

    def spied(ids: np.ndarray, cache: object, **options: object) -> np.ndarray:
        seen.append((cache.length, tuple(ids)))
        return forward(ids, cache, **options)

    monkeypatch.setattr(model, "forward", spied)
    tests = speed_tests([10], [3], [0, 9])
    said: list[str] = []
    results = measure_speed(model, tests, repeats=2, read=READ, peak=PEAK, progress=said.append)
    assert [result.test for result in results] == tests
    for result in results:
        assert len(result.seconds) == len(result.limits) == 2
        assert min(result.seconds) > 0
        assert result.limits == ([2.0] * 2 if result.test.n_gen else [8.0] * 2)
    starts = [[length for length, _ in seen[run : run + 3]] for run in (0, 3, 6)]  # 10 tokens, 4 at a time, three times
    assert starts == [[0, 4, 8]] * 3
    assert seen[0:3] == seen[3:6] == seen[6:9]
    assert [length for length, _ in seen[9:17]] == [0, 1, 0, 1, 2, 0, 1, 2]  # two tokens to warm up, then twice three
    assert [length for length, _ in seen[-8:]] == [9, 10, 9, 10, 11, 9, 10, 11]
    assert "tg3 @ d9: 2 of 2" in said
    assert len(said) == 4 * 3 + 2


def test_a_slow_test_runs_less_often() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    (result,) = measure_speed(model, speed_tests([8], [0], [0]), repeats=50, read=READ, peak=PEAK, seconds=1e-9)
    assert len(result.seconds) == 1
    (result,) = measure_speed(model, speed_tests([8], [0], [0]), repeats=3, read=READ, peak=PEAK, warm_up=False)
    assert len(result.seconds) == 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), shape("tiny"))


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["bench", *map(str, arguments)]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_json_has_llama_bench_s_keys_and_ours(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    options = ("-p", 16, "-n", "4,2", "-d", "0,8", "-r", 2, "--threads", 1, "--cache-dtype", "float16", "-o", "json")
    records = json.loads(printed(capsys, "-m", tiny, *options))
    tests = ["pp16", "tg4", "tg2"]
    assert [record["test"] for record in records] == [*tests, *(f"{test} @ d8" for test in tests)]
    for record in records:
        assert record.keys() >= (LLAMA_BENCH_KEYS | OUR_KEYS)
        n = record["n_prompt"] or record["n_gen"]
        rates = [1e9 * n / ns for ns in record["samples_ns"]]
        assert record["samples_ts"] == pytest.approx(rates, rel=1e-4)
        assert record["avg_ts"] == pytest.approx(np.mean(rates), rel=1e-4)
        assert record["stddev_ts"] == pytest.approx(np.std(rates, ddof=1), rel=1e-3, abs=1e-9)
        assert (record["type_k"], record["n_threads"]) == ("f16", 1)
        assert record["percent_of_limit"] > 0
        assert ("gbs" in record) == (record["n_gen"] > 0)
        assert ("gflops" in record) == (record["n_prompt"] > 0)


def test_markdown_and_csv(capsys: pytest.CaptureFixture[str], tiny: Path) -> None:
    options = ("--model", tiny, "-p", 4, "-n", 2, "-r", 1, "--backend", "numpy")
    text = printed(capsys, *options)
    assert text.startswith("| model")
    assert " pp4 " in text
    assert " tg2 " in text
    for line in ("load ", "memory: ", "throttled: ", "threads: ", "numba: ", "power source: "):
        assert line in text
    rows = list(csv.DictReader(io.StringIO(printed(capsys, *options, "-o", "csv"))))
    assert [row["test"] for row in rows] == ["pp4", "tg2"]
    assert float(rows[0]["avg_ts"]) > 0


def test_a_shape_is_made_once_and_fits(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--shape", "tiny", "--layers", 1, "--dtype", "f16", "--work-dir", tmp_path, "--quick")
    first = printed(capsys, *options)
    assert "tiny-1-f16 f16" in first
    weights = tmp_path / "tiny-1-f16" / "consolidated.safetensors"
    made_at = weights.stat().st_mtime_ns
    printed(capsys, *options)
    assert weights.stat().st_mtime_ns == made_at
    monkeypatch.setattr("mistral_ref.cli.bench.available_memory", lambda: 1000)
    assert main(["bench", *map(str, options)]) == 2
    assert_complains(capsys.readouterr().err, "tiny", "1 layers", "1000 bytes", "--layers")


def test_what_a_checkpoint_takes_is_known_before() -> None:
    config = shape("mistral-7b")
    # 7.24 billion weights of 2 bytes: 7,241,732,096 by the published parameter count
    assert checkpoint_bytes(config, "bf16") == 2 * 7_241_732_096


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("-p", "x"), ("--n-prompt", "'x'", "whole numbers")),
        (("-d", "1,,2"), ("--n-depth", "'1,,2'")),
        (("-n", "-5"), ("--n-gen", "'-5'")),
        (("-p", "0", "-n", "0"), ("nothing to measure", "--n-prompt", "--n-gen")),
        (("-r", "0"), ("--repetitions", 0)),
        (("--shape", "giant"), ("shape", "'giant'", "tiny")),
        (("--shape", "tiny", "--layers", "0"), ("layers", 0)),
        (("--shape", "tiny", "--model", "x"), ("--model", "--shape")),
        (("--model", "nowhere"), ("'nowhere'", "no such directory")),
    ],
)
def test_mistakes_are_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], facts: tuple[object, ...]
) -> None:
    command = ["bench", *arguments, "--work-dir", str(tmp_path)]
    try:
        status = main(command)
    except SystemExit as exit:  # what argparse finds by itself
        status = exit.code
    assert status == 2
    assert_complains(capsys.readouterr().err, *facts)


def test_a_longer_run_than_the_model_is_meant_for_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "short", shape("tiny").replace(max_seq_len=100))
    assert main(["bench", "--model", str(tmp_path / "short"), "-p", "90", "-d", "20"]) == 2
    assert_complains(capsys.readouterr().err, "148 tokens", 100, "max_seq_len")


def test_matrices_are_counted_once() -> None:
    tied = model_of(FAMILIES["tied_multi_query"].config)
    per_layer = 7
    assert len(matrices(tied.weights)) == 1 + per_layer * tied.config.n_layers
    apart = model_of(FAMILIES["dense_windowed"].config)
    assert len(matrices(apart.weights)) == 2 + per_layer * apart.config.n_layers


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


def test_help_does_not_start_numba() -> None:
    code = "import sys; from mistral_ref.cli import main\ntry: main(['bench', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'numba' not in sys.modules"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "mistral-ref bench --shape mistral-7b" in done.stdout
