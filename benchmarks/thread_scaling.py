"""What more threads bring: a token and a prompt with 1, 2, ... threads, beside what they bring to the machine's limits.

Decoding cannot gain more than plain reads of memory do, and a prompt no more than multiply-adds on registers. So the
speed-up of each stands beside that of its limit, measured with as many threads just before. All numbers of threads take
turns, and speed-ups are taken run by run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import common
from common import finish, parser_for, status

from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int
from mistral_ref.host import chosen_threads
from mistral_ref.measure.benchmark import Measurement, alternate, multiply_add_limit, ratios, read_limits, spread
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.shapes import shape
from mistral_ref.model import Model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """\
examples:
  python benchmarks/thread_scaling.py                         two layers of Mistral 7B, up to one thread a core
  python benchmarks/thread_scaling.py --quick --figure threads.svg
  python benchmarks/thread_scaling.py --threads 1 4 8 16 --shape stories-110m --layers 12
"""

HEADINGS = ["what", "threads", "ms", "% of limit", "min to max", "times as fast as 1", "min to max"]
HEADINGS += ["its limit", "min to max"]
MANY = 8  # cores above which not every number of threads is tried


def thread_counts(n_cores: int) -> list[int]:
    """Return the numbers of threads to try: all up to 8, above that doubled, and one for each core.

    >>> thread_counts(3), thread_counts(20)
    ([1, 2, 3], [1, 2, 4, 8, 16, 20])
    """
    if n_cores <= MANY:
        return list(range(1, n_cores + 1))
    return sorted({2**i for i in range(n_cores.bit_length())} | {n_cores})


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    common.add_slice_options(parser)
    parser.add_argument(
        "--threads", type=int, nargs="+", metavar="N", help="numbers of them, 1 always among these (default: up to one "
        "for each performance core)"
    )  # fmt: skip
    parser.add_argument("--prompt", type=int, metavar="N", help="tokens of a prompt (default: 512)")
    common.add_timing_options(parser)
    common.add_output_options(parser, "three samples, prompts of 128", "speed-ups by the number of threads")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Measure all numbers of threads in turn; print the table, and write the files."""
    counts = sorted({1, *map(chosen_threads, arguments.threads or thread_counts(chosen_threads(None)))})
    if len(counts) < 2:
        raise InputError("threads is 1 alone; expected others beside it, and here is one core: --threads 1 2")
    n_prompt = arguments.prompt if arguments.prompt is not None else 128 if arguments.quick else 512
    n_prompt = checked_int("prompt", n_prompt, least=1, most=2**15)
    config = shape(arguments.shape, layers=arguments.layers)
    about = {"shape": arguments.shape, "layers": config.n_layers, "dtype": arguments.kind, "prompt": n_prompt}
    description = machine(counts[-1]) | about
    print("\n".join(machine_lines(description)))
    status("making weights")
    weights = common.random_model(config, arguments.kind, CompiledOps(threads=1)).weights
    decode, prompt = [], []
    for n_threads, read in zip(counts, read_limits(counts, common.buffer_bytes()), strict=True):
        model = Model(config, weights, CompiledOps(threads=n_threads))
        decode.append(common.decoding(f"one token, {n_threads} threads", model, read))
        peak = multiply_add_limit(n_threads)
        prompt.append(common.prompting(f"prompt of {n_prompt}, {n_threads} threads", model, peak, n_prompt))
    repeats = min(3, arguments.repeats) if arguments.quick else arguments.repeats
    measured = alternate([*decode, *prompt], repeats=repeats, seconds=arguments.seconds, progress=status)
    groups = {"one token": measured[: len(counts)], f"prompt of {n_prompt}": measured[len(counts) :]}
    rows = [
        [name, str(n_threads), f"{1e3 * spread(m.seconds).median:.1f}", *common.percent_cells(m)]
        + [cell for ups in (speed_ups(m, group[0]), limit_ups(m, group[0])) for cell in spread(ups).text(2)]
        for name, group in groups.items()
        for n_threads, m in zip(counts, group, strict=True)
    ]
    status()
    print(f"\n{markdown_table(HEADINGS, rows)}")
    results = {
        name: [
            {"threads": n, "speed_ups": speed_ups(m, group[0]), "limit_speed_ups": limit_ups(m, group[0])} | m.as_json()
            for n, m in zip(counts, group, strict=True)
        ]
        for name, group in groups.items()
    }
    common.write_files(arguments, {"machine": description, "tests": results}, lambda: draw(counts, groups))


def speed_ups(many: Measurement, one: Measurement) -> list[float]:
    """Return how many times as fast a measurement is as another, run by run."""
    return ratios(one.seconds, many.seconds)


def limit_ups(many: Measurement, one: Measurement) -> list[float]:
    """Return how many times as high its limit is."""
    return ratios(many.limits, one.limits)


def draw(counts: Sequence[int], groups: dict[str, Sequence[Measurement]]) -> Axes:
    """Draw speed-ups over the number of threads, and those of the limits beside them."""
    from mistral_ref.study.drawing import BLUE, GREY, VERMILLION, axes_or_new, title  # noqa: PLC0415

    ax, handles = axes_or_new(None, 6.4, 4.6), []
    limits = ("plain reads", "multiply-adds")
    for (name, group), limit, color, marker in zip(groups.items(), limits, (BLUE, VERMILLION), "os", strict=True):
        ups = [speed_ups(m, group[0]) for m in group]
        handles.append(common.whiskers(ax, counts, ups, color=color, marker=marker, label=name))
        ups = [limit_ups(m, group[0]) for m in group]
        style = {"color": color, "marker": marker, "mfc": "white", "ls": ":", "lw": 0.9}
        handles.append(common.whiskers(ax, counts, ups, label=limit, **style))
    handles += ax.plot(counts, counts, color=GREY, lw=0.8, label="one for each thread")
    ax.set(xlabel="threads", ylabel="times as fast as one thread")
    ax.set_xticks(counts)
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    title(ax, "What more threads bring, and what they bring to the limits", handles, n_rows=2)
    return ax


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
