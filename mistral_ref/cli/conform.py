"""mistral-ref conform: write the conformance kit, and check what another engine computed of it."""

from __future__ import annotations

import argparse

from mistral_ref.cli.common import progress_bar
from mistral_ref.cli.output import say
from mistral_ref.cli.width import fitted
from mistral_ref.errors import InputError, escaped, size
from mistral_ref.files.whole_file import whole_file

_DESCRIPTION = """\
Prove that an engine of the Mistral transformer computes what it should.

  make KIT          write tiny random models of every kind, in Mistral's layout,
                    in Hugging Face's and as GGUF files, and texts of token ids
  check KIT DUMPS   read what an engine computed of these texts, and say of
                    each model whether it agrees; and if it does not, where it
                    departs first and which known bug would explain it

DUMPS is a directory of files MODEL-TEXT.safetensors, such as
nemo-short.safetensors. A file holds the logits, and as many more steps as the
engine can give. docs/conformance.md has the rules and scripts to copy.

The exit status of check is 0 if all dumps agree, 1 if one departs, and 2 for a
mistake in the arguments or in the files.
"""
_EXAMPLES = """\
examples:
  mistral-ref conform make kit
  mistral-ref conform check kit dumps
  mistral-ref conform check kit dumps --rope-row-order halves --html report.html
  mistral-ref conform check kit dumps --json > report.json
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "conform",
        help="prove that another engine computes the same",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument("action", choices=["make", "check"], help="make writes the kit, check reads dumps")
    parser.add_argument("kit", metavar="KIT", help="the kit's directory; for make it must not exist yet")
    parser.add_argument("dumps", metavar="DUMPS", nargs="?", help="for check: the directory of the dumps")
    parser.add_argument(
        "--rope-row-order",
        choices=["interleaved", "halves"],
        help="which numbers of a head RoPE turns together, for dumps that do not record it: halves if they are half a "
        "head apart, as in Hugging Face's layout; interleaved if they are neighbours (default: interleaved)",
    )
    parser.add_argument(
        "--float32",
        action="store_true",
        help="for check: the engine computes in float32, so what 16 bits could round is a departure too",
    )
    parser.add_argument("--json", action="store_true", help="for check: print the verdicts as JSON")
    parser.add_argument("--html", metavar="FILE", help="for check: also write the verdicts as a page")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write a kit, or print the verdicts; set the exit status to 1 if a model departs."""
    if arguments.action == "check":
        _check(arguments)
        return
    given = {
        "DUMPS": arguments.dumps,
        "--rope-row-order": arguments.rope_row_order,
        "--float32": arguments.float32 or None,
        "--json": arguments.json or None,
        "--html": arguments.html,
    }
    if found := [name for name, value in given.items() if value is not None]:
        raise InputError(f"{found[0]} is for conform check; expected conform make KIT")
    _make(arguments.kit)


def _make(directory: str) -> None:
    from mistral_ref.study.conform.kit import make_kit  # noqa: PLC0415 (no other command needs it)

    with progress_bar("making the kit", is_long=True) as progress:
        kit = make_kit(directory, progress=progress)
    n_bytes = sum(file.stat().st_size for file in kit.directory.rglob("*") if file.is_file())
    say(f"{escaped(str(kit.directory))}: {len(kit.cases)} models, {size(n_bytes)}; its README.md says how to use it")


def _check(arguments: argparse.Namespace) -> None:
    from mistral_ref.study.conform import report  # noqa: PLC0415 (no other command needs them)
    from mistral_ref.study.conform.check import check  # noqa: PLC0415
    from mistral_ref.study.conform.kit import open_kit  # noqa: PLC0415

    if arguments.dumps is None:
        raise InputError("DUMPS is missing; expected conform check KIT DUMPS")
    kit = open_kit(arguments.kit)
    with progress_bar("checking", is_long=True) as progress:
        verdicts = check(
            kit,
            arguments.dumps,
            rope_row_order=arguments.rope_row_order,
            float32=arguments.float32,
            progress=progress,
        )
    arguments.status = 1 if any(verdict.outcome == "departs" for verdict in verdicts) else 0
    if arguments.html is not None:
        with whole_file(arguments.html, InputError) as file:
            file.write(report.as_page(verdicts).encode())
    say(report.as_json(verdicts) if arguments.json else fitted(report.as_text(verdicts)))
