"""mistral-ref quantize: write a copy of a model with smaller weights."""

from __future__ import annotations

import argparse
import time
from typing import Any

import mistral_ref
from mistral_ref.cli.common import add_adapter_option, model_directory, progress_bar
from mistral_ref.cli.output import say
from mistral_ref.errors import escaped, size
from mistral_ref.files.build_weights import open_model
from mistral_ref.quantized_matrix import BITS, GROUP_SIZE, GROUP_SIZES
from mistral_ref.weights import matrices

_EXAMPLES = """\
examples:
  mistral-ref quantize path/to/Mistral-7B path/to/Mistral-7B-int4
  mistral-ref quantize path/to/Mistral-7B path/to/Mistral-7B-int8 --bits 8
  mistral-ref quantize demo small --bits 4 && mistral-ref generate --model small "Once upon a time"
  mistral-ref quantize path/to/Mistral-7B path/to/tuned-int4 --adapter path/to/adapter
  mistral-ref quantize path/to/Mistral-7B.Q4_K_M.gguf path/to/Mistral-7B-tiles
  # how far every step of the rounded model departs
  mistral-ref compare demo small "Once upon a time"
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "quantize",
        help="round a model's weights to 8 or 4 bits, or bring a GGUF file into tile order",
        description="""\
Round a model's weights to 8 or 4 bits, and write them to a new directory. The
new directory is loaded like that of any other model. Its weights take as much
memory as they take on the disk. If they are three times smaller, the model
generates tokens about three times faster.

Rounding makes a model less exact. With 8 bits the difference is very small.
docs/quantization.md shows the difference measured with 4 bits.

A GGUF file of packed weights (Q4_K_M, for example) is not rounded again. Its
weights are brought into tile order, the order in which kernels read them
fastest. Not one weight changes.""",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "source",
        metavar="IN",
        help="directory of the model, a GGUF file, its name in the hub's cache, or `demo` for the demonstration model",
    )
    parser.add_argument("target", metavar="OUT", help="the new directory; it must not exist yet")
    parser.add_argument(
        "--bits",
        type=int,
        choices=BITS,
        help="bits per weight in the matrices of the layers (default: 4; a GGUF file of packed weights: as it is)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=GROUP_SIZE,
        help="number of weights in a row that are rounded with the same scale. A smaller group is more exact, but each "
        "group takes 16 more bits (default: %(default)s)",
    )
    for name, words in (("embedding", "the embedding"), ("head", "the output matrix")):
        parser.add_argument(
            f"--{name}",
            choices=["8", "4", "keep"],
            default="8",
            help=f"bits per weight in {words}; keep: do not round it (default: %(default)s)",
        )
    add_adapter_option(parser, whose="the new model, for good,")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Quantize a model, and print how much smaller it has become."""
    source = model_directory(arguments.source)
    around: dict[str, Any] = {
        name: None if getattr(arguments, name) == "keep" else int(getattr(arguments, name))
        for name in ("embedding", "head")
    }
    started = time.perf_counter()
    with progress_bar("quantizing", is_long=True) as progress:
        target = mistral_ref.quantize(
            source,
            arguments.target,
            arguments.bits,
            group_size=arguments.group_size,
            **around,
            adapters=arguments.adapter,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    before, after = (matrices(open_model(directory)[1]) for directory in (source, target))
    n_before, n_after = (sum(matrix.nbytes for matrix in every) for every in (before, after))
    n_weights = sum(matrix.size for matrix in after)
    say(
        f"{escaped(str(target))}: {size(n_after)} for {size(n_before)}, {8 * n_after / n_weights:.2f} bits a weight "
        f"for {8 * n_before / n_weights:.2f}, in {seconds:.1f} s"
    )
