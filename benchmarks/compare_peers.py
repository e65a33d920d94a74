"""The same weights through mistral_ref, llama.cpp and transformers, in turn, with the same threads.

Makes a checkpoint of random weights (or takes --model), writes it as GGUF and as a Hugging Face directory, bit for bit,
and starts each runtime in a process of its own. First all of them give logits of the same tokens, and how far these lie
apart is reported: proof that they compute the same. Then every test runs once to warm up and --repeats times in turn:

  pp512           512 tokens of a prompt at once; logits of the last
  tg32            32 tokens one by one after nothing
  tg32 @ d4096    the same after 4096 others; without a window, so that all do equal work

mistral_ref with a sliding window, and with inputs rounded to bf16 as llama.cpp rounds them where
weights are bf16 and the processor can multiply so, have rows of their own. With --quantize the same weights are
rounded to 8 or 4 bits by each runtime's own rules, ours with inputs of int16 and of int8, llama.cpp's as Q8_0, or
Q4_0 and Q4_K_M; logits are then held against those of the float weights. With --gguf llama.cpp rounds them to the
types named, and both runtimes read the same file. Tokens are random; there is no tokenizer
and no sampling. Each runtime keeps its own defaults: llama.cpp flash attention "auto" and a float16 cache, n_batch and
n_ubatch 512; transformers sdpa attention and the checkpoint's dtype; mistral_ref a float32 cache. Peers that are not
installed are left out: pip install llama-cpp-python gguf transformers torch. Files take three times the size of the
weights on disk, and stay in --work-dir for the next time.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from statistics import mean, median, stdev
from typing import Any

import numpy as np
from common import buffer_bytes, finish, parser_for, rows_with_ranges, status, write_files
from peers.process import Runner, Test, Worker, start
from peers.runners import (
    NEEDS,
    OURS,
    add_weights_options,
    checkpoint_of,
    float_runners,
    gguf_runners,
    quantized_runners,
)

from mistral_ref.config import ModelConfig
from mistral_ref.display import markdown_table
from mistral_ref.errors import checked_int
from mistral_ref.files.config_files import read_config
from mistral_ref.host import chosen_threads, process_memory
from mistral_ref.measure.benchmark import Limit, ratios, read_limit, spread
from mistral_ref.measure.machine import machine, machine_lines

EXAMPLES = """\
examples:
  python benchmarks/compare_peers.py                             8 layers of Mistral 7B in bf16: 12 GiB on disk
  python benchmarks/compare_peers.py --peers llama.cpp --dtype f16
  python benchmarks/compare_peers.py --quantize 4                4 bits, beside llama.cpp's Q4_0 and Q4_K_M
  python benchmarks/compare_peers.py --gguf Q4_K_M Q8_0          the same GGUF files in both
  python benchmarks/compare_peers.py --gguf Q4_K_M --tile-order  and ours in tile order as well
  python benchmarks/compare_peers.py --shape stories-110m --depth 0
  python benchmarks/compare_peers.py --shape tiny --prompt 64 --generate 4 --depth 64    seconds, to see it work
"""

N_CHECKED = 16  # tokens whose logits are compared


def chosen_tests(arguments: argparse.Namespace) -> list[Test]:
    """Return the tests that the options ask for."""
    n_prompt = checked_int("prompt", arguments.prompt, least=1)
    n_generate = checked_int("generate", arguments.generate, least=1)
    depth = checked_int("depth", arguments.depth, least=0)
    tests = [Test(f"pp{n_prompt}", n_prompt, 0, 512), Test(f"tg{n_generate}", n_generate, 0, 1)]
    return [*tests, Test(f"tg{n_generate} @ d{depth}", n_generate, depth, 1)] if depth else tests


def ask_logits(worker: Worker) -> np.ndarray:
    """Return a runtime's logits after the first tokens."""
    return np.array(worker.ask(do="logits", n=N_CHECKED)["logits"])


def compare_logits(workers: Sequence[Worker], expected: np.ndarray) -> None:
    """Note how far each runtime's logits lie from those expected: the largest difference over the largest logit."""
    for worker in workers:
        worker.distance = float(np.abs(ask_logits(worker) - expected).max() / np.abs(expected).max())


def measure_all(workers: Sequence[Worker], tests: Sequence[Test], repeats: int, rest: float, limit: Limit) -> None:
    """Run every test on all workers in turn, once to warm up and then `repeats` times.

    `rest` is how many seconds to wait before and after each: some runtimes leave their threads spinning for a while.
    """
    for test in tests:
        for repeat in range(repeats + 1):
            for worker in workers:
                status(f"{test.name}, {repeat or 'warm-up'} of {repeats}: {worker.name}")
                reads = limit.measure()
                time.sleep(rest)
                seconds = worker.ask(do="run", n=test.n, depth=test.depth, step=test.step)["seconds"]
                if repeat:
                    worker.rates.setdefault(test.name, []).append(test.n / seconds)
                    worker.limits.setdefault(test.name, []).append(reads)
                time.sleep(rest)
    for worker in workers:
        worker.memory = process_memory(worker.process.pid)


def rate_rows(workers: Sequence[Worker], tests: Sequence[Test]) -> list[list[str]]:
    """Return the table's rows: tokens a second, bytes of weights a second where tokens come one by one, and ratios."""
    rows = []
    for test in tests:
        for worker in workers:
            rates = worker.rates[test.name]
            shares = ratios(rates, worker.limits[test.name])
            share = f"{100 * worker.runner.n_weights_read / 1e9 * median(shares):.0f}" if test.step == 1 else ""
            times = [spread(ratios(ours.rates[test.name], rates)).text(2) for ours in compared(workers)]
            cells = [f"{middle} ({extremes})" for middle, extremes in times]
            rows.append(
                [worker.name, test.name, f"{worker.runner.bits_a_weight:.2f}", *spread(rates).text(2), share, *cells]
            )
    return rows


def compared(workers: Sequence[Worker]) -> list[Worker]:
    """Return the rows of ours that every row is held against: the first, and others with inputs of their own."""
    return [worker for worker in workers if worker is workers[0] or "inputs" in str(worker.runner.options)]


def process_rows(workers: Sequence[Worker]) -> list[list[str]]:
    """Return the table's rows about the processes themselves."""

    def gib(n_bytes: int | None) -> str:
        return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.2f}"

    return [
        [
            worker.name,
            f"{worker.first_token:.2f}",
            gib(worker.memory["peak_resident"]),
            gib(worker.memory["anonymous"]),
            f"{worker.distance:.1e}",
        ]
        for worker in workers
    ]


def as_json(
    workers: Sequence[Worker], tests: Sequence[Test], n_threads: int, model: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return every result under the names that llama-bench uses, and what it has none for."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    results = []
    for worker, test in ((worker, test) for test in tests for worker in workers):
        rates = worker.rates[test.name]
        generates = test.step == 1
        results.append(
            {
                "backend": worker.name,
                "test": test.name,
                **model,
                "n_threads": n_threads,
                "n_prompt": 0 if generates else test.n,
                "n_gen": test.n if generates else 0,
                "n_depth": test.depth,
                "test_time": now,
                "avg_ts": mean(rates),
                "stddev_ts": stdev(rates) if len(rates) > 1 else 0.0,
                "median_ts": median(rates),
                "samples_ts": rates,
                "samples_ns": [round(1e9 * test.n / rate) for rate in rates],
                "plain_read_gbs": worker.limits[test.name],
                "bits_a_weight": worker.runner.bits_a_weight,
                "weights_read": worker.runner.n_weights_read,
                "times_as_fast": {ours.name: ratios(ours.rates[test.name], rates) for ours in compared(workers)},
            }
        )
    return results


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    rounded = add_weights_options(parser)
    parser.add_argument("--peers", nargs="*", choices=NEEDS, default=list(NEEDS), help="(default: all)")
    parser.add_argument("--generate", type=int, default=32, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--depth", type=int, default=4096, metavar="N", help="0: none (default: %(default)s)")
    parser.add_argument("--window", type=int, default=4096, metavar="W", help="of ours; 0: none (default: %(default)s)")
    parser.add_argument("--rest", type=float, default=0.3, metavar="S", help="seconds between runs (%(default)s)")
    rounded.add_argument("--gguf", nargs="+", metavar="TYPE", help="Q4_K_M, Q8_0, ...: both read llama.cpp's file")
    parser.add_argument("--tile-order", action="store_true", help="with --gguf: ours in tile order, too")
    parser.add_argument("--head", type=int, choices=[8, 4], default=8, help="bits of our output matrix (%(default)s)")
    parser.add_argument(
        "--cache-dtype", choices=["float32", "float16"], default="", help="of ours and llama.cpp's (default: their own)"
    )
    parser.add_argument(
        "--flash-attention", choices=["auto", "on", "off"], default="auto", help="llama.cpp's (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the machine, versions and every sample there")
    parser.add_argument("--figure", metavar="FILE", help="draw the rates: .svg, .png or .pdf (needs the extra plots)")
    return parser.parse_args()


def options_of(arguments: argparse.Namespace, config: ModelConfig) -> list[str]:
    """Return the options that all runtimes are started with."""
    context = max(arguments.prompt, arguments.depth + arguments.generate, N_CHECKED)
    common = [f"--vocabulary={config.vocab_size}", f"--context={context}", f"--threads={arguments.threads}"]
    return [*common, f"--cache-dtype={arguments.cache_dtype}", f"--flash-attention={arguments.flash_attention}"]


def measure(arguments: argparse.Namespace) -> None:
    """Compare; print tables, and write the file."""
    arguments.threads = chosen_threads(arguments.threads)
    checked_int("repeats", arguments.repeats, least=1)
    tests = chosen_tests(arguments)
    directory, work = checkpoint_of(arguments)
    config = read_config(directory)
    description = machine(arguments.threads)
    model = {"model_type": directory.name, "model_n_params": config.n_parameters}
    chosen = gguf_runners if arguments.gguf else quantized_runners if arguments.quantize else float_runners
    runners = chosen(arguments, directory, work)
    common = options_of(arguments, config)
    workers: list[Worker] = []
    try:
        reference = start(Runner(OURS, OURS, directory, (), 0, 0), common)
        expected = ask_logits(reference)
        reference.stop()
        for runner in runners:
            workers.append(start(runner, common))
        compare_logits(workers, expected)
        limit = read_limit(arguments.threads, buffer_bytes())
        measure_all(workers, tests, arguments.repeats, arguments.rest, limit)
    finally:
        for worker in workers:
            worker.stop()
    runtimes = {worker.name: worker.about | {"first_token_s": worker.first_token} for worker in workers}
    status()
    print("\n".join(machine_lines(description | {"model": directory.name, "repeats": arguments.repeats})))
    for worker in workers:
        print(f"{worker.name}: {', '.join(f'{name} {value}' for name, value in worker.about.items())}")
    headings = ["runtime", "test", "bits a weight", "t/s", "min to max", "% of plain read"]
    headings += [f"{worker.name} is x times as fast" for worker in compared(workers)]
    print(f"\n{markdown_table(headings, rate_rows(workers, tests))}")
    headings = ["runtime", "first token s", "peak resident GiB", "anonymous GiB", "logits differ by"]
    print(f"\n{markdown_table(headings, process_rows(workers))}")
    results = as_json(workers, tests, arguments.threads, model)
    processes = {worker.name: worker.memory | {"logits_differ": worker.distance} for worker in workers}
    content = {"machine": description, "runtimes": runtimes, "processes": processes, "results": results}
    panels = {test.name: {worker.name: worker.rates[test.name] for worker in workers} for test in tests}
    write_files(arguments, content, lambda: rows_with_ranges(panels, "The same weights in turn", "tokens a second"))


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
