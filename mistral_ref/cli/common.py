"""Options and helpers that several commands share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mistral_ref.generation import Progress
from mistral_ref.model import DEMO_MODEL, Model, load


def add_model_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that says which model to load."""
    parser.add_argument(
        "--model",
        metavar="DIR",
        default=DEMO_MODEL,
        help="directory with the weights, in Mistral's or Hugging Face's layout (default: the demonstration model)",
    )


def add_compute_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what computes."""
    parser.add_argument(
        "--backend",
        choices=["numba", "numpy"],
        default="numba",
        help="what computes: compiled kernels, or the plain mathematics (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads (default: MISTRAL_REF_THREADS, or one for each physical performance core)",
    )
    parser.add_argument(
        "--repack",
        action="store_true",
        help="copy 16-bit weights into the order that decodes fastest; takes as much memory as they do",
    )


def load_model(arguments: argparse.Namespace) -> Model:
    """Return the model that the options ask for, with a bar while its weights are repacked."""
    with progress_bar("repacking", is_long=arguments.repack) as progress:
        return load(
            arguments.model,
            backend=arguments.backend,
            threads=arguments.threads,
            repack=arguments.repack,
            progress=progress,
        )


@contextmanager
def progress_bar(description: str, *, is_long: bool) -> Iterator[Progress | None]:
    """Show a bar on a terminal's standard error while something long goes on; give what moves it, or None."""
    if not is_long or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    # Imported here: a tenth of a second that --help and every short prompt would otherwise wait for.
    import rich.console  # noqa: PLC0415
    import rich.progress  # noqa: PLC0415

    with rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def size(n_bytes: int) -> str:
    """Return a number of bytes in the largest unit of which there is at least one.

    >>> size(7_241_732_096 * 2)
    '13.49 GiB'
    >>> size(12)
    '12 bytes'
    """
    for unit, exponent in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if n_bytes >= 2**exponent:
            return f"{n_bytes / 2**exponent:.2f} {unit}"
    return f"{n_bytes} bytes"
