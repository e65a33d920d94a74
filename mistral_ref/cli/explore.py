"""mistral-ref explore: the page of a pass, live in a browser."""

from __future__ import annotations

import argparse
from contextlib import suppress

from mistral_ref.cli.common import add_compute_options, add_model_option, as_text, load_model, progress_bar
from mistral_ref.cli.output import say
from mistral_ref.cli.pass_options import NameAction, model_title
from mistral_ref.errors import InputError
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.model import Model
from mistral_ref.study.live.exercises import EXERCISES

_BEGINNING = "Once upon a time there was a little girl named Lily. She"

_EXAMPLES = """\
examples:
  mistral-ref explore
  mistral-ref explore --prompt "Tom had a red ball. One day"
  mistral-ref explore --exercise two-heads
  mistral-ref explore --model DIR --no-browser --port 8765
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "explore",
        help="type a text in the browser, and see what becomes of it",
        description="""\
Open the page of a pass in the browser, live. You type a text, and every view
shows its pass. You change steps, heads, tokens or the model itself, and see
what the next token becomes.

The page comes from a server on this machine, 127.0.0.1, which answers nobody
else and asks no network. Its address, with a secret in it, is printed. Ctrl-C
ends it.""",
        epilog=_EXAMPLES,
    )
    begins = parser.add_mutually_exclusive_group()
    begins.add_argument(
        "--prompt",
        metavar="TEXT",
        help="the text that the page begins with; for a model without a tokenizer its token ids (default: the "
        "beginning of a story)",
    )
    begins.add_argument(
        "--exercise",
        metavar="EXERCISE",
        action=NameAction,
        names={name: f"Chapter {one.chapter}. {one.task}" for name, one in EXERCISES.items()},
        help="begin with an exercise of the course, which the page checks; `--exercise list` lists the "
        f"{len(EXERCISES)} exercises. They are for the demonstration model",
    )
    add_model_option(parser)
    add_compute_options(parser)
    parser.add_argument("--port", type=int, default=0, help="the port of the server (default: one that is free)")
    parser.add_argument(
        "--no-browser", dest="browser", action="store_false", help="print the address, and open no browser"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C."""
    # Imported here: the modules of HTTP take a while, and no other command needs them.
    from mistral_ref.study.live.server import serve  # noqa: PLC0415
    from mistral_ref.study.live.session import Session  # noqa: PLC0415

    is_demo = arguments.model == DEMO_MODEL
    if arguments.exercise and not is_demo:
        raise InputError(f"--exercise {arguments.exercise} is for the demonstration model; leave out --model")
    model = load_model(arguments)
    load = "mistral_ref.load()" if is_demo else f"mistral_ref.load({str(arguments.model)!r})"
    session = Session(model, model_title(arguments), load, exercises=is_demo, exercise=arguments.exercise)
    with progress_bar("taking the first pass", is_long=True) as progress:
        session.begin(_text(arguments, model), progress or (lambda done, total: None))

    def begun(url: str) -> None:
        say(f"{url}\nCtrl-C ends it")
        if arguments.browser:
            import webbrowser  # noqa: PLC0415

            webbrowser.open(url)

    with suppress(KeyboardInterrupt):
        serve(session, begun, port=arguments.port)


def _text(arguments: argparse.Namespace, model: Model) -> str:
    if arguments.exercise:
        return EXERCISES[arguments.exercise].text
    if arguments.prompt is not None:
        return as_text(arguments.prompt)
    return _BEGINNING if model.tokenizer is not None else "1"
