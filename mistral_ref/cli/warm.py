"""mistral-ref warm: compile every kernel that a model can need."""

from __future__ import annotations

import argparse
import sys
import time

from mistral_ref.cli.common import add_adapter_option, add_model_option, n_kernels, show_compiling
from mistral_ref.cli.output import say
from mistral_ref.loading import load

_EXAMPLES = """\
examples:
  mistral-ref warm
  mistral-ref warm --model DIR
  # in the recipe of a container, so that no start of it compiles
  mistral-ref warm --all
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "warm",
        help="compile every kernel that a model can need",
        description="""\
Compile the kernels of a model for this machine, so that no later command has to
wait for them: those for prompts of any length, and for keys and values in
float32, float16 and int8. For a model of 8 or 4 bits these are the kernels of
both --quantized-inputs. Compiled kernels are kept, so a second run is quick.""",
        epilog=_EXAMPLES,
    )
    add_model_option(parser)
    add_adapter_option(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        help="compile also what --quantize, --quantized-inputs and --bf16-inputs need, and what bench measures with",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compile what is missing, and print how many kernels that were."""
    started = time.perf_counter()
    model = load(arguments.model, backend="numba", adapters=arguments.adapter)
    # Imported here: the import starts Numba, and --help does not need Numba.
    from mistral_kernels import compiling  # noqa: PLC0415
    from mistral_ref import kernel_choice  # noqa: PLC0415

    kernels = kernel_choice.of_a_model(model.config, model.weights, every_option=arguments.all)
    n_compiled = compiling.make(kernels, show_compiling if _is_terminal() else _say_compiling)
    say(
        f"{n_kernels(n_compiled)} compiled in {time.perf_counter() - started:.1f} s; "
        f"{len(kernels) - n_compiled} were there already"
    )


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _say_compiling(done: int, total: int, kernel: str) -> None:
    """Print a line for each kernel: there is no terminal on which one line could change."""
    if kernel:
        say(f"compiling {done + 1} of {total}, {kernel}", error=True)
