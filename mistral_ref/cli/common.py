"""Options and helpers that several commands share."""

from __future__ import annotations

import argparse

from mistral_ref.model import DEMO_MODEL


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
