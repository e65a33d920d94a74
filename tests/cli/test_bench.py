"""mistral-ref bench: what is printed, what is refused."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support.command import COMMAND, run, start
from support.errors import assert_complains

import mistral_ref
from mistral_ref.cli import main
from mistral_ref.cli.bench_tables import parameters
from mistral_ref.errors import size
from mistral_ref.measure.shapes import shape
from mistral_ref.measure.synthetic import make_checkpoint

# fmt: off
LLAMA_BENCH_KEYS = {
    "build_commit", "build_number", "cpu_info", "gpu_info", "backends", "model_filename", "model_type", "model_size",
    "model_n_params", "n_batch", "n_ubatch", "n_threads", "type_k", "type_v", "n_prompt", "n_gen", "n_depth",
    "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts",
}
OUR_KEYS = {
    "dtype", "quantized_inputs", "bf16_inputs", "load_s", "first_token_s", "compile_s", "percent_of_limit",
    "peak_resident", "anonymous", "power_source", "throttled", "percent_of_others", "numba", "numpy", "blas",
}
# fmt: on


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny"), shape("tiny"))


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the limit of reading with less than the caches hold: it is quicker, and the figure is not looked at."""
    monkeypatch.setattr("mistral_ref.measure.machine.uncached_bytes", lambda _: 2**20)


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


def test_each_number_of_threads_has_its_rows_and_a_file_keeps_all(
    capsys: pytest.CaptureFixture[str], tiny: Path, tmp_path: Path
) -> None:
    options = ("-m", tiny, "-p", 4, "-n", 2, "-r", 2, "-t", "1,2")
    text = printed(capsys, *options, "-o", tmp_path / "a.json")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if " numba " in line]
    assert [(row[4], row[5]) for row in rows] == [("1", "pp4"), ("1", "tg2"), ("2", "pp4"), ("2", "tg2")]
    assert "\nthreads: 1, 2\n" in text
    records = json.loads((tmp_path / "a.json").read_text())
    config = mistral_ref.load(tiny).config
    assert {(row[1], row[2]) for row in rows} == {(size(records[0]["model_size"]), parameters(config.n_parameters))}
    assert [f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}" for record in records] == [row[6] for row in rows]
    printed(capsys, *options, "-o", tmp_path / "b.csv")
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 5


def test_two_files_are_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    common = {"n_prompt": 0, "n_gen": 8, "n_threads": 2}
    a = [common | {"samples_ts": [10.0, 20.0, 12.0], "percent_of_limit": 50.0, "numba": "1"}]
    b = [common | {"samples_ts": [24.0, 30.0, 16.0], "numba": "2"}, common | {"n_gen": 9, "samples_ts": [1.0]}]
    for name, records in (("a.json", a), ("b.json", b)):
        (tmp_path / name).write_text(json.dumps(records))
    text = printed(capsys, "--compare", tmp_path / "a.json", tmp_path / "b.json")
    cells = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert cells == ["tg8", "2", "12.00", "24.00", "2.00", "0.80 to 3.00", "50%", "unknown"]
    assert text.splitlines()[3:] == ["only in B: tg9", "numba: A 1, B 2"]
    (tmp_path / "b.json").write_text(json.dumps(b[1:]))
    assert main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert_complains(capsys.readouterr().err, "tg8", "tg9")


@pytest.mark.parametrize(("others", "is_said"), [(None, False), (0.02, False), (0.4, True)])
def test_what_others_compute_stands_beside_the_figures(
    capsys: pytest.CaptureFixture[str], tiny: Path, monkeypatch: pytest.MonkeyPatch, others: float | None, is_said: bool
) -> None:
    monkeypatch.setattr("mistral_ref.measure.speed.share_of_others", lambda *_: others)
    text = printed(capsys, "-m", tiny, "-p", 4, "-n", 0, "-r", 1, "--backend", "numpy")
    shown = "unknown" if others is None else f"{100 * others:.0f}%"
    assert text.splitlines()[2].strip("|").split("|")[-1].strip() == shown
    assert ("up to 40%" in text) == is_said


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


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (("-p", "x"), ("--n-prompt", "'x'", "whole numbers")),
        (("-d", "1,,2"), ("--n-depth", "'1,,2'")),
        (("-n", "-5"), ("--n-gen", "'-5'")),
        (("-p", "0", "-n", "0"), ("nothing to measure", "--n-prompt", "--n-gen")),
        (("-r", "0"), ("--repetitions", 0)),
        (("-t", "1,x"), ("--threads", "'1,x'")),
        (("-t", "0"), ("threads", 0)),
        (("-o", "xml"), ("-o", Path("xml"), "json")),
        (("-o", "nowhere/a.json"), ("nowhere/a.json", "nowhere")),
        (("--compare", "nowhere.json", "b.json"), ("nowhere.json", "No such file")),
        (("--shape", "giant"), ("shape", "'giant'", "tiny")),
        (("--shape", "tiny", "--layers", "0"), ("layers", 0)),
        (("--shape", "tiny", "--model", "x"), ("--model", "--shape")),
        (("--model", "nowhere"), (Path("nowhere"), "no such directory")),
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


def test_help_does_not_start_numba() -> None:
    code = "import sys; from mistral_ref.cli import main\ntry: main(['bench', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'numba' not in sys.modules"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "mistral-ref bench --shape mistral-7b" in done.stdout


@pytest.mark.parametrize("ended_by", ["SIGTERM", "SIGKILL"])
def test_what_ends_the_writing_of_weights_leaves_nothing_for_long(ended_by: str, tmp_path: Path) -> None:
    """A signal that can be heeded leaves nothing; what a killed process leaves, the next bench removes."""
    process = start(*COMMAND, "bench", "--shape", "mistral-7b", "--layers", 4, "--work-dir", tmp_path)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/.*.partial")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(getattr(signal, ended_by))
    process.communicate(timeout=60)
    left = list(tmp_path.glob("*/.*.partial"))
    assert len(left) == (ended_by == "SIGKILL")
    for path in left:
        os.utime(path, (0, 0))
    make_checkpoint(tmp_path / "tiny-2-bf16", shape("tiny"))
    assert run("bench", "--shape", "tiny", "--work-dir", tmp_path, "--threads", 9999).returncode == 2
    assert list(tmp_path.glob("*/.*.partial")) == []


def test_without_a_home_a_folder_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user without an entry in passwd
    done = run("bench", "--shape", "tiny")
    assert done.returncode == 2
    assert_complains(done.stderr, "home", "--work-dir", "HOME", "XDG_CACHE_HOME")
