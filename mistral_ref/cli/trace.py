"""mistral-ref trace: the values of a pass, listed or written to a file."""

from __future__ import annotations

import argparse
import os

from mistral_ref.cli.common import add_compute_options, add_model_option, load_model, read_prompt, size
from mistral_ref.cli.study import add_broken_option, add_dtype_option, add_last_option, maybe_broken, split_prompt
from mistral_ref.display import markdown_table, size_text
from mistral_ref.errors import InputError, shown

_EXAMPLES = """\
examples:
  mistral-ref trace "Once upon a time"
  mistral-ref trace --keep "layers.0.*" --keep logits "Once upon a time" -o trace.safetensors
  mistral-ref trace --dtype float64 "Once upon a time" -o exact.safetensors
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "trace",
        help="list the values of a pass, or write them to a file",
        description="Take a text through the model and list every step with its axes and statistics, or write the "
        "values to a safetensors file, which mistral_ref.Trace.load and mistral-ref compare read.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", nargs="?", help="the text; without it, standard input is read")
    add_model_option(parser)
    add_compute_options(parser)
    add_dtype_option(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="write the values to FILE.safetensors")
    parser.add_argument(
        "--keep", action="append", metavar="STEP", help='steps to keep, such as "layers.*.heads" (default: all)'
    )
    add_last_option(parser)
    add_broken_option(parser, "the model")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the steps of a pass, or write them."""
    output = arguments.output
    if output is not None and not output.endswith(".safetensors"):
        raise InputError(f"-o is {shown(output)}; expected a name that ends in .safetensors")
    model = maybe_broken(load_model(arguments), arguments.broken)
    tokens, cache = split_prompt(model, read_prompt(arguments), arguments.last)
    trace = model.trace(tokens, keep=arguments.keep or "*", cache=cache)
    if output is not None:
        trace.save(output)
        print(f"{output}: {len(trace)} steps of {trace.n_tokens} tokens, {size(os.path.getsize(output))}")
        return
    print(f"{trace.n_tokens} tokens from position {trace.start}: {' '.join(trace.pieces)}")
    rows = [[name, size_text(step.axes, step.value.shape), str(step.statistics)] for name, step in trace.steps.items()]
    print(markdown_table(["step", "axes", "statistics"], rows))
