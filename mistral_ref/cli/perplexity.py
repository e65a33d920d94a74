"""mistral-ref perplexity: measure how surprised a model is by a text."""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

from mistral_ref.cli.common import (
    add_compute_options,
    add_ids_option,
    add_model_option,
    load_model,
    progress_bar,
    read_text,
)
from mistral_ref.cli.output import say
from mistral_ref.cli.pass_options import add_dtype_option
from mistral_ref.cli.width import fitted
from mistral_ref.errors import InputError, checked_int
from mistral_ref.measure.perplexity import perplexity

_DEFAULT_CONTEXT = 512
_LONG = 4096  # a bar is shown if more tokens than this are evaluated

_DESCRIPTION = """\
Measure how surprised a model is by a text. The perplexity is exp of the mean
negative log-probability of the text's tokens. Lower is better: a model that
knows nothing has the size of its vocabulary as its perplexity.

Two perplexities can be compared only if the text, the tokenizer and the way of
scoring are the same. There are two ways. To score a token is to compute its
log-probability, given the tokens before it. N is --context.

without --stride
  The text is cut into windows of N tokens that do not overlap. The first token
  of each window is replaced by BOS. The second half of each window is scored.
  llama-perplexity scores a text in the same way, by default with the same
  context of 512. It differs in three points: it needs at least two windows, it
  leaves out a newline at the end of the file, and it keeps keys and values in
  16 bits.

--stride S
  Each window of N tokens begins S tokens after the one before it. A window
  scores the tokens that no earlier window has scored. So every token of the
  text but the first is scored. After the first window each of them has at
  least N - S tokens before it. A smaller S gives the tokens more context, so
  the perplexity falls. But it takes more time: the text goes through the model
  N/S times. N/2 is a usual stride. If S is N, windows do not overlap, and the
  first token of each window is not scored.
  Hugging Face's recipe for perplexity has the same windows. But in its
  mean it counts one token too few for each window that overlaps the one before.

Bits per byte can be compared between tokenizers too. They are printed if all
of the text is scored: with a stride less than N and without --max-tokens.
"""
_EXAMPLES = """\
examples:
  mistral-ref generate --seed 5 --max-tokens 300 "Once upon a time" | mistral-ref perplexity --context 64
  mistral-ref generate --seed 5 --max-tokens 300 "Once upon a time" | mistral-ref perplexity --stride 32 --context 64
  # in the same way as llama-perplexity -f wiki.test.raw
  mistral-ref perplexity --model DIR wiki.test.raw
  mistral-ref perplexity --model DIR --context 2048 --stride 1024 --json wiki.test.raw
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "perplexity",
        help="measure how surprised a model is by a text",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "file", nargs="?", default="-", metavar="FILE", help="a file with UTF-8 text (default: standard input)"
    )
    add_ids_option(parser)
    add_model_option(parser)
    parser.add_argument(
        "--context",
        type=int,
        metavar="N",
        help=f"number of tokens in a window (default: {_DEFAULT_CONTEXT}, or the model's max_seq_len if that is less)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="S",
        help="number of tokens from the beginning of a window to the beginning of the next one (default: windows do "
        "not overlap, as described above)",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="score only the first N tokens of the text (default: all)"
    )
    add_compute_options(parser)
    add_dtype_option(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the perplexity of a text."""
    if arguments.ids is not None and arguments.file != "-":
        raise InputError("a file and --ids are both given; expected one of them")
    text = None if arguments.ids else read_text(arguments.file)
    model = load_model(arguments)
    if text is None:
        ids = arguments.ids
    elif model.tokenizer is None:
        raise InputError(f"{arguments.model}: holds no tokenizer; expected the token ids of the text, by --ids")
    else:
        ids = model.tokenizer.encode(text, added=True)
    is_whole = True
    if arguments.max_tokens is not None:
        n_most = checked_int("--max-tokens", arguments.max_tokens, least=2)
        ids, is_whole = ids[:n_most], len(ids) <= n_most
    context, stride = arguments.context, arguments.stride
    if context is None:
        context = min(_DEFAULT_CONTEXT, model.config.max_seq_len or _DEFAULT_CONTEXT)
    is_long = len(ids) * context > _LONG * (stride or context)
    with progress_bar("scoring", is_long=is_long) as progress:
        started = time.perf_counter()
        found = perplexity(model, ids, context=context, stride=stride, progress=progress)
        seconds = time.perf_counter() - started
    is_all_scored = is_whole and found.n_scored == len(ids) - 1
    figures: dict[str, Any] = {
        "method": "halves" if stride is None else "strided",
        "context": context,
        "stride": stride,
        "tokens": len(ids),
        "tokens_scored": found.n_scored,
        "tokens_evaluated": found.n_evaluated,
        "perplexity": found.perplexity,
        "perplexity_error": found.error,
        "nats_per_token": found.nll,
        "nats_per_token_error": found.nll_error,
        "bits_per_byte": found.bits_per_byte(len(text.encode())) if is_all_scored and text is not None else None,
        "seconds": seconds,
        "tokens_per_second": found.n_evaluated / seconds,
        "backend": model.ops.name,
        "dtype": str(model.ops.dtype),
        "threads": model.ops.threads,
    }
    say(as_json(figures) if arguments.json else fitted(as_rows(figures)))


def as_json(figures: dict[str, Any]) -> str:
    """Return the figures as one JSON object; NaN and infinity become null."""
    is_number = {name: not isinstance(value, float) or math.isfinite(value) for name, value in figures.items()}
    return json.dumps({name: value if is_number[name] else None for name, value in figures.items()}, allow_nan=False)


def as_rows(figures: dict[str, Any]) -> str:
    """Return the figures as lines to be read."""
    method = "pieces of {context} tokens, the second half of each scored, as llama-perplexity does"
    if figures["method"] == "strided":
        method = "windows of {context} tokens, {stride} apart, each token scored once, as in Hugging Face's recipe"
    rows = {
        "method": method,
        "tokens": "{tokens:,} in the text, {tokens_scored:,} scored",
        "perplexity": "{perplexity:.6g} ± {perplexity_error:.2g}",
        "nats per token": "{nats_per_token:.6g} ± {nats_per_token_error:.2g}",
        "bits per byte": "{bits_per_byte:.6g}",
        "speed": "{tokens_per_second:,.1f} tokens/s, {tokens_evaluated:,} evaluated in {seconds:.3f} s",
        "computed by": "{backend}, {dtype}",
    }
    if figures["bits_per_byte"] is None:
        del rows["bits per byte"]
    if figures["threads"] is not None:
        rows["computed by"] += ", {threads} thread" + "s" * (figures["threads"] > 1)
    return "\n".join(f"{name:<16}{row.format(**figures)}" for name, row in rows.items())
