"""Records of `bench`: one for each test. A field that llama-bench has bears its name; other fields bear names of ours.

So records of llama-bench (`-o json`) can be compared with ours, too.
"""

from __future__ import annotations

import csv
import datetime
import io
import math
import os
from collections.abc import Iterator, Sequence
from statistics import mean, median, stdev
from typing import Any, NamedTuple

from mistral_ref.errors import InputError, printable, short_repr
from mistral_ref.files.json_file import Limits, parse_json
from mistral_ref.files.paths import local_path
from mistral_ref.files.whole_file import whole_file
from mistral_ref.measure.benchmark import write_json
from mistral_ref.measure.speed import CHUNK, SpeedResult, SpeedTest
from mistral_ref.model import Model
from mistral_ref.weights import matrices

Record = dict[str, Any]
_CACHE_TYPES = {"float32": "f32", "float16": "f16", "float64": "f64", "int8": "i8"}
_LIMITS = Limits(16 * 2**20, 100_000, 10**6)
# What figures depend on, and what may therefore explain why two of them differ.
_CONDITIONS = (
    *("model_type", "model_size", "backends", "dtype", "type_k", "quantized_inputs", "bf16_inputs", "cpu_info"),
    *("power_source", "system", "build_commit", "numba", "numpy", "blas"),
)


def about_model(model: Model, source: str | os.PathLike[str], *, cache_dtype: str | None) -> Record:
    """Return the fields that describe a model and its settings; `source` is where it was loaded from."""
    weights = matrices(model.weights)
    cache_type = _CACHE_TYPES[model.new_cache(dtype=cache_dtype).dtype]
    return {
        "model_filename": os.fspath(source),
        "model_type": f"{local_path(source).name} {'+'.join(sorted({matrix.kind for matrix in weights}))}",
        "model_size": sum(matrix.nbytes for matrix in weights),
        "model_n_params": model.config.n_parameters,
        "backends": model.ops.name,
        "n_batch": CHUNK,
        "n_ubatch": CHUNK,
        "type_k": cache_type,
        "type_v": cache_type,
        "dtype": str(model.ops.dtype),
        "quantized_inputs": model.ops.quantized_inputs,
        "bf16_inputs": model.ops.bf16_inputs,
    }


def record(result: SpeedResult, about: Record, description: Record) -> Record:
    """Return the record of a result: `about` with fields before it and after it; `description` is machine()'s."""
    work = "gbs" if result.test.n_gen else "gflops"
    return {
        "build_commit": description["commit"],
        "build_number": description["mistral_ref"],
        "cpu_info": description["cpu"],
        "gpu_info": "",
        **about,
        "n_prompt": result.test.n_prompt,
        "n_gen": result.test.n_gen,
        "n_depth": result.test.depth,
        "test": result.test.name,
        "test_time": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "avg_ns": round(1e9 * mean(result.seconds)),
        "stddev_ns": round(1e9 * stdev(result.seconds)) if len(result.seconds) > 1 else 0,
        "avg_ts": result.mean,
        "stddev_ts": result.deviation,
        "median_ts": median(result.rates),
        "samples_ns": [round(1e9 * seconds) for seconds in result.seconds],
        "samples_ts": result.rates,
        work: median(result.work_rates),
        f"{work}_limit": median(result.limits),
        "percent_of_limit": 100 * median(result.shares),
        "samples_percent_of_limit": [100 * share for share in result.shares],
        "percent_of_others": None if result.others is None else 100 * result.others,
        **{name: description[name] for name in ("numba", "numpy", "blas", "power_source", "system")},
    }


def as_csv(records: Sequence[Record]) -> str:
    """Return records as CSV with one line for each, below a line of all names."""
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys(name for one in records for name in one), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def write_records(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Write records to a JSON file, or to a CSV file if the name ends in .csv; raise InputError if that fails."""
    if local_path(path).suffix == ".csv":
        with whole_file(path, InputError) as file:
            file.write(as_csv(records).encode())
    else:
        write_json(path, records)


class Measured(NamedTuple):
    """What a record says of a test.

    rates       tokens per second of each run
    percent     of the limit; None if the record does not say
    """

    test: str
    n_threads: int
    rates: list[float]
    percent: float | None
    record: Record


def read_records(path: str | os.PathLike[str]) -> list[Measured]:
    """Return the records in a JSON file, ours or llama-bench's; raise InputError if it holds anything else."""
    file = local_path(path)
    try:
        records = parse_json(file.read_text(encoding="utf-8"), _LIMITS)
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(records, list) or not records:
        raise InputError(f"{file}: holds {short_repr(records)}; expected a list of records, as bench writes it")
    return [_measured(one, f"{file}: record {number}") for number, one in enumerate(records)]


def _measured(found: Any, where: str) -> Measured:
    """Return what a record says; `where` begins the message of an error."""

    def whole(name: str, least: int, default: int | None = None) -> int:
        value = found.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**31:
            raise InputError(f"{where}: {name} is {short_repr(value)}; expected a whole number of at least {least}")
        return value

    if not isinstance(found, dict):
        raise InputError(f"{where} is {short_repr(found)}; expected an object")
    test = SpeedTest(whole("n_prompt", 0), whole("n_gen", 0), whole("n_depth", 0, default=0))
    rates = found.get("samples_ts")
    if not isinstance(rates, list) or not rates or not all(_is_positive(rate) for rate in rates):
        raise InputError(f"{where}: samples_ts is {short_repr(rates)}; expected numbers above 0")
    percent = found.get("percent_of_limit")
    return Measured(test.name, whole("n_threads", 1), rates, percent if _is_positive(percent) else None, found)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def pairs(a: Sequence[Measured], b: Sequence[Measured]) -> list[tuple[Measured, Measured]]:
    """Return the records of A and B that measure the same test, in the order of A.

    The number of threads counts if A or B has a test with several of them.
    """
    several = any(len({one.test for one in side}) < len(side) for side in (a, b))

    def key(one: Measured) -> tuple[str, int]:
        return one.test, one.n_threads if several else 0

    found = {key(one): one for one in b}
    return [(one, found[key(one)]) for one in a if key(one) in found]


def different_conditions(a: Record, b: Record) -> Iterator[str]:
    """Yield a line for each condition in which two records differ.

    >>> list(different_conditions({"numba": "0.68", "numpy": "2.3"}, {"numba": "0.69", "numpy": "2.3"}))
    ['numba: A 0.68, B 0.69']
    """
    for name in _CONDITIONS:
        of_a, of_b = (printable(str(side.get(name, "unknown"))) for side in (a, b))
        if of_a != of_b:
            yield f"{name.replace('_', ' ')}: A {of_a}, B {of_b}"
