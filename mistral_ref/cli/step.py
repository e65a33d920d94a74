"""mistral-ref step: walk through a forward pass in the terminal, look at every tensor, and change it."""

from __future__ import annotations

import argparse
import sys

from mistral_ref.cli.common import (
    add_cache_option,
    add_compute_options,
    add_ids_option,
    add_model_option,
    given_prompt,
    load_model,
)
from mistral_ref.cli.pass_options import add_broken_option, add_last_option, maybe_broken, split_prompt
from mistral_ref.cli.walker.walker import Walker
from mistral_ref.errors import InputError
from mistral_ref.study.stepper import Stepper

_EXAMPLES = """\
examples:
  mistral-ref step "Once upon a time"
  # the pass of the last 4 tokens; the tokens before them are in a cache
  mistral-ref step --last 4 "Once upon a time there was a girl"
  # a model with a bug
  mistral-ref step --broken tiled-heads "Tom had a red ball"
  # commands from a pipe
  printf 'jump q\\nzero head 3\\npredict\\n' | mistral-ref step "Lily saw a"
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "step",
        help="walk through a pass, tensor by tensor",
        description="""\
Walk through the forward pass of a text. You go from step to step, or from
layer to layer, forwards and backwards. At each step you can look at its value
as numbers or as a heat map. You can change the value, and see how the
prediction of the next token changes.

You type commands at a prompt; the command `help` lists them. Standard input
may also be a pipe with one command on each line.""",
        epilog=_EXAMPLES,
    )
    parser.add_argument("prompt", nargs="?", help="the text to walk through")
    add_ids_option(parser)
    add_model_option(parser)
    add_compute_options(parser, backend="numpy")
    add_last_option(parser)
    add_cache_option(parser)
    add_broken_option(parser, "the model")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the commands of a walk until the last one."""
    if sys.stdin is None:
        raise InputError("standard input is closed; the commands of a walk are read from it")
    prompt = given_prompt(arguments)
    if prompt is None:
        raise InputError("no text: give it as an argument, or its token ids with --ids")
    model = maybe_broken(load_model(arguments), arguments.broken)
    tokens, cache = split_prompt(model, prompt, arguments.last, arguments.cache_dtype)
    walker = Walker(Stepper(model, tokens, cache))
    walker.begin()
    walker.cmdloop()
