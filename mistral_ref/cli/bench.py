"""mistral-ref bench: measure how fast a model is on this machine, and what limits it."""

from __future__ import annotations

import argparse
import csv
import datetime
import io
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any, get_args

from mistral_ref.cli.common import add_compute_options, load_model, model_directory, progress_bar, size
from mistral_ref.cli.output import say
from mistral_ref.cli.width import fitted, terminal_width
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int, escaped, short_repr
from mistral_ref.files.whole_file import remove_leftovers
from mistral_ref.host import available_memory, chosen_threads, process_memory
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.measure.shapes import SHAPES, shape
from mistral_ref.model import Model
from mistral_ref.weights import Kind, matrices

if TYPE_CHECKING:
    from mistral_ref.measure.speed import SpeedResult

_DESCRIPTION = """\
Measure how many tokens per second a model processes on this machine. There are
two kinds of tests, as in llama-bench:
  pp512    prompt processing: 512 tokens, 512 at a time
  tg128    text generation: 128 tokens, one at a time
A test with "@ d4096" in its name begins after 4096 other tokens.

Tokens are random; tokenizer and sampling are not measured. Each test runs once
as a warm-up, and then several times. The table shows the mean and the standard
deviation of tokens per second (t/s).

Each run is compared with a limit of this machine, which is measured just
before the run. For generation the limit is how many GB/s the machine can read
from memory. For prompts it is how many GFLOP/s of multiply-adds it can do. The
table shows the GB/s or GFLOP/s that the model reached, and how many percent of
the limit that is.

-p, -n and -d take one number or a list such as 128,512.
"""
_EXAMPLES = """\
examples:
  # the demonstration model
  mistral-ref bench
  # ends within a minute
  mistral-ref bench --quick --model DIR
  # random weights in the shape of a published model; nothing is downloaded
  mistral-ref bench --shape mistral-7b --layers 8
  # beyond its window a model gets no slower
  mistral-ref bench --shape mistral-7b -p 0 -n 32 -d 0,4096,8192
  mistral-ref bench --model DIR -o json > results.json
"""
_QUICK = {"n_prompt": "64", "n_gen": "16", "repetitions": 3}
_QUICK_SECONDS = 10.0  # about how long the runs of one test take with --quick


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "bench",
        help="measure how fast a model is, and what limits it",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    _add_weights_options(parser)
    add_compute_options(parser)
    _add_test_options(parser)
    parser.add_argument(
        "-o",
        "--output",
        choices=["md", "json", "csv"],
        default="md",
        metavar="FORMAT",
        help="the format of the results: md, a Markdown table; json, with every sample; or csv (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def _add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say whose weights are measured."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "-m",
        "--model",
        metavar="DIR",
        type=model_directory,
        default=DEMO_MODEL,
        help="directory with the weights (default: the demonstration model)",
    )
    which.add_argument(
        "--shape",
        metavar="NAME",
        help="make random weights in the shape of a published model, and measure these. NAME is one of: "
        f"{', '.join(SHAPES)}",
    )
    shapes = parser.add_argument_group("with --shape")
    shapes.add_argument(
        "--layers", type=int, metavar="N", help="number of layers (default: as many as the published model has)"
    )
    shapes.add_argument(
        "--dtype",
        dest="kind",
        choices=get_args(Kind),
        default="bf16",
        help="the type of the weights (default: %(default)s)",
    )
    shapes.add_argument(
        "--work-dir",
        metavar="DIR",
        help="folder in which the weights are kept, so that the next bench need not make them again "
        "(default: mistral_ref/benchmarks in the user's cache folder)",
    )


def _add_test_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is measured."""
    tests = parser.add_argument_group("tests")
    tests.add_argument(
        "-p",
        "--n-prompt",
        default="512",
        metavar="N",
        help="number of tokens in the prompt; 0: no prompt test (default: %(default)s)",
    )
    tests.add_argument(
        "-n",
        "--n-gen",
        default="128",
        metavar="N",
        help="number of tokens to generate; 0: no generation test (default: %(default)s)",
    )
    tests.add_argument(
        "-d",
        "--n-depth",
        default="0",
        metavar="N",
        help="number of tokens that are in the cache before a test begins (default: %(default)s)",
    )
    tests.add_argument(
        "-r",
        "--repetitions",
        type=int,
        default=5,
        metavar="N",
        help="number of measured runs of each test (default: %(default)s)",
    )
    tests.add_argument("--no-warmup", action="store_true", help="leave out the first run, which is not measured")
    tests.add_argument(
        "--cache-dtype",
        choices=["float32", "float16", "int8"],
        help="the type of keys and values in the cache (default: float32)",
    )
    tests.add_argument(
        "--quick", action="store_true", help="measure pp64 and tg16 with 3 runs of each, about 10 seconds for each test"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure, and print the results."""
    # Imported here and in the functions below: the import starts Numba, and --help does not need Numba.
    from mistral_ref.measure import benchmark, machine, speed  # noqa: PLC0415

    if arguments.quick:
        vars(arguments).update(_QUICK)
    checked_int("--repetitions", arguments.repetitions, least=1)
    numbers = {name: getattr(arguments, name) for name in ("n_prompt", "n_gen", "n_depth")}
    tests = speed.speed_tests(*(_whole_numbers(name, text) for name, text in numbers.items()))
    if not tests:
        raise InputError("nothing to measure; expected --n-prompt or --n-gen above 0")
    n_tokens = max(test.depth + test.n for test in tests)
    if arguments.shape is not None:
        arguments.model = _synthetic(arguments)
    throttled = machine.throttle_count()
    model, started = _started(arguments, n_tokens)
    n_threads = chosen_threads(model.ops.threads)
    n_bytes = sum(matrix.nbytes for matrix in matrices(model.weights))
    total, counter = sum(bool(test.depth) + 1 + arguments.repetitions for test in tests), itertools.count()
    with progress_bar("measuring", is_long=True) as bar:
        results = speed.measure_speed(
            model,
            tests,
            repeats=arguments.repetitions,
            read=benchmark.read_limit(n_threads, machine.uncached_bytes(n_bytes)),
            peak=benchmark.multiply_add_limit(n_threads),
            cache_dtype=arguments.cache_dtype,
            seconds=_QUICK_SECONDS if arguments.quick else None,
            warm_up=not arguments.no_warmup,
            progress=(lambda text: bar(next(counter), total, text)) if bar else None,
        )
    description = machine.machine(n_threads)
    about = {
        **_about(model, arguments),
        "n_threads": n_threads,
        **started,
        **process_memory(os.getpid()),
        "throttled": None if throttled is None else (machine.throttle_count() or 0) - throttled,
    }
    _print([_record(result, about, description) for result in results], description, arguments.output)


def _about(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of llama-bench's records that describe the model and its settings, but not the threads."""
    from mistral_ref.measure.speed import CHUNK  # noqa: PLC0415 (starts Numba)

    weights = matrices(model.weights)
    cache_type = _CACHE_TYPES[model.new_cache(dtype=arguments.cache_dtype).dtype]
    return {
        "model_filename": os.fspath(arguments.model),
        "model_type": f"{Path(arguments.model).name} {'+'.join(sorted({matrix.kind for matrix in weights}))}",
        "model_size": sum(matrix.nbytes for matrix in weights),
        "model_n_params": model.config.n_parameters,
        "backends": model.ops.name,
        "n_batch": CHUNK,
        "n_ubatch": CHUNK,
        "type_k": cache_type,
        "type_v": cache_type,
        "dtype": str(model.ops.dtype),
        "repacked": arguments.repack,
    }


def _whole_numbers(name: str, text: str) -> list[int]:
    """Return the numbers of a list such as "128,512"."""
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise InputError(
            f"--{name.replace('_', '-')} is {short_repr(text)}; expected whole numbers with commas between"
        )
    return [int(part) for part in parts]


def _synthetic(arguments: argparse.Namespace) -> Path:
    """Return the directory of random weights in the shape of the options. Make it if it is not there yet.

    Raises InputError if the weights do not fit in memory.
    """
    from mistral_ref.measure import machine, synthetic  # noqa: PLC0415

    config = shape(arguments.shape, layers=arguments.layers)
    n_bytes, available = synthetic.checkpoint_bytes(config, arguments.kind), available_memory()
    n_bytes *= 2 if arguments.repack else 1
    if available is not None and n_bytes > available:
        raise InputError(
            f"{arguments.shape} with {config.n_layers} layers takes {size(n_bytes)}, but only {size(available)} of "
            "memory is free. The rest would be read from the disk for every token. Use --layers for fewer layers"
        )
    parent = machine.work_folder(arguments.work_dir)
    for other in parent.glob("*-*-*"):
        remove_leftovers(other)
    folder = synthetic.checkpoint_folder(arguments.shape, config, arguments.kind, parent)
    with progress_bar("writing random weights", is_long=True) as bar:
        return synthetic.make_checkpoint(folder, config, kind=arguments.kind, progress=bar)


def _started(arguments: argparse.Namespace, n_tokens: int) -> tuple[Model, dict[str, float]]:
    """Return the model and three times in seconds: to load it, to its first token, and to compile kernels."""
    import numba.core.event  # noqa: PLC0415

    compiling: list[float] = []
    start = time.perf_counter()
    model = load_model(arguments)
    loaded = time.perf_counter()
    longest = model.config.max_seq_len
    if longest is not None and n_tokens > longest:
        raise InputError(
            f"the longest test has {n_tokens} tokens; expected at most {longest}, the max_seq_len of the model"
        )
    with numba.core.event.install_timer("numba:compile", compiling.append):
        model.forward([0], last_only=True)
        first_token = time.perf_counter()
        model.forward([0, 0], last_only=True)  # several tokens need other kernels than one token
    return model, {"load_s": loaded - start, "first_token_s": first_token - loaded, "compile_s": sum(compiling)}


def _record(result: SpeedResult, about: dict[str, Any], description: dict[str, Any]) -> dict[str, Any]:
    """Return a result as a record: fields that llama-bench has under its names, other fields under names of ours."""
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
        **{name: description[name] for name in ("numba", "numpy", "blas", "threading_layer", "power_source", "system")},
    }


def _print(records: Sequence[dict[str, Any]], description: dict[str, Any], output: str) -> None:
    """Print results as Markdown for people, or as JSON or CSV for programs."""
    from mistral_ref.measure.machine import machine_lines  # noqa: PLC0415

    if output == "json":
        say(json.dumps(records, indent=1))
    elif output == "csv":
        text = io.StringIO()
        names = dict.fromkeys(name for record in records for name in record)
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        say(text.getvalue(), end="")
    else:
        first = records[0]
        say(fitted(markdown_table(_HEADINGS, [_cells(record) for record in records], terminal_width())))
        times = ", ".join(f"{name} {first[f'{name}_s']:.2f} s" for name in ("load", "first_token", "compile"))
        memory = ", ".join(f"{size(first[key])} {words}" for key, words in _MEMORY.items() if first[key] is not None)
        throttled = {None: "unknown", 0: "no"}.get(first["throttled"], f"{first['throttled']} times")
        say(fitted(f"\n{times.replace('_', ' ')}\nmemory: {memory or 'unknown'}\nthrottled: {throttled}"))
        say(fitted("\n".join(machine_lines(description))))


def _cells(record: dict[str, Any]) -> list[str]:
    unit = "gbs" if "gbs" in record else "gflops"
    return [
        escaped(record["model_type"]),
        f"{record['model_size'] / 2**30:.2f} GiB",
        f"{record['model_n_params'] / 1e9:.2f} B",
        record["backends"],
        str(record["n_threads"]),
        record["test"],
        f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}",
        f"{record[unit]:.1f} {'GB/s' if unit == 'gbs' else 'GFLOP/s'}",
        f"{record['percent_of_limit']:.0f}% of {record[f'{unit}_limit']:.1f}",
    ]


_HEADINGS = ["model", "size", "params", "backend", "threads", "test", "t/s", "reached", "limit"]
_MEMORY = {"peak_resident": "resident at most", "anonymous": "not mapped from a file"}
_CACHE_TYPES = {"float32": "f32", "float16": "f16", "float64": "f64", "int8": "i8"}
