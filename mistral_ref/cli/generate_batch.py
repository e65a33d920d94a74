"""mistral-ref generate --batch: continue every line of a file."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from mistral_ref.cli.common import progress_bar, read_text
from mistral_ref.cli.output import say
from mistral_ref.cli.sampling_options import sampling_settings
from mistral_ref.errors import InputError
from mistral_ref.generation import Token
from mistral_ref.model import Model
from mistral_ref.stops import Stop

_AT_ONCE = 8  # texts in a pass
_OTHERS = ("prompt", "ids", "system", "prompt_cache", "stats", "draft", "draft_sampling", "mark_accepted")


def add_batch_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for a file of prompts."""
    parser.add_argument(
        "--batch",
        metavar="FILE",
        help="continue every line of a file (- is standard input) as a prompt of its own, and print a line of JSON for "
        'each, in the order of the file: "prompt", "text", "tokens" (how many) and "finish_reason"; with '
        '--top-logprobs also "logprobs", for each token its piece and log-probability, and the likeliest tokens there. '
        "Line i has the seed --seed + i, the first line's being 0",
    )
    parser.add_argument(
        "--at-once",
        type=int,
        metavar="N",
        help="with --batch, make the next tokens of N lines together: that takes little longer than the next token of "
        f"one (default: {_AT_ONCE})",
    )


def run_batch(arguments: argparse.Namespace, model: Model, stop: Stop) -> None:
    """Print the continuation of every line of a file."""
    for name in _OTHERS:
        if getattr(arguments, name, None):
            raise InputError(f"--batch and {name.replace('_', '-')} are both given; expected one of them")
    prompts = read_text(arguments.batch).removesuffix("\n").split("\n")
    if "" in prompts:
        raise InputError(f"line {prompts.index('') + 1} of {arguments.batch} is empty; expected a prompt in every line")
    texts: list[list[Token]] = [[] for _ in prompts]
    n_printed = 0
    with progress_bar("generating", is_long=not sys.stdout.isatty()) as progress:
        rows = model.generate_batch(
            prompts,
            at_once=_AT_ONCE if arguments.at_once is None else arguments.at_once,
            max_tokens=arguments.max_tokens,
            **sampling_settings(arguments),
            stop=stop,
            top_logprobs=arguments.top_logprobs,
            max_seconds=arguments.max_seconds,
            cache_dtype=arguments.cache_dtype,
            lookup=arguments.lookup,
            progress=progress,
        )
        for row in rows:
            for number, token in enumerate(row):
                if token is not None:
                    texts[number].append(token)
            while n_printed < len(texts) and texts[n_printed] and texts[n_printed][-1].finish_reason is not None:
                say(_line(model, prompts[n_printed], texts[n_printed]))
                n_printed += 1


def _line(model: Model, prompt: str, tokens: list[Token]) -> str:
    text = "".join(token.text for token in tokens)
    said: dict[str, Any] = {"prompt": prompt, "text": text, "tokens": len(tokens)}
    said["finish_reason"] = tokens[-1].finish_reason
    if tokens[0].top_logprobs:
        said["logprobs"] = [
            {"piece": model.piece(token.id), "logprob": token.logprob}
            | {"top": [{"piece": model.piece(one), "logprob": logprob} for one, logprob in token.top_logprobs]}
            for token in tokens
        ]
    return json.dumps(said, ensure_ascii=False)
