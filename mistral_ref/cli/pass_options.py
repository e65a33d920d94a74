"""Options of the commands that look into a pass: --last, --dtype and --broken."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_ref.cache import DEFAULT_CHUNK, KVCache
from mistral_ref.cli.common import progress_bar
from mistral_ref.cli.output import say
from mistral_ref.cli.width import terminal_width, wrapped
from mistral_ref.errors import checked_int, short_repr
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.study.broken import BUGS, broken


def add_last_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that puts the beginning of the text into a cache first."""
    parser.add_argument(
        "--last",
        type=int,
        metavar="K",
        help="look at a pass of only the last K tokens; the tokens before them go into a cache first, K at a time "
        "(default: one pass of all tokens)",
    )


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that chooses the precision."""
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64"],
        default="float32",
        help="the dtype of all activations; float64 gives reference values and needs NumPy (default: %(default)s)",
    )


class NameAction(argparse.Action):
    """Stores one of several names. "list" prints all of them and ends the program, as --help does.

    names   each name with what it means
    """

    def __init__(self, *, names: Mapping[str, str], **how: Any) -> None:
        super().__init__(**how)
        self._names = names

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: object) -> None:
        if values == "list":
            column, width = max(map(len, self._names)) + 2, terminal_width() or 80
            say("\n".join(wrapped(f"{name:<{column}}{meaning}", width) for name, meaning in self._names.items()))
            parser.exit()
        if values not in self._names:
            expected = f"expected one of {', '.join(self._names)}"
            raise argparse.ArgumentError(self, f"{short_repr(values)} is no {str(self.metavar).lower()}; {expected}")
        setattr(namespace, self.dest, values)


def add_broken_option(parser: argparse.ArgumentParser, which: str) -> None:
    """Add the option that plants a bug, or lists the bugs."""
    parser.add_argument(
        "--broken",
        metavar="BUG",
        action=NameAction,
        names={name: bug.sentence for name, bug in BUGS.items()},
        help=f"plant a bug in {which} to see what it does; NumPy computes the values then. `--broken list` lists the "
        f"{len(BUGS)} bugs",
    )


def maybe_broken(model: Model, bug: str | None) -> Model:
    """Return the model itself, or the model with this bug."""
    return model if bug is None else broken(model, bug)


def model_title(arguments: argparse.Namespace) -> str:
    """Return the name of the model that the options choose, for the title of a page."""
    return "the demonstration model" if arguments.model == DEMO_MODEL else Path(arguments.model).resolve().name


def split_prompt(
    model: Model, prompt: Prompt, last: int | None, cache_dtype: str | None = None
) -> tuple[list[int], KVCache | None]:
    """Return the tokens of the pass to look at, and a cache with the tokens before them.

    Without `last` it is a pass of all tokens; without `cache_dtype`, too, there is no cache.
    """
    ids = model.token_ids(prompt)
    if last is None and cache_dtype is None:
        return ids, None
    last = len(ids) if last is None else checked_int("--last", last, least=1, most=len(ids))
    before, cache = ids[:-last], model.new_cache(chunk=last, dtype=cache_dtype)
    with progress_bar("reading what comes before", is_long=len(before) > DEFAULT_CHUNK) as progress:
        for start in range(0, len(before), last):
            model.forward(before[start : start + last], cache, last_only=True)
            if progress:
                progress(start, len(before))
    return ids[-last:], cache
