"""What models of the line take on this machine, and on several, on paper: counted, divided by limits measured here.

Decoding reads every weight once a token, so a machine that reads B bytes a second gives at most B / (bytes of weights
and cache) tokens a second; a prompt takes 2 FLOP a weight and token, so at most peak / FLOP. Both are bounds: what is
reached of them, `mistral-ref bench` measures.

A model that one machine cannot hold can be cut in two ways. By layers, each machine holds some and hands the residual
stream on: one sequence goes no faster than on one machine large enough, and little goes over the network. By rows, each
machine holds a part of every matrix and the parts are added up twice a layer: reading is divided by the machines, and
every sum waits for the network. In a ring, a sum of n bytes over m machines moves 2 (m-1)/m n and takes 2 (m-1) hops.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from common import finish, parser_for

from mistral_ref.config import ModelConfig
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, short_repr
from mistral_ref.host import chosen_threads
from mistral_ref.measure.benchmark import write_json
from mistral_ref.measure.cost import Limits, step_costs
from mistral_ref.measure.cost_table import machine_limits
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.shapes import SHAPES
from mistral_ref.measure.synthetic import hollow_weights

EXAMPLES = """\
examples:
  python benchmarks/on_paper.py                                       with the limits of this machine, measured first
  python benchmarks/on_paper.py --bandwidth 100 --peak 800            of another one, in GB/s and GFLOP/s
  python benchmarks/on_paper.py --split large-123b --gbit 10 --us 50  over a better network
"""
BITS = (16, 8.5, 4.5)  # a weight: bf16, and groups of 32 in 8 or 4 bits with 16 bits of scale and zero
MACHINES = (1, 2, 4, 8)
ACTIVATION_BYTES = 4


@dataclass(frozen=True)
class Counts:
    """What one token takes, after `depth` others, and one token of a long prompt."""

    weights: int  # read for a token
    cache_bytes: int  # read for a token
    flops: int  # of a token of a prompt
    parameters: int


def counts_of(config: ModelConfig, depth: int) -> Counts:
    """Count from the shape; a prompt's token is one of 512 after nothing."""
    weights = hollow_weights(config)
    token, prompt = step_costs(config, weights, 1, depth, cache_dtype="float16"), step_costs(config, weights, 512)
    without_cache = step_costs(config, weights, 1, 0, cache_dtype="float16")
    read = sum(cost.weight_bytes for cost in token) // 2  # bf16: 2 bytes a weight
    cache_bytes = sum(cost.other_bytes for cost in token) - sum(cost.other_bytes for cost in without_cache)
    return Counts(read, cache_bytes, sum(cost.flops for cost in prompt[:-2]) // 512, config.n_parameters)


def decode_rate(counts: Counts, bits: float, limits: Limits, machines: int = 1) -> float:
    """Return the tokens a second at most, with weights and cache divided by a number of machines."""
    return machines * limits.bandwidth / (counts.weights * bits / 8 + counts.cache_bytes)


def split_rates(
    config: ModelConfig, counts: Counts, limits: Limits, network: tuple[float, float], machines: int
) -> tuple[float, int, float, int]:
    """Return (tokens/s by layers, bytes/token by layers, tokens/s by rows, bytes/token by rows) in 4.5 bits.

    network     bytes a second, and seconds for a hop
    """
    rate, hop = network
    alone = 1 / decode_rate(counts, BITS[-1], limits)
    residual = config.dim * ACTIVATION_BYTES
    layers_bytes = (machines - 1) * residual
    by_layers = alone + layers_bytes / rate + (machines - 1) * hop
    sums = 2 * config.n_layers
    moved = 2 * (machines - 1) / machines * residual
    by_rows = alone / machines + sums * (moved / rate + 2 * (machines - 1) * hop)
    return 1 / by_layers, layers_bytes, 1 / by_rows, round(sums * moved)


def model_rows(depth: int, limits: Limits) -> list[list[str]]:
    """Return a row for each published shape."""
    rows = []
    for name, config in SHAPES.items():
        if name == "tiny":
            continue
        counts = counts_of(config, depth)
        sizes = [f"{counts.parameters * bits / 8 / 2**30:.1f}" for bits in BITS]
        rates = [f"{decode_rate(counts, bits, limits):.2g}" for bits in BITS]
        cells = [f"{counts.flops / 1e9:.1f}", f"{counts.cache_bytes / 2**20:.0f}", *rates]
        rows.append([name, *sizes, *cells, f"{limits.peak / counts.flops:.2g}"])
    return rows


def split_rows(name: str, depth: int, limits: Limits, network: tuple[float, float]) -> list[list[str]]:
    """Return a row for each number of machines."""
    config = SHAPES[name]
    counts, rows = counts_of(config, depth), []
    for machines in MACHINES:
        layers, layers_bytes, by_rows, rows_bytes = split_rates(config, counts, limits, network, machines)
        held = counts.parameters * BITS[-1] / 8 / 2**30 / machines
        cells = [f"{layers:.2g}", f"{layers_bytes / 1e3:.0f}", f"{by_rows:.2g}", f"{rows_bytes / 1e3:.0f}"]
        rows.append([str(machines), f"{held:.1f}", *cells])
    return rows


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    parser.add_argument("--bandwidth", type=float, metavar="GB/s", help="of memory (default: measured here)")
    parser.add_argument("--peak", type=float, metavar="GFLOP/s", help="of multiply-adds (default: measured here)")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each performance core")
    parser.add_argument("--depth", type=int, default=4096, metavar="N", help="tokens in the cache (%(default)s)")
    parser.add_argument("--split", default="large-123b", metavar="SHAPE", help="over machines (%(default)s)")
    parser.add_argument("--gbit", type=float, default=1.0, metavar="R", help="of the network, a second (%(default)s)")
    parser.add_argument("--us", type=float, default=200.0, metavar="T", help="of a hop, microseconds (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the machine and both tables there")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Measure what is not given; print both tables."""
    if arguments.split not in SHAPES:
        raise InputError(f"--split is {short_repr(arguments.split)}; expected one of {', '.join(SHAPES)}")
    for name in ("bandwidth", "peak", "gbit", "us"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < float("inf"):
            raise InputError(f"--{name} is {value}; expected a number above 0")
    n_threads = chosen_threads(arguments.threads)
    given = Limits(1e9 * (arguments.bandwidth or 0), 1e9 * (arguments.peak or 0))
    limits = given if all(given) else machine_limits(n_threads, 2**30)
    limits = Limits(given.bandwidth or limits.bandwidth, given.peak or limits.peak)
    network = (1e9 / 8 * arguments.gbit, 1e-6 * arguments.us)
    description = machine(n_threads)
    print("\n".join(machine_lines(description)))
    print(f"limits: {limits.bandwidth / 1e9:.1f} GB/s, {limits.peak / 1e9:.1f} GFLOP/s")
    models = model_rows(arguments.depth, limits)
    headings = ["model", *(f"GiB at {bits:g} bits" for bits in BITS), "GFLOP/token", f"cache MiB at {arguments.depth}"]
    headings += [*(f"tokens/s at {bits:g}" for bits in BITS), "prompt tokens/s"]
    print(f"\nat most, on one machine\n\n{markdown_table(headings, models)}")
    splits = split_rows(arguments.split, arguments.depth, limits, network)
    split_headings = ["machines", "GiB each", "by layers: tokens/s", "KB/token", "by rows: tokens/s", "KB/token"]
    words = f"{arguments.split} in {BITS[-1]} bits, {arguments.gbit:g} Gbit/s and {arguments.us:g} us a hop"
    print(f"\n{words}\n\n{markdown_table(split_headings, splits)}")
    if arguments.json:
        tables = {"models": [headings, *models], "split": [split_headings, *splits]}
        write_json(arguments.json, {"machine": description, "limits": limits._asdict(), **tables})


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
