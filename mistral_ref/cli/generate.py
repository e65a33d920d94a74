"""mistral-ref generate: continue a text."""

from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Sequence
from itertools import pairwise

from mistral_ref.cache import DEFAULT_CHUNK
from mistral_ref.cli.common import (
    add_compute_options,
    add_ids_option,
    add_model_option,
    as_text,
    load_model,
    progress_bar,
    read_prompt,
    text_of,
)
from mistral_ref.cli.output import say
from mistral_ref.cli.width import fitted, terminal_width
from mistral_ref.display import markdown_table
from mistral_ref.generation import Token
from mistral_ref.model import Model

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
  mistral-ref generate --ids 1,346 --top-logprobs 3 --max-tokens 8
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
    add_ids_option(parser)
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
    parser.add_argument(
        "--max-seconds", type=float, metavar="S", help="end the continuation S seconds after the model has been loaded"
    )
    parser.add_argument("--no-echo", action="store_true", help="print only the continuation, not the prompt")
    parser.add_argument(
        "--stats", action="store_true", help="at the end print times and tokens per second to standard error"
    )
    parser.add_argument(
        "--top-logprobs",
        type=int,
        default=0,
        metavar="N",
        help="at the end print every token with its probability, and the N likeliest tokens there, to standard error; "
        "the probabilities are the model's, before sampling (default: 0, no list)",
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
    ids = model.token_ids(prompt := read_prompt(arguments))
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
            top_logprobs=arguments.top_logprobs,
            max_seconds=arguments.max_seconds,
            progress=progress,
        )
        given = [next(tokens)]  # before the prompt is printed: a bar or a notice would be in the middle of the text
    echo = "" if arguments.no_echo else prompt if isinstance(prompt, str) else text_of_ids(model, ids)
    say(echo + text_of(model, given[0]), end="")
    first_at = time.perf_counter()
    for token in tokens:
        given.append(token)
        say(text_of(model, token), end="")
    say()
    ended = time.perf_counter()
    if arguments.top_logprobs:
        say(table_of_tokens(model, given), error=True)
    if arguments.stats:
        print_stats(model, given[-1], len(ids), len(given), [started, loaded, first_at, ended])


def text_of_ids(model: Model, ids: Sequence[int]) -> str:
    """Return what is printed for a prompt of token ids: its text; for a model without a tokenizer the ids."""
    return "".join(f"{token} " for token in ids) if model.tokenizer is None else model.tokenizer.decode(ids)


def table_of_tokens(model: Model, tokens: Sequence[Token]) -> str:
    """Return a table: a row for each token, with its probability and the likeliest tokens in its place."""

    def cell(token: int, logprob: float) -> str:
        return f"{model.piece(token)} {math.exp(logprob):.1%}"

    rows = [[cell(token.id, token.logprob), *(cell(*likely) for likely in token.top_logprobs)] for token in tokens]
    headings = ["token", *(f"choice {n + 1}" for n in range(len(tokens[0].top_logprobs)))]
    return fitted(markdown_table(headings, rows, terminal_width()))


def unescaped(text: str) -> str:
    r"""Return a text in which \n and \t have become a newline and a tab, and two backslashes one.

    >>> unescaped(r"a\n"), unescaped(r"a\\n\d")
    ('a\n', 'a\\n\\d')
    """
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t"}.get(match[1], "\\"), text)


def print_stats(model: Model, last: Token, n_prompt: int, count: int, at: list[float]) -> None:
    """Print to standard error how long loading and generating took.

    `at` holds four times: of the start, of the end of loading, of the first token, and of the end.
    """
    load_s, first_s, rest_s = (later - earlier for earlier, later in pairwise(at))
    rest = f"{count - 1} tokens in {rest_s:.3f} s, {(count - 1) / rest_s:.1f} tokens/s" if count > 1 else "no tokens"
    say(
        f"load          {load_s:.3f} s\n"
        f"first token   {first_s:.3f} s after loading, {n_prompt} prompt tokens, {n_prompt / first_s:.1f} tokens/s\n"
        f"then          {rest}\n"
        f"ended by      {last.finish_reason}{'' if last.stop is None else f' {last.stop!r}'}\n"
        f"computed by   {model.ops.name}, {model.ops.dtype}",
        error=True,
    )
