"""How long the second turn of a conversation waits for its first token, beside the first turn.

The first turn reads a long prompt and answers. The second turn's prompt is all of that with a few new tokens behind it.
Both are given with the same `prompt_cache`, so the second reads only what is new. Weights are random. "share" is the
second wait as a part of the first, in each conversation.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from common import add_threads_option, finish, parser_for, random_model, status

from mistral_ref.cache import KVCache
from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.display import markdown_table
from mistral_ref.errors import checked_int
from mistral_ref.measure.benchmark import ratios, spread, write_json
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.shapes import SHAPES, shape
from mistral_ref.model import Model

EXAMPLES = """\
examples:
  python benchmarks/second_turn.py
  python benchmarks/second_turn.py --shape mistral-7b --layers 2 --dtype int4
"""
TARGET = 0.05


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__ or "", EXAMPLES)
    parser.add_argument("--shape", default="stories-110m", help=f"{', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="N", help="of that shape (default: all)")
    parser.add_argument("--dtype", dest="kind", choices=["bf16", "int8", "int4"], default="bf16", help="of the weights")
    add_threads_option(parser)
    parser.add_argument("--prompt", type=int, default=2000, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=16, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=20, metavar="N", help="of the second turn (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="conversations (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the machine and every sample there")
    return parser.parse_args()


def turn(model: Model, ids: list[int], cache: KVCache, n: int) -> tuple[float, list[int]]:
    """Return the seconds until the first token of an answer of n tokens, and the answer."""
    started = time.perf_counter()
    tokens = model.generate(ids, prompt_cache=cache, max_tokens=n)
    first = next(tokens)
    seconds = time.perf_counter() - started
    return seconds, [first.id, *(token.id for token in tokens)]


def measure(arguments: argparse.Namespace) -> None:
    """Hold the conversations; print a table, and write the file."""
    for name in ("prompt", "answer", "new", "repeats"):
        checked_int(name, getattr(arguments, name), least=1)
    status("making weights")
    ops = CompiledOps(threads=arguments.threads)
    config = shape(arguments.shape, layers=arguments.layers, window=0)
    model, rng = random_model(config, arguments.kind, ops), np.random.default_rng(0)
    first, second = [], []
    for repeat in range(arguments.repeats + 1):
        status(f"{repeat or 'warm-up'} of {arguments.repeats}")
        cache, prompt = model.new_cache(), rng.integers(0, config.vocab_size, arguments.prompt).tolist()
        before, answer = turn(model, prompt, cache, arguments.answer)
        new = rng.integers(0, config.vocab_size, arguments.new).tolist()
        after, _ = turn(model, [*prompt, *answer, *new], cache, 1)
        if repeat:
            first.append(before)
            second.append(after)
    status()
    share, about = spread(ratios(second, first)), machine(ops.threads)
    rows = [[name, *spread(times).text(3)] for name, times in (("first turn", first), ("second turn", second))]
    print("\n".join(machine_lines(about)))
    print(f"{model}: {arguments.prompt} tokens and an answer of {arguments.answer}, then {arguments.new} new tokens\n")
    print(markdown_table(["seconds until the first token", "median", "min to max"], rows))
    print(f"\nshare: {share.median:.1%} ({share.low:.1%} to {share.high:.1%}); target: at most {TARGET:.0%}")
    if arguments.json:
        write_json(arguments.json, {"machine": about, "first": first, "second": second})


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
