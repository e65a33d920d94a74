"""mistral-ref download: fetch a model from the Hugging Face Hub."""

from __future__ import annotations

import argparse
import shlex

from mistral_ref.cli.common import progress_bar
from mistral_ref.cli.output import say
from mistral_ref.cli.width import fitted
from mistral_ref.errors import escaped, size
from mistral_ref.files.download import LAYOUTS, plan

_DESCRIPTION = """\
Fetch a model from the Hugging Face Hub: its weights in one layout, or one GGUF
file, and the small files that go with it. Pickles are never fetched. It needs
the package huggingface_hub; no other command uses the network.

Ctrl-C stops a download, and the same command goes on with it. At the end the
command that uses the model is printed.

Many repositories hold the same weights twice. Without --layout the first of
these that is there is taken:
  mistral   params.json and consolidated*.safetensors
  hf        config.json and model*.safetensors
  gguf      one GGUF file, and its shards

For a model whose licence has to be accepted, do so on its page, and log in with
`hf auth login`, a program of huggingface_hub.
"""
_EXAMPLES = """\
examples:
  mistral-ref download mistralai/Mistral-7B-Instruct-v0.3
  # the GGUF file whose name holds Q4_K_M; without --file, the choices are listed
  mistral-ref download ORG/NAME-GGUF --file Q4_K_M
  # a directory in place of the hub's cache
  mistral-ref download mistralai/Mistral-7B-v0.3 --to mistral-7b
  mistral-ref download ORG/NAME --layout hf --revision v0.2
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "download", help="fetch a model from the Hugging Face Hub", description=_DESCRIPTION, epilog=_EXAMPLES
    )
    parser.add_argument(
        "name", metavar="NAME", help="ORG/NAME, as on the model's page; ORG/NAME@REVISION and ORG/NAME/FILE.gguf, too"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help="which weights (default: the first that is there, as above)")
    parser.add_argument(
        "--file", metavar="PATTERN", help='which GGUF file: a part of its name, or a pattern such as "*-Q4_K_M.gguf"'
    )
    parser.add_argument("--revision", metavar="R", help="a branch, a tag or a commit (default: main)")
    parser.add_argument(
        "--to",
        metavar="DIR",
        help="the directory for the files (default: the hub's cache, in which all commands find a model by its name)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Fetch a model, and print the command that uses it."""
    download = plan(
        arguments.name, layout=arguments.layout, file=arguments.file, revision=arguments.revision, to=arguments.to
    )
    n_files = "1 file" if len(download.files) == 1 else f"{len(download.files)} files"
    n_there = download.n_bytes - download.n_missing
    there = f", of which {size(n_there)} are there" if n_there else ""
    say(
        fitted(
            f"{download.repository} at {escaped(download.commit[:12])}: {n_files}, "
            f"{size(download.n_bytes)}{there}: {escaped(', '.join(download.files))}"
        ),
        error=True,
    )
    with progress_bar("downloading", is_long=True) as progress:
        download.run(progress)
    say(f'mistral-ref generate --model {escaped(shlex.quote(download.source))} "Once upon a time"')
