"""mistral-ref generate: continue a text."""

from __future__ import annotations

import argparse
import re
import sys
import time
from itertools import pairwise

import mistral_ref
from mistral_ref.cache import DEFAULT_CHUNK
from mistral_ref.cli.common import add_compute_options, add_model_option, as_text, load_model, progress_bar, read_prompt

_DESCRIPTION = """\
Continue a text with a model. The prompt and its continuation are printed to
standard output, token by token. The continuation ends after --max-tokens
tokens, before a --stop text, or when the model ends it.
"""
_EXAMPLES = """\
examples:
  mistral-ref generate "Once upon a time"
  mistral-ref generate --temperature 0.8 --top-p 1 --seed 7 --max-tokens 100 "Tom had a red ball."
  mistral-ref generate --temperature 0 --stop "." "Lily saw a"
  mistral-ref generate --stop '\\n' "Tom said:"
  cat story.txt | mistral-ref generate --model DIR --stop "The end" --stats
"""
_TOP_P = 0.9


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument("prompt", nargs="?", help="the text to continue; without it, standard input is read")
    add_model_option(parser)
    add_compute_options(parser)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=256,
        metavar="N",
        help="maximum number of tokens in the continuation (default: %(default)s)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the continuation before TEXT; the option may be given several times. In TEXT, \\n is a newline, "
        "\\t is a tab, and \\\\ is a backslash",
    )
    parser.add_argument("--no-echo", action="store_true", help="print only the continuation, not the prompt")
    parser.add_argument(
        "--stats", action="store_true", help="at the end print times and tokens per second to standard error"
    )
    _add_sampling_options(parser)
    parser.set_defaults(run=run)


def _add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a token is drawn."""
    sampling = parser.add_argument_group(
        "sampling",
        "How the next token is drawn from the model's probabilities.\nThe options are applied in this order.\n"
        "model.generate in Python has other defaults: temperature 0, top_p 1.",
    )
    sampling.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: make tokens less likely that were in the text before; 1: no change (default: 1)",
    )
    sampling.add_argument(
        "--temperature",
        type=float,
        default=0.7,
        metavar="T",
        help="above 1: make unlikely tokens likelier; below 1: less likely; 0: always take the likeliest token "
        "(default: 0.7)",
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="draw only from the K likeliest tokens (default: all)")
    sampling.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw only from the likeliest tokens whose probabilities together reach P "
        f"(default: {_TOP_P}; 1 with temperature 0)",
    )
    sampling.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw only from tokens that are at least P times as probable as the likeliest one (default: 0)",
    )
    sampling.add_argument(
        "--seed", type=int, metavar="N", help="the same seed draws the same tokens again (default: a random seed)"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print a prompt and its continuation."""
    started = time.perf_counter()
    model = load_model(arguments)
    loaded = time.perf_counter()
    prompt = read_prompt(arguments)
    ids = model.token_ids(prompt)
    with progress_bar("reading the prompt", is_long=len(ids) > DEFAULT_CHUNK) as progress:
        tokens = model.generate(
            ids,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=(_TOP_P if arguments.temperature else 1.0) if arguments.top_p is None else arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            seed=arguments.seed,
            stop=[unescaped(as_text(stop)) for stop in arguments.stop],
            progress=progress,
        )
        first = next(tokens)  # before the prompt is printed: a bar or a notice would appear in the middle of the text
    print(("" if arguments.no_echo else prompt) + first.text, end="", flush=True)
    first_at, count, last = time.perf_counter(), 1, first
    for last in tokens:
        count += 1
        print(last.text, end="", flush=True)
    print()
    if arguments.stats:
        ended = time.perf_counter()
        print_stats(model, last, len(ids), count, [started, loaded, first_at, ended])


def unescaped(text: str) -> str:
    r"""Return a text in which \n and \t have become a newline and a tab, and two backslashes one.

    >>> unescaped(r"a\n"), unescaped(r"a\\n\d")
    ('a\n', 'a\\n\\d')
    """
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)


def print_stats(model: mistral_ref.Model, last: mistral_ref.Token, n_prompt: int, count: int, at: list[float]) -> None:
    """Print to standard error how long loading and generating took.

    `at` holds four times: of the start, of the end of loading, of the first token, and of the end.
    """
    load_s, first_s, rest_s = (later - earlier for earlier, later in pairwise(at))
    rest = f"{count - 1} tokens in {rest_s:.3f} s, {(count - 1) / rest_s:.1f} tokens/s" if count > 1 else "no tokens"
    print(
        f"load          {load_s:.3f} s\n"
        f"first token   {first_s:.3f} s after loading, {n_prompt} prompt tokens, {n_prompt / first_s:.1f} tokens/s\n"
        f"then          {rest}\n"
        f"ended by      {last.finish_reason}\n"
        f"computed by   {model.ops.name}, {model.ops.dtype}",
        file=sys.stderr,
    )
