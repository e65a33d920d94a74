"""mistral-ref compare: compare two passes step by step, and find the first step that departs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from mistral_ref.cache import KVCache
from mistral_ref.cli.common import (
    add_adapter_option,
    add_ids_option,
    add_memory_option,
    add_threads_option,
    add_window_option,
    given_prompt,
    model_directory,
    progress_bar,
    show_compiling,
    text_of,
)
from mistral_ref.cli.output import say
from mistral_ref.cli.pass_options import add_broken_option, add_last_option, maybe_broken, split_prompt
from mistral_ref.cli.width import fitted, terminal_width
from mistral_ref.compare import compare_walks
from mistral_ref.errors import InputError, checked_int, first_difference
from mistral_ref.files.paths import is_gguf, local_path
from mistral_ref.loading import load
from mistral_ref.model import Model
from mistral_ref.steps import step_names
from mistral_ref.study.broken import BUGS
from mistral_ref.trace import Trace

_DESCRIPTION = """\
Compare a pass of A with a pass of B over the same text. The command computes
for every step how far A lies from B, and finds the first step that departs. A
step departs if its distance in ulps is more than --bound. The distance is
given in three ways: the largest absolute difference, the largest relative
difference, and the largest absolute difference in float32 ulps of the step's
largest value (1 ulp is about one rounding).

A and B are each one of these:
  DIR     the directory of a model, or a GGUF file
  demo    the demonstration model
  FILE    a trace: written by mistral-ref trace, or dumped by another engine

The exit status is 0 if all steps agree, 1 if a step departs, and 2 for a
mistake in the arguments.
"""
_EXAMPLES = """\
examples:
  # compiled kernels against the plain mathematics
  mistral-ref compare demo demo --backend numba,numpy "Once upon a time"
  # the error that each step of float32 adds by itself
  mistral-ref compare demo demo --dtype float32,float64 --own "Once upon a time"
  # what a bug changes, in the values and in the text
  mistral-ref compare demo demo --broken tiled-heads --continue 20 "Once upon a time"
  # what an adapter changes
  mistral-ref compare DIR DIR --adapter ADAPTER "Once upon a time"
  # a dump of another engine against a model, over the tokens in the dump
  mistral-ref compare MY_DUMP.safetensors DIR
"""

_MAX_TOKENS = 100_000  # for --continue


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "compare",
        help="compare two passes and find the first step that departs",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument("a", metavar="A", help="the model or trace that is checked")
    parser.add_argument("b", metavar="B", help="the model or trace that A is compared with")
    parser.add_argument("prompt", nargs="?", help="the text (default: the tokens in the trace, if A or B is a trace)")
    add_ids_option(parser)
    _add_compute_options(parser)
    add_broken_option(parser, "A")
    add_last_option(parser)
    parser.add_argument(
        "--own",
        action="store_true",
        help="after every step B takes over A's value, so that the row of a step shows only the difference that this "
        "step adds; NumPy computes the values unless --backend chooses numba",
    )
    parser.add_argument(
        "--bound",
        type=float,
        metavar="ULPS",
        help="a step departs if its distance is more than this number of ulps (default: 2000, with --own 200)",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="print every step (default: the step of each layer with the largest distance)",
    )
    parser.add_argument(
        "--rope-row-order",
        choices=["interleaved", "halves"],
        help="which numbers of a head RoPE turns together, for a trace that does not record it: halves if they are "
        "half a head apart, as in Hugging Face's layout; interleaved if they are neighbours (default: interleaved)",
    )
    parser.add_argument(
        "--continue",
        dest="n_more",
        type=int,
        metavar="N",
        help="also let each model continue the text by N tokens, and print both texts",
    )
    parser.set_defaults(run=run)


def _add_compute_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how A and B are computed."""
    parser.add_argument(
        "--backend",
        metavar="A,B",
        default="",
        help="numba or numpy: one for both models, or one for each with a comma between (default: numba; numpy for "
        "float64, --own and --broken)",
    )
    parser.add_argument(
        "--dtype",
        metavar="A,B",
        default="",
        help="float32 or float64: one for both models, or one for each with a comma between (default: float32)",
    )
    parser.add_argument(
        "--cache-dtype",
        metavar="A,B",
        default="",
        help="float32, float16 or int8, the type of keys and values in the cache: one for both models, "
        "or one for each with a comma between (default: float32)",
    )
    add_threads_option(parser, " of each model")
    add_window_option(parser)
    add_memory_option(parser)
    add_adapter_option(parser, whose="A")
    add_adapter_option(parser, "--adapter-b", "B")


def run(arguments: argparse.Namespace) -> None:
    """Print how far A lies from B; set the exit status to 1 if a step departs."""
    n_more = None if arguments.n_more is None else checked_int("--continue", arguments.n_more, 1, _MAX_TOKENS)
    sides = [_opened(arguments, index) for index in range(2)]
    models = [side for side in sides if isinstance(side, Model)]
    _check_options(arguments, sides)
    dtypes = [_one_of_two("--cache-dtype", arguments.cache_dtype, index) or None for index in range(2)]
    prompt = _prompt(arguments, sides)
    if len(models) == 2:
        passes = [
            split_prompt(model, prompt, arguments.last, dtype) for model, dtype in zip(models, dtypes, strict=True)
        ]
        if difference := first_difference(passes[0][0], passes[1][0], "tokens"):
            arguments.status = 1
            say(fitted(f"A and B read different tokens, so their steps cannot be compared: {difference}"))
            return
        a, b = (model.steps(*its_pass) for model, its_pass in zip(models, passes, strict=True))
        shared = set.intersection(*(set(step_names(model.config)) for model in models))
        n_steps, is_long = len(shared), models[0].config.n_parameters > 10**9
        with progress_bar("comparing", is_long=is_long) as progress:
            report = (lambda done: progress(done, n_steps)) if progress else None
            comparison = compare_walks(a, b, bound=arguments.bound, own=arguments.own, progress=report)
    else:
        if arguments.own:
            raise InputError("--own needs two models: a trace cannot take over a value")
        bound = {} if arguments.bound is None else {"bound": arguments.bound}
        ours, theirs = (
            side
            if isinstance(side, Trace)
            else _traced(side, sides, *split_prompt(side, prompt, arguments.last, dtype))
            for side, dtype in zip(sides, dtypes, strict=True)
        )
        comparison = ours.compare(theirs, **bound)
    arguments.status = 1 if comparison.departed else 0  # set before printing: `head` may close the output
    say(fitted(comparison.text(every=arguments.all, width=terminal_width())))
    if arguments.broken and not comparison.departed and BUGS[arguments.broken].shows:
        say(f"{arguments.broken} shows {BUGS[arguments.broken].shows}")
    if n_more is not None:
        _print_texts(sides, dtypes, prompt, n_more)


def _opened(arguments: argparse.Namespace, index: int) -> Model | Trace:
    """Return A (index 0) or B (index 1): a trace, or a model loaded with the options for this side."""
    path = (arguments.a, arguments.b)[index]
    file = local_path(path)
    if (os.path.isfile(file) and not is_gguf(file)) or path.endswith(".safetensors"):
        return Trace.load(path, rope_row_order=arguments.rope_row_order)
    model = load(
        model_directory(path),
        backend=_one_of_two("--backend", arguments.backend, index) or _usual_backend(arguments),
        dtype=_one_of_two("--dtype", arguments.dtype, index) or "float32",
        threads=arguments.threads,
        window=arguments.window,
        check_memory=arguments.check_memory,
        adapters=(arguments.adapter, arguments.adapter_b)[index],
        on_compile=show_compiling,
    )
    return maybe_broken(model, arguments.broken if index == 0 else None)


def _usual_backend(arguments: argparse.Namespace) -> str | None:
    """Return the backend without --backend: NumPy for --own, which must set every step, and for --broken."""
    return "numpy" if arguments.own or arguments.broken else None


def _check_options(arguments: argparse.Namespace, sides: list[Model | Trace]) -> None:
    """Raise InputError for an option that has no meaning for these two sides."""
    if arguments.broken and isinstance(sides[0], Trace):
        raise InputError("--broken plants a bug in A, and A is a trace; expected a model")
    if not any(isinstance(side, Model) for side in sides):
        given = {"--continue": arguments.n_more, "--last": arguments.last, "--backend": arguments.backend or None}
        if found := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{found[0]} is for models, and both sides are traces")


def _one_of_two(option: str, text: str, index: int) -> str:
    """Return the half of "A,B" for one side; a text without a comma is for both sides.

    >>> _one_of_two("--backend", "numba,numpy", 1), _one_of_two("--backend", "numpy", 1)
    ('numpy', 'numpy')
    """
    parts = text.split(",")
    if len(parts) > 2:
        raise InputError(f"{option} is {text!r}; expected one value, or two with a comma between")
    return parts[min(index, len(parts) - 1)]


def _prompt(arguments: argparse.Namespace, sides: list[Model | Trace]) -> str | list[int]:
    given = given_prompt(arguments)
    if given is not None:
        return given
    for side in sides:
        if isinstance(side, Trace) and (side.tokens or all(isinstance(other, Trace) for other in sides)):
            return side.tokens
    raise InputError(
        "no text: give it as the third argument or with --ids, or compare with a trace that holds its tokens"
    )


def _traced(model: Model, sides: list[Model | Trace], tokens: list[int], cache: KVCache | None) -> Trace:
    """Return the trace of a model; it keeps only the steps that the trace on the other side holds."""
    kept = next(list(other) for other in sides if isinstance(other, Trace))
    return model.trace(tokens, cache=cache, keep=kept)


def _print_texts(
    sides: list[Model | Trace], dtypes: Sequence[str | None], prompt: str | list[int], n_more: int
) -> None:
    is_two = all(isinstance(side, Model) for side in sides)
    for name, model, dtype in zip("AB", sides, dtypes, strict=True):
        if isinstance(model, Model):
            say(f"{name if is_two else 'the model'} goes on: ", end="")
            for token in model.generate(prompt, max_tokens=n_more, cache=model.new_cache(dtype=dtype)):
                say(text_of(model, token), end="")
            say()
