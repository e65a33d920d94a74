"""mistral-ref doctor: say what is wrong or suspicious in the files of a model."""

from __future__ import annotations

import argparse
import json
from collections import Counter

from mistral_ref.cli.common import model_directory, progress_bar
from mistral_ref.cli.output import say
from mistral_ref.cli.width import fitted
from mistral_ref.errors import escaped
from mistral_ref.measure.doctor import Finding, Report, examine

_DESCRIPTION = """\
Say what is wrong or suspicious in the files of a model, why, and what to do.
The exit status is 1 if anything is found. No pass is run.

  files           broken links, half downloads, pointers of Git LFS, indexes
  configuration   params.json against config.json, a lost window, YaRN, theta
  tokenizer       its files against each other, the model and the chat template
  layouts         the same weights in two layouts, and the order of their rows
  weights         NaN, infinities, rows of zeros, outliers, scales of fp8
  memory          with --tokens: what a text of this length takes

Every weight is read, so this takes as long as the files take to be read.
--quick leaves that out."""
_EXAMPLES = """\
examples:
  mistral-ref doctor demo
  mistral-ref doctor DIR
  mistral-ref doctor --quick --tokens 32768 NAME.gguf
  # a configuration without weights
  mistral-ref doctor config.json
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="say what is wrong in a model's files",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=model_directory,
        help="what --model of the other commands takes, or the path of a params.json or config.json alone",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        metavar="N",
        help="also check whether a text of N tokens, prompt and answer together, fits into the memory that is left",
    )
    parser.add_argument("--quick", action="store_true", help="do not read the weights")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print what is found; set the exit status to 1 if anything is."""
    with progress_bar("reading the weights", is_long=not arguments.quick) as progress:
        report = examine(arguments.model, tokens=arguments.tokens, quick=arguments.quick, progress=progress)
    arguments.status = 1 if report.findings else 0  # set before printing: `head` may close the output
    say(as_json(report) if arguments.json else fitted(as_text(report)))


def as_json(report: Report) -> str:
    """Return a report as one JSON object."""
    findings = [
        {"severity": one.severity, "file": str(one.file), "what": one.what, "why": one.why, "cure": one.cure}
        for one in report.findings
    ]
    found = {"path": str(report.path), "findings": findings}
    return json.dumps(found | {"examined": report.examined, "left_out": report.left_out})


def as_text(report: Report) -> str:
    """Return a report as lines to be read."""
    lines = [line for finding in report.findings for line in (*_lines(finding), "")]
    lines += [f"{'examined' if not n else '':<10}{escaped(one)}" for n, one in enumerate(report.examined)]
    lines += [f"{'left out' if not n else '':<10}{escaped(one)}" for n, one in enumerate(report.left_out)]
    numbers = Counter(finding.severity for finding in report.findings)
    found = ", ".join(f"{n} {severity}" for severity, n in sorted(numbers.items(), reverse=True))
    return "\n".join([*lines, f"{'found':<10}{found or 'nothing that is wrong or suspicious'}"])


def _lines(finding: Finding) -> list[str]:
    what, why, cure = (escaped(text) for text in (finding.what, finding.why, finding.cure))
    return [f"{finding.severity}: {escaped(str(finding.file))}", f"  what  {what}", f"  why   {why}", f"  cure  {cure}"]
