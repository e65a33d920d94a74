"""How long a fresh Python process takes from its start to the first token, and what that time goes into.

Starts a process once with an empty folder for compiled kernels ("cold": everything is compiled), then --runs times with
the kernels that it has left there ("warm"). If a warm process compiles anything, the exit status is 1.

  imports         importing mistral_ref and Numba
  load            mapping the weights, reading the tokenizer
  first token     the prompt's pass, with what kernels it needs loaded (or compiled)
  again           the same pass once more, with everything in place: the difference is loading kernels and weights
  in all          as the parent sees it, the start of Python included

The demonstration model's tokenizer is small. `--tokenizer` tells what another one adds, again in fresh processes: the
processor time that reading its file takes, and that of its first text, with what it imports for that. One thread does
all of this; its processor time does not count what other programs compute meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import common
from common import finish, parser_for, status

import mistral_ref
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int
from mistral_ref.host import chosen_threads
from mistral_ref.measure.benchmark import spread
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.text import load_tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """\
examples:
  python benchmarks/start.py                        the demonstration model
  python benchmarks/start.py --model DIR --runs 5
  python benchmarks/start.py --tokenizer tekken.json
  python benchmarks/start.py --quick --figure start.svg
"""

# Runs in the fresh process, which Ctrl-C ends without a word. Numba tells its listeners whenever it compiles rather
# than loads.
_CHILD = """\
import json, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
started = time.perf_counter()
import numba.core.event
import mistral_ref, mistral_ref.compiled_ops
imported = time.perf_counter()
model = mistral_ref.load(sys.argv[1] or None, threads=int(sys.argv[2]))
loaded = time.perf_counter()
prompt = "Once upon a time" if model.tokenizer else [0, 1, 2, 3]
with numba.core.event.install_recorder("numba:compile") as compiled:
    next(model.generate(prompt, max_tokens=1))
    first = time.perf_counter()
    print(json.dumps({"token": True}), flush=True)
    again = time.perf_counter()
    next(model.generate(prompt, max_tokens=1))
    ended = time.perf_counter()
names = sorted({event.data["dispatcher"].__name__ for _, event in compiled.buffer})
times = {"imports": imported - started, "load": loaded - imported, "first token": first - loaded}
print(json.dumps({"times": times | {"again": ended - again}, "compiled": names}), flush=True)
"""

# What a tokenizer's file adds, behind imports that every model needs.
_TOKENIZER_CHILD = """\
import json, sys, time
import mistral_ref.loading
started = time.process_time()
tokenizer = mistral_ref.text.load_tokenizer(sys.argv[1])
loaded = time.process_time()
tokenizer.encode("Once upon a time")
print(json.dumps({"read": loaded - started, "first text": time.process_time() - loaded}))
"""

PARTS = ("imports", "load", "first token", "again", "in all")


def first_token(model: str, n_threads: int, kernel_dir: str) -> tuple[dict[str, float], list[str]]:
    """Start a process; return the seconds of each part, and the names of the functions that it compiled."""
    environment = os.environ | {"NUMBA_CACHE_DIR": kernel_dir}
    began = time.perf_counter()
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, model, str(n_threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            raise InputError(f"the process has ended with status {process.wait()}; what it said stands above")
        in_all = time.perf_counter() - began
        rest = json.loads(process.stdout.readline())
    return rest["times"] | {"in all": in_all}, rest["compiled"]


def tokenizer_rows(path: str, n_runs: int) -> list[list[str]]:
    """Return rows with the processor seconds that a tokenizer's file adds, each run in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", _TOKENIZER_CHILD, path]
    runs = []
    for _ in range(n_runs):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"the process has ended with status {done.returncode}; what it said stands above")
        runs.append(json.loads(done.stdout))
    return [[part, *spread([run[part] for run in runs]).text(3)] for part in runs[0]]


def rows(cold: dict[str, float], warm: Sequence[dict[str, float]]) -> list[list[str]]:
    """Return the table's rows, a part each: seconds cold, and median and range warm."""
    return [[part, f"{cold[part]:.2f}", *spread([run[part] for run in warm]).text(3)] for part in PARTS]


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    parser.add_argument("--model", metavar="DIR", default="", help="default: the demonstration model")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each performance core")
    parser.add_argument("--tokenizer", metavar="FILE", help="also tell what this tokenizer adds, such as tekken.json")
    parser.add_argument("--runs", type=int, default=9, metavar="N", help="warm starts (default: %(default)s)")
    common.add_output_options(parser, "three warm starts", "the parts as bars, cold and warm")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Start the processes; print the table, and write the file."""
    n_threads, n_runs = chosen_threads(arguments.threads), checked_int("runs", arguments.runs, least=1)
    mistral_ref.load(arguments.model or None, backend="numpy")  # what is wrong with it is better said once, and here
    n_runs = min(3, n_runs) if arguments.quick else n_runs
    added = []
    if arguments.tokenizer:
        kind = load_tokenizer(arguments.tokenizer).kind
        added = tokenizer_rows(arguments.tokenizer, n_runs)
    description = machine(n_threads)
    warm, compiled_warm = [], []
    with tempfile.TemporaryDirectory() as kernel_dir:
        status("cold: compiling kernels, up to a minute")
        cold, compiled_cold = first_token(arguments.model, n_threads, kernel_dir)
        for number in range(n_runs):
            status(f"warm: {number + 1} of {n_runs}")
            times, compiled = first_token(arguments.model, n_threads, kernel_dir)
            warm.append(times)
            compiled_warm += compiled
    status()
    print("\n".join(machine_lines(description)))
    print(f"\n{markdown_table(['seconds', 'cold', 'warm, median', 'min to max'], rows(cold, warm))}")
    if added:
        print(f"\n{markdown_table([f'processor seconds that {kind} adds', 'median', 'min to max'], added)}")
    print(f"\ncompiled cold: {', '.join(compiled_cold)}")
    print(f"compiled warm: {', '.join(sorted(set(compiled_warm))) or 'nothing'}")
    content = {"cold": cold, "warm": warm, "compiled_cold": compiled_cold, "compiled_warm": compiled_warm}
    content |= {"tokenizer": added} if added else {}
    common.write_files(arguments, {"machine": description} | content, lambda: draw(cold, warm))
    if compiled_warm:
        sys.exit(1)


def draw(cold: dict[str, float], warm: Sequence[dict[str, float]]) -> Axes:
    """Draw what the time to the first token is made of: a bar for each start, each on its own scale."""
    from mistral_ref.study.drawing import BLUE, GREY, INK, PALE_BLUE, VERMILLION, Figure, Patch, title  # noqa: PLC0415

    typical = {part: median([run[part] for run in warm]) for part in PARTS}
    colours = {"Python itself": GREY, "imports": PALE_BLUE, "load": VERMILLION, "first token": BLUE}
    upper, lower = Figure((7.2, 2.6), layout="constrained").subplots(2)
    for ax, name, times in ((upper, "cold", cold), (lower, "warm", typical)):
        inside = {part: times[part] for part in ("imports", "load", "first token")}
        left = 0.0
        for part, seconds in ({"Python itself": times["in all"] - sum(inside.values())} | inside).items():
            ax.barh(name, seconds, left=left, color=colours[part], edgecolor=INK, lw=0.4)
            left += seconds
        ax.text(left, 0, f" {left:.2f} s", va="center")
        ax.set_xlim(0, 1.12 * left)
        ax.spines[["top", "right"]].set_visible(False)
    lower.set(xlabel="seconds")
    title(
        upper, "From the start of a process to its first token", [Patch(color=c, label=p) for p, c in colours.items()]
    )
    return upper


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
