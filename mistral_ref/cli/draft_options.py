"""Options of the commands that generate text: what drafts tokens, and how that is shown."""

from __future__ import annotations

import argparse
from typing import Any

from mistral_ref.cli.common import load_model, model_directory
from mistral_ref.errors import InputError
from mistral_ref.generation import Generation


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what drafts tokens."""
    drafts = parser.add_argument_group(
        "drafts", "Several tokens are drafted, and verified in one pass.\nThe text stays the same, and may come sooner."
    )
    source = drafts.add_mutually_exclusive_group()
    source.add_argument(
        "--lookup",
        action="store_true",
        help="draft what followed the newest tokens where they stand earlier in prompt and text: for texts that quote "
        "or change their prompt",
    )
    source.add_argument(
        "--draft",
        metavar="MODEL",
        type=model_directory,
        help="draft with this model, a smaller one with the same vocabulary (named as in --model)",
    )
    drafts.add_argument(
        "--draft-sampling",
        action="store_true",
        help="the draft draws its tokens: at high temperatures more are accepted, and --seed gives another text",
    )
    drafts.add_argument("--mark-accepted", action="store_true", help="underline accepted tokens, on a terminal")


def draft_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of `Model.generate` that the options say; a draft model is loaded."""
    if arguments.draft_sampling and arguments.draft is None:
        raise InputError("--draft-sampling needs a draft model: --draft MODEL")
    settings = {"lookup": arguments.lookup, "draft_sampling": arguments.draft_sampling}
    if arguments.draft is not None:
        # Computed as the model is, but from its own weights as they are.
        own = {"model": arguments.draft, "quantize": None, "window": None}
        settings["draft"] = load_model(argparse.Namespace(**vars(arguments) | own))
    return settings


def draft_statistics(tokens: Generation) -> str:
    """Return how many drafted tokens were accepted, in words; "" if none was drafted."""
    return f"{tokens.accepted} of {tokens.drafted} drafted tokens accepted" if tokens.drafted else ""
