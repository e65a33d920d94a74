"""Records of bench: read with care, and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.errors import refused

from mistral_ref.errors import InputError
from mistral_ref.measure.records import different_conditions, pairs, read_records

RECORD = {"n_prompt": 16, "n_gen": 0, "n_depth": 0, "n_threads": 2, "samples_ts": [4.0, 5.0], "percent_of_limit": 30.0}


def written(path: Path, *changes: dict[str, Any]) -> Path:
    path.write_text(json.dumps([RECORD | change for change in changes]))
    return path


def test_what_a_record_says_is_read(tmp_path: Path) -> None:
    file = written(tmp_path / "a.json", {}, {"n_prompt": 0, "n_gen": 8, "n_depth": 64})
    prompt, generated = read_records(file)
    assert (prompt.test, prompt.n_threads, prompt.rates, prompt.percent) == ("pp16", 2, [4.0, 5.0], 30.0)
    assert generated.test == "tg8 @ d64"


def test_llama_bench_s_records_lack_ours(tmp_path: Path) -> None:
    theirs = {name: value for name, value in RECORD.items() if name not in ("n_depth", "percent_of_limit")}
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps([theirs]))
    (found,) = read_records(file)
    assert (found.test, found.percent) == ("pp16", None)


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"n_prompt": "16"}, ("n_prompt", "'16'")),
        ({"n_threads": 0}, ("n_threads", 0)),
        ({"n_gen": True}, ("n_gen", True)),
        ({"samples_ts": []}, ("samples_ts", [])),
        ({"samples_ts": [1, 0]}, ("samples_ts", [1, 0])),
        ({"samples_ts": [float("nan")]}, ("samples_ts", "nan")),
        ({"samples_ts": 3}, ("samples_ts", 3)),
    ],
)
def test_a_wrong_field_is_refused_by_name(tmp_path: Path, change: dict[str, Any], facts: tuple[object, ...]) -> None:
    file = written(tmp_path / "a.json", {}, change)
    with refused(InputError, file, "record 1", *facts):
        read_records(file)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "3", "[1]", "[" * 100_001, "\xff"])
def test_what_is_no_list_of_records_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text, encoding="latin-1")
    with refused(InputError, file):
        read_records(file)


def test_the_same_tests_are_paired(tmp_path: Path) -> None:
    generated = {"n_prompt": 0, "n_gen": 8}
    a = read_records(written(tmp_path / "a.json", {}, generated))
    b = read_records(written(tmp_path / "b.json", generated | {"n_threads": 4}, {"n_prompt": 32}))
    assert [(one.test, one.n_threads, other.n_threads) for one, other in pairs(a, b)] == [("tg8", 2, 4)]
    several = read_records(written(tmp_path / "c.json", *({"n_threads": n} for n in (1, 2))))
    assert [(one.n_threads, other.n_threads) for one, other in pairs(a, several)] == [(2, 2)]


def test_conditions_that_differ_are_named_and_printable() -> None:
    a, b = {"numba": "1", "cpu_info": "x"}, {"numba": "2", "cpu_info": "\x1b[2J"}
    assert set(different_conditions(a, b)) == {"numba: A 1, B 2", r"cpu info: A x, B \x1b[2J"}
    assert list(different_conditions(a, a)) == []
