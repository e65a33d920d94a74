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
    add_cache_option,
    add_compute_options,
    add_ids_option,
    add_model_option,
    as_text,
    load_model,
    progress_bar,
    read_prompt,
    text_of,
)
from mistral_ref.cli.draft_options import add_draft_options, draft_settings, draft_statistics
from mistral_ref.cli.generate_batch import add_batch_options, run_batch
from mistral_ref.cli.output import say, say_token
from mistral_ref.cli.prompt_cache import add_prompt_cache_option, prompt_cache
from mistral_ref.cli.sampling_options import add_sampling_options, sampling_settings
from mistral_ref.cli.width import fitted, terminal_width
from mistral_ref.conversation import Conversation
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError
from mistral_ref.generation import Token
from mistral_ref.model import Model
from mistral_ref.text import encode_chat

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
  mistral-ref generate --batch prompts.txt --temperature 0 > continued.jsonl
  cat story.txt | mistral-ref generate --model DIR --stop "The end" --stats
"""


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
    add_cache_option(parser)
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
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="take the prompt as a message of a conversation that begins with this system prompt, and print only the "
        "answer; mistral-ref chat goes on with a conversation",
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
    add_batch_options(parser)
    add_sampling_options(parser)
    add_draft_options(parser)
    add_prompt_cache_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print a prompt and its continuation."""
    started = time.perf_counter()
    model, drafts = load_model(arguments), draft_settings(arguments)
    loaded = time.perf_counter()
    stop = [unescaped(as_text(stop)) for stop in arguments.stop]
    if arguments.batch is not None:
        run_batch(arguments, model, stop)
        return
    if arguments.at_once is not None:
        raise InputError("at-once is given without --batch; expected both")
    prompt = read_prompt(arguments)
    ids = model.token_ids(prompt) if arguments.system is None else ids_of_turn(model, arguments.system, prompt)
    with prompt_cache(model, arguments.prompt_cache, arguments.cache_dtype) as kept:
        n_most = len(ids) + arguments.max_tokens - 1
        own = model.new_cache(max_tokens=n_most, dtype=arguments.cache_dtype) if kept is None else None
        with progress_bar("reading the prompt", is_long=len(ids) > DEFAULT_CHUNK) as progress:
            tokens = model.generate(
                ids,
                max_tokens=arguments.max_tokens,
                **sampling_settings(arguments),
                **drafts,
                stop=stop,
                top_logprobs=arguments.top_logprobs,
                max_seconds=arguments.max_seconds,
                progress=progress,
                cache=own,
                prompt_cache=kept,
            )
            given = [next(tokens)]  # before the prompt is printed: a bar or a notice would be in the middle of the text
        echo = prompt if isinstance(prompt, str) else text_of_ids(model, ids)
        if arguments.no_echo or arguments.system is not None:
            echo = ""
        say(echo + text_of(model, given[0]), end="")
        first_at = time.perf_counter()
        for token in tokens:
            given.append(token)
            say_token(text_of(model, token), is_marked=token.from_draft and arguments.mark_accepted)
    say()
    ended = time.perf_counter()
    if arguments.top_logprobs:
        say(table_of_tokens(model, given), error=True)
    if arguments.stats:
        print_stats(model, given[-1], len(ids), len(given), [started, loaded, first_at, ended])
        if drafted := draft_statistics(tokens):
            say(f"drafts        {drafted}", error=True)


def ids_of_turn(model: Model, system: str, prompt: str | Sequence[int]) -> list[int]:
    """Return the ids of a conversation of a system prompt and one message."""
    if model.tokenizer is None or not isinstance(prompt, str):
        raise InputError("--system needs a model with a tokenizer, and a prompt that is a text")
    begun = Conversation(model, system=as_text(system)).messages
    return encode_chat([*begun, {"role": "user", "content": prompt}], model.tokenizer)


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
