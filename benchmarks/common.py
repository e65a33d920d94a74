"""What the scripts in this folder share: notices on standard error, and how a user's mistake ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from mistral_ref.errors import MistralRefError


def notice(text: str) -> None:
    """Show what is going on, on standard error."""
    print(text, file=sys.stderr, flush=True)


def parser_for(description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help shows the script's own docstring, and examples."""
    return argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def finish(measure: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Run a script's work and return its exit status: 2 after one line for a user's mistake."""
    try:
        measure(arguments)
    except MistralRefError as error:
        notice(f"{Path(sys.argv[0]).name}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
