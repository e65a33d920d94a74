"""How the time of a token grows with the tokens before it: with a sliding window it stops growing, without it does not.

One token is decoded after 0, 1024, ... others by layers of a published shape, once with a window and once without, all
in turn. The cache is filled with random keys and values, written as passes write theirs, so depth costs no prefill.
Beside the times stands what cost.py counts for the token, weights and keys: "counted" is the growth of these bytes over
depth 0, "measured" that of the time, run by run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import common
from common import finish, parser_for, status

from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int
from mistral_ref.measure.benchmark import Measurement, alternate, ratios, read_limit, spread
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.shapes import shape
from mistral_ref.model import Model

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """\
examples:
  python benchmarks/context.py                                two layers of Mistral 7B, up to 16384 tokens before
  python benchmarks/context.py --quick --figure context.svg   three depths
  python benchmarks/context.py --window 1024 --depths 0 512 1024 2048 4096
"""

HEADINGS = ["window", "tokens before", "ms a token", "min to max", "MB counted", "% of read", "min to max"]
HEADINGS += ["counted, x depth 0", "measured", "min to max"]
DEPTHS = (0, 1024, 2048, 4096, 8192, 16384)
QUICK_DEPTHS = (0, 4096, 8192)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    common.add_slice_options(parser)
    parser.add_argument("--window", type=int, default=4096, metavar="W", help="(default: %(default)s)")
    parser.add_argument("--depths", type=int, nargs="+", metavar="N", help="tokens before (default: 0 to 16384)")
    common.add_threads_option(parser)
    common.add_timing_options(parser)
    common.add_output_options(parser, "three depths", "the time of a token by the tokens before it")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Measure all depths in turn, with the window and without; print the table, and write the files."""
    window = checked_int("window", arguments.window, least=1)
    asked = arguments.depths or (QUICK_DEPTHS if arguments.quick else DEPTHS)
    depths = sorted({checked_int("depths", depth, least=0, most=2**20) for depth in asked} | {0})
    if len(depths) < 2:
        raise InputError("depths is 0 alone; expected others beside it")
    # No limit to the length: what is measured may be longer than what the shape was published for.
    config = shape(arguments.shape, layers=arguments.layers, window=window).replace(max_seq_len=None)
    ops = CompiledOps(threads=arguments.threads)
    about = {"shape": arguments.shape, "layers": config.n_layers, "dtype": arguments.kind, "window": window}
    description = machine(ops.threads) | about
    print("\n".join(machine_lines(description)))
    status("making weights and keys")
    windowed = common.random_model(config, arguments.kind, ops)
    everything = Model(config.replace(sliding_window=(None,) * config.n_layers), windowed.weights, ops)
    models = {f"{window}": windowed, "none": everything}
    read = read_limit(ops.threads, common.buffer_bytes())
    candidates = [
        common.decoding(f"window {name}, depth {depth}", model, read, depth)
        for name, model in models.items()
        for depth in depths
    ]
    measured = alternate(candidates, repeats=arguments.repeats, seconds=arguments.seconds, progress=status)
    groups = dict(zip(models, (measured[: len(depths)], measured[len(depths) :]), strict=True))
    rows = [row for name, group in groups.items() for row in table_rows(name, depths, group)]
    status()
    print(f"\n{markdown_table(HEADINGS, rows)}")
    results = {
        name: [{"depth": depth} | m.as_json() for depth, m in zip(depths, group, strict=True)]
        for name, group in groups.items()
    }
    content = {"machine": description, "windows": results}
    common.write_files(arguments, content, lambda: draw(window, depths, groups))


def table_rows(name: str, depths: Sequence[int], group: Sequence[Measurement]) -> list[list[str]]:
    """Return the rows of one window, one for each depth."""
    rows = []
    for depth, m in zip(depths, group, strict=True):
        times = spread([1e3 * seconds for seconds in m.seconds]).text(2)
        growth = spread(ratios(m.seconds, group[0].seconds)).text(2)
        counted = f"{m.work / group[0].work:.2f}"
        rows.append([name, str(depth), *times, f"{1e3 * m.work:.0f}", *common.percent_cells(m), counted, *growth])
    return rows


def draw(window: int, depths: Sequence[int], groups: dict[str, Sequence[Measurement]]) -> Axes:
    """Draw milliseconds a token over the depth, and below them what reading the bytes would take by itself."""
    from mistral_ref.study.drawing import BLUE, GREY, SMALL, VERMILLION, Line2D, axes_or_new, title  # noqa: PLC0415

    ax, handles = axes_or_new(None, 7.2, 4.2), []
    highest = 0.0
    limit = median([limit for group in groups.values() for m in group for limit in m.limits])
    for (name, group), color, marker in zip(groups.items(), (BLUE, VERMILLION), "os", strict=True):
        milliseconds = [[1e3 * seconds for seconds in m.seconds] for m in group]
        label = "no window" if name == "none" else f"window of {name}"
        handles.append(common.whiskers(ax, depths, milliseconds, color=color, marker=marker, label=label))
        ax.plot(depths, [1e3 * m.work / limit for m in group], color=color, lw=0.9, ls=":")
        highest = max(highest, *map(max, milliseconds))
    handles.append(Line2D([], [], color=GREY, lw=0.9, ls=":", label=f"bytes counted at {limit:.1f} GB/s"))
    ax.axvline(window, color=GREY, lw=0.8)
    ax.annotate(
        "the window is full", (window, 0), xytext=(4, 4), textcoords="offset points", fontsize=SMALL, color=GREY
    )
    ax.set(xlabel="tokens before", ylabel="milliseconds a token", ylim=(0, 1.1 * highest))
    ax.set_xticks(depths, [str(depth) if depth in (0, *depths[-3:]) else "" for depth in depths])
    ax.spines[["top", "right"]].set_visible(False)
    title(ax, "The time of a token by the tokens before it", handles)
    return ax


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
