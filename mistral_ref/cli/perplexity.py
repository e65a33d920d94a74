"""mistral-ref perplexity: measure how surprised a model is by a text."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
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
from mistral_ref.cli.width import fitted, terminal_width
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int, escaped
from mistral_ref.files.paths import local_path
from mistral_ref.measure.perplexity import Perplexity, joined, perplexities
from mistral_ref.model import Model

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

Several files have a row each, and a last row for all of them together, in which
each scored token counts once. No window reaches from a file into the next one.
"""
_EXAMPLES = """\
examples:
  mistral-ref generate --seed 5 --max-tokens 300 "Once upon a time" | mistral-ref perplexity --context 64
  mistral-ref generate --seed 5 --max-tokens 300 "Once upon a time" | mistral-ref perplexity --stride 32 --context 64
  # in the same way as llama-perplexity -f wiki.test.raw
  mistral-ref perplexity --model DIR wiki.test.raw
  mistral-ref perplexity --model DIR --context 2048 --stride 1024 --json wiki.test.raw
  mistral-ref perplexity --model DIR --stride 256 chapter-1.txt chapter-2.txt letters/
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
        "files",
        nargs="*",
        default=["-"],
        metavar="FILE",
        help="files with UTF-8 text, and directories, of which every file is taken (default: standard input)",
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
        "--max-tokens", type=int, metavar="N", help="score only the first N tokens of each text (default: all)"
    )
    add_compute_options(parser)
    add_dtype_option(parser)
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the perplexity of a text, or of several."""
    if arguments.ids is not None and arguments.files != ["-"]:
        raise InputError("a file and --ids are both given; expected one of them")
    texts = {} if arguments.ids else read_texts(arguments.files)
    model = load_model(arguments)
    whole = ids_of(model, texts, str(arguments.model)) if texts else {"": arguments.ids}
    n_most = None if arguments.max_tokens is None else checked_int("--max-tokens", arguments.max_tokens, least=2)
    taken = {name: ids[:n_most] for name, ids in whole.items()}
    context, stride = arguments.context, arguments.stride
    if context is None:
        context = min(_DEFAULT_CONTEXT, model.config.max_seq_len or _DEFAULT_CONTEXT)
    is_long = sum(map(len, taken.values())) * context > _LONG * (stride or context)
    with progress_bar("scoring", is_long=is_long) as progress:
        started = time.perf_counter()
        found = perplexities(model, taken, context=context, stride=stride, progress=progress)
        seconds = time.perf_counter() - started
    n_bytes = {name: len(text.encode()) for name, text in texts.items() if found[name].n_scored == len(whole[name]) - 1}
    rows = [figures_of(found[name], len(ids), n_bytes.get(name)) for name, ids in taken.items()]
    all_bytes = sum(n_bytes.values()) if len(n_bytes) == len(taken) else None
    total = figures_of(joined(found.values()), sum(map(len, taken.values())), all_bytes)
    figures: dict[str, Any] = {
        "method": "halves" if stride is None else "strided",
        "context": context,
        "stride": stride,
        **total,
        "seconds": seconds,
        "tokens_per_second": total["tokens_evaluated"] / seconds,
        "backend": model.ops.name,
        "dtype": str(model.ops.dtype),
        "threads": model.ops.threads,
    }
    if len(rows) > 1:
        figures["files"] = [{"file": name, **row} for name, row in zip(taken, rows, strict=True)]
    say(as_json(figures) if arguments.json else fitted(as_rows(figures)))


def ids_of(model: Model, texts: Mapping[str, str], name: str) -> dict[str, list[int]]:
    """Return the token ids of each text; `name` is that of the model."""
    if model.tokenizer is None:
        raise InputError(f"{name}: holds no tokenizer; expected the token ids of the text, by --ids")
    return {file: model.tokenizer.encode(text, added=True) for file, text in texts.items()}


def figures_of(found: Perplexity, n_tokens: int, n_bytes: int | None) -> dict[str, Any]:
    """Return the figures of one text, or of all together; `n_bytes` is None unless all of the text was scored."""
    return {
        "tokens": n_tokens,
        "tokens_scored": found.n_scored,
        "tokens_evaluated": found.n_evaluated,
        "perplexity": found.perplexity,
        "perplexity_error": found.error,
        "nats_per_token": found.nll,
        "nats_per_token_error": found.nll_error,
        "bits_per_byte": None if n_bytes is None else found.bits_per_byte(n_bytes),
    }


def read_texts(names: Sequence[str]) -> dict[str, str]:
    """Return the text of each file, and of each file in a directory, by its name."""
    found: dict[str, str] = {}
    for name in names:
        folder = local_path(name)
        if name != "-" and os.path.isdir(folder):
            files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
            if not files:
                raise InputError(f"{name}: holds no file; expected a directory of texts")
            found |= {str(path): read_text(str(path)) for path in files}
        else:
            found[name] = read_text(name)
    return found


def as_json(figures: Any) -> str:
    """Return the figures as one JSON object; NaN and infinity become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: finite(part) for name, part in value.items()}
        if isinstance(value, list):
            return [finite(part) for part in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(figures), allow_nan=False)


def as_table(figures: dict[str, Any]) -> str:
    """Return a table with a row for each file, and a last one for all."""
    columns = {
        "tokens": "{tokens:,}",
        "scored": "{tokens_scored:,}",
        "perplexity": "{perplexity:.6g} ± {perplexity_error:.2g}",
        "nats per token": "{nats_per_token:.6g}",
        "bits per byte": "{bits_per_byte:.6g}",
    }
    if figures["bits_per_byte"] is None:
        del columns["bits per byte"]
    named = [*((escaped(one["file"]), one) for one in figures["files"]), ("all", figures)]
    rows = [[name, *(cell.format(**one) for cell in columns.values())] for name, one in named]
    return markdown_table(["file", *columns], rows, terminal_width())


def as_rows(figures: dict[str, Any]) -> str:
    """Return the figures as lines to be read, of several files below a table."""
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
    table = ""
    if "files" in figures:
        table = f"{as_table(figures)}\n\n"
        rows = {name: row for name, row in rows.items() if name in ("method", "speed", "computed by")}
    return table + "\n".join(f"{name:<16}{row.format(**figures)}" for name, row in rows.items())
