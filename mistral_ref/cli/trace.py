"""mistral-ref trace: list the values of a pass, write them to a file, or show them as a page."""

from __future__ import annotations

import argparse

from mistral_ref.cache import KVCache
from mistral_ref.cli.common import (
    add_cache_option,
    add_compute_options,
    add_ids_option,
    add_model_option,
    load_model,
    progress_bar,
    read_prompt,
)
from mistral_ref.cli.output import say
from mistral_ref.cli.pass_options import (
    add_broken_option,
    add_dtype_option,
    add_last_option,
    maybe_broken,
    model_title,
    split_prompt,
)
from mistral_ref.cli.width import fitted, terminal_width
from mistral_ref.display import markdown_table, size_text
from mistral_ref.errors import InputError, escaped, size
from mistral_ref.files.paths import local_path
from mistral_ref.model import Model
from mistral_ref.study import report

_EXAMPLES = """\
examples:
  mistral-ref trace "Once upon a time"
  mistral-ref trace "Once upon a time" -o trace.html
  mistral-ref trace --model DIR --keep "layers.0.*" --keep "*.attention_weights" "Hello" -o trace.html
  mistral-ref trace --keep "layers.0.*" --keep logits "Once upon a time" -o trace.safetensors
  mistral-ref trace --dtype float64 "Once upon a time" -o exact.safetensors
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "trace",
        help="list the values of a pass, write them to a file, or show them as a page",
        description="""\
Run one forward pass over a text and show the values of its steps. The output
depends on -o:

  without -o            a list of all steps, with their axes and statistics
  -o NAME.html          a page to click through in a browser; it is one file
                        and needs no network
  -o NAME.safetensors   a file with the values; mistral_ref.Trace.load and
                        mistral-ref compare read it""",
        epilog=_EXAMPLES,
    )
    parser.add_argument("prompt", nargs="?", help="the text; without it, standard input is read")
    add_ids_option(parser)
    add_model_option(parser)
    add_compute_options(parser)
    add_dtype_option(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="the file to write; its name ends in .html or .safetensors (default: print a list)",
    )
    parser.add_argument(
        "--keep",
        action="append",
        metavar="STEP",
        help='name or glob of steps whose values are kept, such as "layers.*.heads"; the option may be given several '
        "times. For the other steps a page shows statistics and a small picture (default: all steps; if a page would "
        "be too large, only the steps that fit, attention weights first)",
    )
    parser.add_argument("--no-cost", action="store_true", help="for a page: do not measure how long each step takes")
    add_last_option(parser)
    add_cache_option(parser)
    add_broken_option(parser, "the model")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the steps of a pass, or write them to a file."""
    output = arguments.output
    if output is not None and not output.endswith((".html", ".safetensors")):
        raise InputError(f"-o is {output}; expected a name that ends in .html or .safetensors")
    if arguments.no_cost and (output is None or not output.endswith(".html")):
        raise InputError("--no-cost is for a page only; expected -o FILE.html with it")
    model = maybe_broken(load_model(arguments), arguments.broken)
    tokens, cache = split_prompt(model, read_prompt(arguments), arguments.last, arguments.cache_dtype)
    if output is not None and output.endswith(".html"):
        _write_page(arguments, model, tokens, cache)
        return
    trace = model.trace(tokens, keep=arguments.keep or "*", cache=cache)
    if output is not None:
        trace.save(output)
        n_bytes = local_path(output).stat().st_size
        say(f"{escaped(output)}: {len(trace)} steps of {trace.n_tokens} tokens, {size(n_bytes)}")
        return
    say(fitted(f"{trace.n_tokens} tokens from position {trace.start}: {' '.join(trace.pieces)}"))
    rows = [[name, size_text(step.axes, step.value.shape), str(step.statistics)] for name, step in trace.steps.items()]
    say(fitted(markdown_table(["step", "axes", "statistics"], rows, terminal_width())))


def _write_page(arguments: argparse.Namespace, model: Model, tokens: list[int], cache: KVCache | None) -> None:
    name = model_title(arguments)
    title = name if arguments.broken is None else f"{name}, broken: {arguments.broken}"
    with progress_bar("measuring, then taking every step", is_long=True) as progress:
        report.write(
            model, tokens, arguments.output, keep=arguments.keep, cache=cache, with_cost=not arguments.no_cost,
            title=title, progress=progress,
        )  # fmt: skip
    n_bytes = local_path(arguments.output).stat().st_size
    say(f"{escaped(arguments.output)}: {len(tokens)} tokens, {size(n_bytes)}; open it in a browser")
