"""Each kind of step against the roofline: one token after others, and a prompt, by layers of a published shape.

cost.py counts what every step of a pass must read and compute; the machine's two limits say what that takes at least.
Both passes and both limits are measured in turn, --repeats times, and the predictions are made from the best that was
seen of each limit: the roof.
"""

from __future__ import annotations

import argparse
import sys
from statistics import median
from typing import TYPE_CHECKING, Any

import common
import numpy as np
from common import finish, parser_for, status

from mistral_ref.cache import KVCache
from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.errors import checked_int
from mistral_ref.measure.benchmark import multiply_add_limit, read_limit
from mistral_ref.measure.cost import Limits, step_costs
from mistral_ref.measure.cost_table import CostTable
from mistral_ref.measure.cost_table import measure as measure_steps
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.shapes import shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """\
examples:
  python benchmarks/roofline.py                               two layers of Mistral 7B, 512 tokens
  python benchmarks/roofline.py --quick --figure roofline.svg
  python benchmarks/roofline.py --shape mixtral-8x7b --layers 1 --steps
"""


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    common.add_slice_options(parser)
    parser.add_argument(
        "--prompt", type=int, metavar="N", help="tokens of the prompt, and before the one (default: 512)"
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="samples of each (default: %(default)s)")
    parser.add_argument("--steps", action="store_true", help="a row for every step, not for every kind of them")
    common.add_threads_option(parser)
    common.add_output_options(parser, "three samples, a prompt of 128", "both passes under the roof")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Measure limits and passes in turn; print the tables, and write the files."""
    n_tokens = arguments.prompt if arguments.prompt is not None else 128 if arguments.quick else 512
    n_tokens = checked_int("prompt", n_tokens, least=1, most=2**13)
    repeats = checked_int("repeats", arguments.repeats, least=1)
    repeats = min(3, repeats) if arguments.quick else repeats
    config, ops = shape(arguments.shape, layers=arguments.layers), CompiledOps(threads=arguments.threads)
    about = {"shape": arguments.shape, "layers": config.n_layers, "dtype": arguments.kind}
    description = machine(ops.threads) | about
    print("\n".join(machine_lines(description)))
    status("making weights")
    model = common.random_model(config, arguments.kind, ops)
    read, peak = read_limit(ops.threads, common.buffer_bytes()), multiply_add_limit(ops.threads)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, n_tokens).tolist()
    passes: dict[str, tuple[list[int], KVCache]] = {
        f"One token after {n_tokens} others": (ids[:1], common.filled_cache(config, ops, n_tokens)),
        f"A prompt of {n_tokens} tokens": (ids, common.filled_cache(config, ops, 0, n_tokens)),
    }
    runs: dict[str, list[list[float]]] = {name: [] for name in passes}
    samples = []
    for repeat in range(repeats):
        for name, (tokens, cache) in passes.items():
            status(f"{repeat + 1} of {repeats}: {name}")
            samples.append(Limits(1e9 * read.measure(), 1e9 * peak.measure()))
            runs[name] += measure_steps(model, tokens, cache, repeats=1)
    status()
    roof = Limits(*map(max, zip(*samples, strict=True)))
    tables = {}
    for name, (tokens, cache) in passes.items():
        costs = step_costs(config, model.weights, len(tokens), cache.length, cache_dtype=cache.dtype)
        tables[name] = CostTable(costs, runs[name], roof, by_kind=not arguments.steps)
        print(f"\n## {name}\n\n{tables[name]}")
    content = {
        "machine": description,
        "limits": [limit._asdict() for limit in samples],
        "roof": roof._asdict(),
        "passes": {name: as_json(table) for name, table in tables.items()},
    }
    common.write_files(arguments, content, lambda: draw(tables))


def as_json(table: CostTable) -> list[dict[str, Any]]:
    """Return every step, what it is counted as, and the seconds of each run."""
    return [
        {
            "step": row.cost.name,
            "flops": row.cost.flops,
            "bytes": row.cost.bytes,
            "bound": row.bound,
            "predicted": row.predicted,
            "seconds": row.seconds,
            "median_seconds": median(row.seconds),
        }
        for row in table.rows(by_kind=False)
    ]


def draw(tables: dict[str, CostTable]) -> Axes:
    """Draw the rooflines of both passes, one above the other."""
    from mistral_ref.study import plots  # noqa: PLC0415 (imports matplotlib)
    from mistral_ref.study.drawing import Figure, title  # noqa: PLC0415

    figure = Figure((7.2, 4.4 * len(tables)), layout="constrained")
    for ax, (name, table) in zip(figure.subplots(len(tables)), tables.items(), strict=True):
        plots.roofline(table, ax=ax)
        legend = ax.get_legend()
        title(ax, name, legend.legend_handles)
    return ax


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
