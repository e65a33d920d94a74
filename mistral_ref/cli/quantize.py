"""mistral-ref quantize: a directory in, a smaller directory out."""

from __future__ import annotations

import argparse
import time

import mistral_ref
from mistral_ref.cli.common import model_directory, progress_bar, size
from mistral_ref.files.build_weights import open_model
from mistral_ref.quantized_matrix import BITS, GROUP_SIZE, GROUP_SIZES
from mistral_ref.weights import matrices

_EXAMPLES = """\
examples:
  mistral-ref quantize path/to/Mistral-7B path/to/Mistral-7B-int4
  mistral-ref quantize path/to/Mistral-7B path/to/Mistral-7B-int8 --bits 8
  mistral-ref quantize demo small --bits 4 && mistral-ref generate --model small "Once upon a time"
  mistral-ref compare demo small "Once upon a time"      how far every step departs
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "quantize",
        help="round a model's weights to 8 or 4 bits",
        description="Round a model's weights to 8 or 4 bits, into a new directory that loads like any other. It is\n"
        "mapped as it is, so it takes as much memory as disk, and decodes about as many times faster as it\n"
        "is smaller. 8 bits change hardly anything; what 4 bits cost, docs/quantization.md has measured.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", help="directory of the model; `demo` for the demonstration model")
    parser.add_argument("target", metavar="OUT", help="the new directory")
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="of a weight (default: %(default)s)")
    parser.add_argument(
        "--group-size",
        type=int,
        choices=GROUP_SIZES,
        default=GROUP_SIZE,
        help="weights that share a scale: fewer are more exact, and cost 16 bits a group (default: %(default)s)",
    )
    for name, words in (("embedding", "the embedding"), ("head", "the output matrix")):
        parser.add_argument(
            f"--{name}", choices=["8", "4", "keep"], default="8", help=f"bits of {words} (default: %(default)s)"
        )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Quantize, and say what has become of the model."""
    source = model_directory(arguments.source)
    around = {
        name: None if getattr(arguments, name) == "keep" else int(getattr(arguments, name))
        for name in ("embedding", "head")
    }
    started = time.perf_counter()
    with progress_bar("quantizing", is_long=True) as progress:
        target = mistral_ref.quantize(
            source, arguments.target, arguments.bits, group_size=arguments.group_size, **around, progress=progress
        )
    seconds = time.perf_counter() - started
    before, after = (matrices(open_model(directory)[1]) for directory in (source, target))
    n_before, n_after = (sum(matrix.nbytes for matrix in every) for every in (before, after))
    n_weights = sum(matrix.size for matrix in after)
    print(
        f"{target}: {size(n_after)} for {size(n_before)}, {8 * n_after / n_weights:.2f} bits a weight "
        f"for {8 * n_before / n_weights:.2f}, in {seconds:.1f} s"
    )
