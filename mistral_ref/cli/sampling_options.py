"""Options of the commands that generate text: how a token is drawn."""

from __future__ import annotations

import argparse
from typing import Any

_TOP_P = 0.9


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
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


def sampling_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of `Model.generate` that the options say."""
    return {
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": (_TOP_P if arguments.temperature else 1.0) if arguments.top_p is None else arguments.top_p,
        "min_p": arguments.min_p,
        "repetition_penalty": arguments.repetition_penalty,
        "seed": arguments.seed,
    }
