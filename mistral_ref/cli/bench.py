"""mistral-ref bench: measure how fast a model is on this machine, and what limits it."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mistral_ref.cli.common import (
    add_cache_option,
    add_compute_options,
    load_model,
    model_directory,
    progress_bar,
)
from mistral_ref.cli.output import say
from mistral_ref.errors import InputError, checked_int, short_repr, size
from mistral_ref.files.paths import local_path
from mistral_ref.files.whole_file import remove_leftovers
from mistral_ref.host import available_memory, chosen_threads, process_memory
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.measure.shapes import SHAPES, shape
from mistral_ref.model import Model
from mistral_ref.weights import Kind

if TYPE_CHECKING:
    from mistral_ref.measure.records import Record
    from mistral_ref.measure.speed import SpeedTest

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
the limit that is. "others" is how many percent of the processors' time other
programs took during the runs; only Linux tells.

-p, -n, -d and -t take one number or a list such as 128,512.
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
  mistral-ref bench --model DIR -t 1,2,4 -o before.json
  mistral-ref bench --compare before.json after.json
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
    add_compute_options(parser, several_threads=True)
    _add_test_options(parser)
    parser.add_argument(
        "-o",
        "--output",
        default="md",
        metavar="OUTPUT",
        help="md: print a Markdown table; json or csv: print every sample in this form; FILE.json or FILE.csv: print "
        "the table, and write every sample to this file (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measure nothing; show the figures of two files side by side. The files of llama-bench -o json can be "
        "read, too",
    )
    parser.set_defaults(run=run)


def _add_weights_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say whose weights are measured."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "-m",
        "--model",
        metavar="PATH",
        type=model_directory,
        default=DEMO_MODEL,
        help="directory with the weights, or a GGUF file, or a name in the hub's cache, ORG/NAME "
        "(default: the demonstration model)",
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
    add_cache_option(tests)
    tests.add_argument(
        "--quick", action="store_true", help="measure pp64 and tg16 with 3 runs of each, about 10 seconds for each test"
    )


def run(arguments: argparse.Namespace) -> None:
    """Measure and print the results, or compare two files of results."""
    # Imported here and in the functions below: the import starts Numba, and --help does not need Numba.
    from mistral_ref.cli import bench_tables  # noqa: PLC0415
    from mistral_ref.measure import records  # noqa: PLC0415

    if arguments.compare is not None:
        say(bench_tables.comparison(*map(records.read_records, arguments.compare)))
        return
    _check_output(arguments.output)
    if arguments.quick:
        vars(arguments).update(_QUICK)
    tests = _tests(arguments)
    counts = [None] if arguments.threads is None else _whole_numbers("threads", arguments.threads)
    if arguments.shape is not None:
        arguments.model = _synthetic(arguments)
    found: list[records.Record] = []
    for arguments.threads in counts:
        measured, description = _measured(arguments, tests)
        found += measured
    if arguments.output == "json":
        say(json.dumps(found, indent=1))
    elif arguments.output == "csv":
        say(records.as_csv(found), end="")
    else:
        if arguments.output != "md":
            records.write_records(arguments.output, found)
        threads = ", ".join(dict.fromkeys(str(record["n_threads"]) for record in found))
        say(bench_tables.figures(found, description | {"threads": threads}))


def _check_output(output: str) -> None:
    """Raise InputError if -o is no form of the results, and no file that can be written."""
    file = local_path(output)
    if output in ("md", "json", "csv"):
        return
    if file.suffix not in (".json", ".csv"):
        raise InputError(f"-o is {output}; expected md, json, csv, or a name that ends in .json or .csv")
    if not os.path.isdir(file.parent):
        raise InputError(f"{file}: cannot be written: {file.parent} is no directory")


def _tests(arguments: argparse.Namespace) -> list[SpeedTest]:
    from mistral_ref.measure import speed  # noqa: PLC0415

    checked_int("--repetitions", arguments.repetitions, least=1)
    numbers = {name: getattr(arguments, name) for name in ("n_prompt", "n_gen", "n_depth")}
    tests = speed.speed_tests(*(_whole_numbers(name, text) for name, text in numbers.items()))
    if not tests:
        raise InputError("nothing to measure; expected --n-prompt or --n-gen above 0")
    return tests


def _measured(arguments: argparse.Namespace, tests: Sequence[SpeedTest]) -> tuple[list[Record], dict[str, Any]]:
    """Load the model and run the tests with one number of threads; return records, and the machine described."""
    from mistral_ref.measure import benchmark, machine, records, speed  # noqa: PLC0415

    throttled = machine.throttle_count()
    model, started = _started(arguments, tests)
    n_threads = chosen_threads(model.ops.threads)
    about = records.about_model(model, arguments.model, cache_dtype=arguments.cache_dtype)
    total, counter = sum(bool(test.depth) + 1 + arguments.repetitions for test in tests), itertools.count()
    with progress_bar("measuring", is_long=True) as bar:
        results = speed.measure_speed(
            model,
            tests,
            repeats=arguments.repetitions,
            read=benchmark.read_limit(n_threads, machine.uncached_bytes(about["model_size"])),
            peak=benchmark.multiply_add_limit(n_threads),
            cache_dtype=arguments.cache_dtype,
            seconds=_QUICK_SECONDS if arguments.quick else None,
            warm_up=not arguments.no_warmup,
            progress=(lambda text: bar(next(counter), total, text)) if bar else None,
        )
    description = machine.machine(n_threads)
    about |= {
        "n_threads": n_threads,
        **started,
        **process_memory(os.getpid()),
        "throttled": None if throttled is None else (machine.throttle_count() or 0) - throttled,
    }
    return [records.record(result, about, description) for result in results], description


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


def _started(arguments: argparse.Namespace, tests: Sequence[SpeedTest]) -> tuple[Model, dict[str, float]]:
    """Return the model and three times in seconds: to load it, to its first token, and to compile kernels."""
    import numba.core.event  # noqa: PLC0415

    from mistral_ref.measure import speed  # noqa: PLC0415

    compiling: list[float] = []
    start = time.perf_counter()
    model = load_model(arguments)
    loaded = time.perf_counter()
    n_tokens, longest = max(test.depth + test.n for test in tests), model.config.max_seq_len
    if longest is not None and n_tokens > longest:
        raise InputError(
            f"the longest test has {n_tokens} tokens; expected at most {longest}, the max_seq_len of the model"
        )
    with numba.core.event.install_timer("numba:compile", compiling.append):
        model.forward([0], model.new_cache(dtype=arguments.cache_dtype), last_only=True)
        first_token = time.perf_counter()
        speed.prepare(model, tests, arguments.cache_dtype)
    return model, {"load_s": loaded - start, "first_token_s": first_token - loaded, "compile_s": sum(compiling)}
