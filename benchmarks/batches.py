"""How many tokens a second several sequences get together, beside one sequence, a prompt, and llama.cpp's batches.

Makes a checkpoint of random weights (or takes --model), as compare_peers.py does, and runs in turn:

    one         tokens of one sequence, one by one
    together    tokens of N sequences, one of each in a pass
    prompt      512 tokens of a prompt at once

One sequence is limited by memory, which is read once for each pass. A prompt is limited by arithmetic. So N sequences
can be no faster than N times one, nor than the prompt: "share" is their rate over the lesser of the two. llama.cpp
decodes the same sequences by llama_batch where llama-cpp-python is installed, with the settings that compare_peers.py
says.
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

from common import finish, parser_for, status
from peers.process import Worker, start
from peers.runners import add_weights_options, checkpoint_of, float_runners, quantized_runners

from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int
from mistral_ref.files.config_files import read_config
from mistral_ref.host import chosen_threads
from mistral_ref.measure.benchmark import spread, write_json
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.shapes import SHAPES

EXAMPLES = """\
examples:
  python benchmarks/batches.py                                  8 layers of Mistral 7B in bf16
  python benchmarks/batches.py --quantize 4
  python benchmarks/batches.py --shape stories-110m --quick     a minute or two
  python benchmarks/batches.py --shape tiny --prompt 64 --quick      seconds, to see it work
"""

_TESTS = ("one", "together", "prompt")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    add_weights_options(parser)
    parser.add_argument("--sequences", type=int, default=8, metavar="N", help="together (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, metavar="N", help="of each sequence (default: %(default)s)")
    parser.add_argument("--peers", nargs="*", choices=["llama.cpp"], default=["llama.cpp"], help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="2 layers and 2 repeats: less than two minutes")
    parser.add_argument("--json", metavar="FILE", help="write the machine and every sample there")
    # What compare_peers.py asks for beside these.
    parser.set_defaults(window=0, head=8)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.layers, arguments.repeats = min(arguments.layers, 2), min(arguments.repeats, 2)
    return arguments


def seconds_of(worker: Worker, test: str, arguments: argparse.Namespace) -> float:
    """Return the seconds that a test takes."""
    if test == "together":
        return worker.ask(do="together", n=arguments.tokens)["seconds"]
    n, step = (arguments.prompt, 512) if test == "prompt" else (arguments.tokens, 1)
    return worker.ask(do="run", n=n, depth=0, step=step)["seconds"]


def measure(arguments: argparse.Namespace) -> None:
    """Run all tests in turn; print the table, and write the file."""
    for name in ("sequences", "tokens", "prompt", "repeats"):
        checked_int(name, getattr(arguments, name), least=1)
    if arguments.model is None and arguments.shape not in SHAPES:
        raise InputError(f"shape is {arguments.shape!r}; expected one of {', '.join(SHAPES)}")
    arguments.threads = chosen_threads(arguments.threads)
    directory, work = checkpoint_of(arguments)
    runners = (quantized_runners if arguments.quantize else float_runners)(arguments, directory, work)
    context = max(arguments.prompt, arguments.tokens + 7 * arguments.sequences)
    options = [f"--vocabulary={read_config(directory).vocab_size}", f"--context={context}"]
    options += [f"--threads={arguments.threads}", f"--sequences={arguments.sequences}"]
    n_one, n_all = arguments.tokens, arguments.tokens * arguments.sequences
    n_tokens = {"one": n_one, "together": n_all, "prompt": arguments.prompt}
    workers: list[Worker] = []
    try:
        workers += [start(runner, options) for runner in runners]
        for repeat in range(arguments.repeats + 1):
            for test in _TESTS:
                for worker in workers:
                    status(f"{test}, {repeat or 'warm-up'} of {arguments.repeats}: {worker.name}")
                    rate = n_tokens[test] / seconds_of(worker, test, arguments)
                    if repeat:
                        worker.rates.setdefault(test, []).append(rate)
                    time.sleep(0.3)  # some runtimes leave their threads spinning for a while
    finally:
        for worker in workers:
            worker.stop()
    status()
    description = machine(arguments.threads)
    print("\n".join(machine_lines(description | {"model": directory.name, "repeats": arguments.repeats})))
    headings = ["runtime", "one t/s", "min to max", f"{arguments.sequences} together t/s", "min to max"]
    headings += [f"prompt of {arguments.prompt} t/s", "min to max", "share"]
    print(f"\n{markdown_table(headings, [row_of(worker, arguments.sequences) for worker in workers])}")
    if arguments.json:
        write_json(arguments.json, {"machine": description, "rates": {one.name: one.rates for one in workers}})


def row_of(worker: Worker, n_sequences: int) -> list[str]:
    """Return a runtime's row: the rate of each test with its range, and the share."""
    one, together, prompt = (median(worker.rates[test]) for test in _TESTS)
    cells = [cell for test in _TESTS for cell in spread(worker.rates[test]).text(1)]
    return [worker.name, *cells, f"{together / min(n_sequences * one, prompt):.2f}"]


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
