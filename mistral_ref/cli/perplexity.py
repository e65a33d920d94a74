"""mistral-ref perplexity: how surprised a model is by a text."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from mistral_ref.cli.common import add_compute_options, add_model_option, load_model, progress_bar
from mistral_ref.cli.pass_options import add_dtype_option
from mistral_ref.errors import InputError, checked_int, short_repr
from mistral_ref.measure.perplexity import perplexity

_DEFAULT_CONTEXT = 512
_LONG = 4096  # tokens to evaluate from which a bar is shown

_DESCRIPTION = """\
Tell how surprised a model is by a text: exp of the mean negative log-probability of its tokens. A model that knew
nothing would be at the size of its vocabulary. Figures can be compared only between models with the same tokenizer, for
the same text, and scored in the same way:

  without --stride   Pieces of N tokens side by side, the first token of each replaced by BOS; the second half of each
                     is scored. This is what llama-perplexity does, by default with the same context of 512; it asks for
                     at least two pieces, leaves a newline at the end of the file out, and keeps keys and values in
                     16 bits.
  --stride S         Windows of N tokens, each S further on, which score what none before them has: Hugging Face's
                     recipe for perplexity, whose own mean counts one token too few for each window that overlaps. All
                     tokens but the first are scored, given at least N - S before them. A smaller S gives tokens more
                     context, so that the perplexity falls, and costs N/S passes of the text; N/2 is usual. An S of N
                     costs one pass, begins each window knowing nothing, and does not score its first token.

Bits per byte, which can be compared between tokenizers too, are told where all of the text is scored: with a stride
less than N, and without --max-tokens.
"""
_EXAMPLES = """\
examples:
  mistral-ref generate --seed 5 --max-tokens 300 "Once upon a time" | mistral-ref perplexity --context 64
  mistral-ref generate --seed 5 --max-tokens 300 "Once upon a time" | mistral-ref perplexity --stride 32 --context 64
  mistral-ref perplexity --model DIR wiki.test.raw                               as llama-perplexity -f wiki.test.raw
  mistral-ref perplexity --model DIR --context 2048 --stride 1024 --json wiki.test.raw
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "perplexity",
        help="how surprised a model is by a text",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", nargs="?", default="-", metavar="FILE", help="UTF-8 text (default: standard input)")
    add_model_option(parser)
    parser.add_argument(
        "--context", type=int, metavar="N", help=f"tokens of a window (default: {_DEFAULT_CONTEXT}, or max_seq_len)"
    )
    parser.add_argument("--stride", type=int, metavar="S", help="tokens from window to window; see above")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="take only the first N tokens of the text")
    add_compute_options(parser)
    add_dtype_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the perplexity of a text."""
    text = read_text(arguments.file)
    model = load_model(arguments)
    if model.tokenizer is None:
        raise InputError(f"{arguments.model}: holds no tokenizer; a text's perplexity needs one")
    ids, is_whole = model.tokenizer.encode(text), True
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
        "bits_per_byte": found.bits_per_byte(len(text.encode())) if is_all_scored else None,
        "seconds": seconds,
        "tokens_per_second": found.n_evaluated / seconds,
        "backend": model.ops.name,
        "dtype": str(model.ops.dtype),
        "threads": model.ops.threads,
    }
    print(as_json(figures) if arguments.json else as_rows(figures))


def read_text(file: str) -> str:
    """Return the text of a file, or of standard input for "-", to the last byte."""
    name = "standard input" if file == "-" else short_repr(file)
    try:
        if file != "-":
            data = Path(file).read_bytes()
        elif sys.stdin is None or sys.stdin.isatty():
            raise InputError("no text: give a file, or the text on standard input")
        else:
            data = sys.stdin.buffer.read()
        text = data.decode()
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 text: {error.reason} at {error.start}") from None
    if not text:
        raise InputError(f"{name}: is empty; expected text")
    return text


def as_json(figures: dict[str, Any]) -> str:
    """Return the figures as one JSON object, null for what is no number."""
    is_number = {name: not isinstance(value, float) or math.isfinite(value) for name, value in figures.items()}
    return json.dumps({name: value if is_number[name] else None for name, value in figures.items()}, allow_nan=False)


def as_rows(figures: dict[str, Any]) -> str:
    """Return the figures as lines."""
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
