"""Options and helpers that several commands share."""

from __future__ import annotations

import argparse
import codecs
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, get_args

from mistral_ref.cache import CACHE_DTYPES
from mistral_ref.cli.output import say, show_in_place
from mistral_ref.errors import InputError, short_repr
from mistral_ref.files.paths import local_path
from mistral_ref.generation import Token
from mistral_ref.loading import DEMO_MODEL, load
from mistral_ref.model import Model
from mistral_ref.quantized_matrix import BITS
from mistral_ref.rounded_inputs import Bf16Inputs, QuantizedInputs


def model_directory(name: str) -> str | Path:
    """Return the path or the name of a model: "demo" is the demonstration model, unless a directory has that name."""
    return DEMO_MODEL if name == "demo" and not os.path.isdir(name) else name


def add_model_option(
    parser: argparse.ArgumentParser, default: Path | None = DEMO_MODEL, without: str = "the demonstration model"
) -> None:
    """Add the option that says which model to load; `without` says what the command does without it."""
    parser.add_argument(
        "-m",
        "--model",
        metavar="PATH",
        type=model_directory,
        default=default,
        help="directory with the weights, in Mistral's or Hugging Face's layout, or a GGUF file, or the first of its "
        "shards, or the name of a model in the cache of the Hugging Face Hub: ORG/NAME, ORG/NAME@REVISION or "
        f"ORG/NAME/FILE.gguf (default: {without})",
    )


def add_compute_options(
    parser: argparse.ArgumentParser, backend: str | None = None, *, several_threads: bool = False
) -> None:
    """Add the options that choose how values are computed.

    backend             the default of --backend
    several_threads     --threads is a text: one number or a list
    """
    parser.add_argument(
        "--backend",
        choices=["numba", "numpy"],
        default=backend,
        help="what computes the values: numba uses compiled kernels, numpy uses the plain mathematics "
        f"(default: {backend or 'numba'})",
    )
    add_threads_option(parser, several=several_threads)
    parser.add_argument(
        "--quantize",
        type=int,
        choices=BITS,
        help="round the weights to 8 or 4 bits after loading; mistral-ref quantize writes rounded weights to a "
        "directory (default: no rounding)",
    )
    add_window_option(parser)
    add_adapter_option(parser)
    parser.add_argument(
        "--quantized-inputs",
        choices=get_args(QuantizedInputs),
        help="what inputs are rounded to before they are multiplied by weights of 8 or 4 bits: int16, int8 (faster, "
        "less exact), or float, no rounding, which needs --backend numpy (default: int16)",
    )
    parser.add_argument(
        "--bf16-inputs",
        choices=get_args(Bf16Inputs),
        default="float32",
        help="what inputs are rounded to before they are multiplied by bf16 weights: float32, no rounding, or "
        "bfloat16, less exact, and prompts twice as fast on AMD processors with AVX512_BF16 (default: %(default)s)",
    )
    add_memory_option(parser)


def add_memory_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that lets what does not fit into memory be tried."""
    parser.add_argument(
        "--no-memory-check",
        dest="check_memory",
        action="store_false",
        help="try what takes more memory than is left; without this option it is refused",
    )


def add_cache_option(parser: argparse._ActionsContainer) -> None:
    """Add the option that chooses the number format of keys and values."""
    parser.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="the type of keys and values in the cache: float16 takes half the memory of float32, int8 about a quarter "
        "(default: float32)",
    )


def add_window_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that sets the sliding window."""
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="let each token see at most the last N tokens, in every layer (default: as the files say it; GGUF files "
        "of Mistral 7B v0.1 have lost its window, 4096)",
    )


def add_adapter_option(parser: argparse.ArgumentParser, name: str = "--adapter", whose: str = "the model") -> None:
    """Add the option that gives the model, or `whose` model, adapters."""
    parser.add_argument(
        name,
        metavar="PATH[=SCALE]",
        action="append",
        type=_adapter,
        default=[],
        help=f"give {whose} a LoRA adapter of PEFT, mistral-finetune or mlx-lm: its directory, or the file with its "
        "matrices. PATH=0.5 halves what it adds. The option may be given several times",
    )


def _adapter(text: str) -> tuple[str, float]:
    path, _, scale = text.rpartition("=")
    if path and not os.path.lexists(text):
        with suppress(ValueError):
            return path, float(scale)
    return text, 1.0


def add_threads_option(parser: argparse.ArgumentParser, whose: str = "", *, several: bool = False) -> None:
    """Add the option that chooses the number of threads.

    whose       says whose threads they are, if there are several
    several     the option is a text: one number or a list
    """
    parser.add_argument(
        "-t",
        "--threads",
        type=str if several else int,
        metavar="N",
        help=f"number of threads{whose}{', or a list such as 1,2' if several else ''} (default: the environment "
        "variable MISTRAL_REF_THREADS, or one thread for each physical performance core)",
    )


def add_ids_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that gives a text as token ids."""
    parser.add_argument(
        "--ids",
        type=_token_ids,
        metavar="IDS",
        help='token ids in place of a text, such as "1,22177" or "1 22177"; no BOS is put in front of them',
    )


def _token_ids(text: str) -> list[int]:
    words = text.replace(",", " ").split()
    if not words or not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        raise argparse.ArgumentTypeError(f"{short_repr(text)} is no list of token ids, such as 1,22177")
    return [int(word) for word in words]


def given_prompt(arguments: argparse.Namespace) -> str | list[int] | None:
    """Return the text among the arguments, or the token ids of --ids; None if neither is there."""
    if arguments.prompt is None:
        return arguments.ids
    if arguments.ids is not None:
        raise InputError("a text and --ids are both given; expected one of them")
    return as_text(arguments.prompt)


def read_prompt(arguments: argparse.Namespace) -> str | list[int]:
    """Return the prompt: from the arguments, or else standard input without the newline at its end."""
    given = given_prompt(arguments)
    if given is not None:
        return given
    return read_standard_input("no prompt: give it as an argument or on standard input").removesuffix("\n")


def text_of(model: Model, token: Token) -> str:
    """Return what is printed for a generated token: its text; for a model without a tokenizer its id and a blank."""
    return f"{token.id} " if model.tokenizer is None else token.text


def read_standard_input(without: str) -> str:
    """Return the text on standard input; raise InputError with the message `without` if nothing is piped into it."""
    if sys.stdin is None or sys.stdin.isatty():
        raise InputError(without)
    return decoded(sys.stdin.buffer.read(), "standard input")


def read_text(file: str) -> str:
    """Return the whole text of a file, or of standard input if the file is "-"."""
    name = "standard input" if file == "-" else file
    if file == "-":
        text = read_standard_input("no text: give a file, or the text on standard input")
    else:
        try:
            text = decoded(local_path(file).read_bytes(), name)
        except OSError as error:
            raise InputError(f"{name}: cannot be read: {error.strerror}") from None
    if not text:
        raise InputError(f"{name}: is empty; expected text")
    return text


def decoded(data: bytes, name: str) -> str:
    r"""Return the text of a file with this name. What only belongs to how a text is stored is taken away.

    This is a byte order mark, and the \r of a last line that ends with \r\n.

    >>> decoded(b"\xef\xbb\xbfOnce upon\r\na time\r\n", "story.txt")
    'Once upon\r\na time\n'
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        is_utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        found = "it begins like UTF-16" if is_utf_16 else f"{error.reason} at {error.start}"
        raise InputError(f"{name} is not UTF-8 text: {found}") from None
    return f"{text[:-2]}\n" if text.endswith("\r\n") else text


def as_text(argument: str) -> str:
    """Return an argument as the UTF-8 text that was typed; Python may have decoded it with another locale."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise InputError(f"argument {argument!a} is not UTF-8 text") from None


def load_model(arguments: argparse.Namespace) -> Model:
    """Return the model that the options choose; show a progress bar while its weights are rounded."""
    with progress_bar("rounding weights", is_long=bool(arguments.quantize)) as progress:
        return load(
            arguments.model,
            backend=arguments.backend,
            dtype=getattr(arguments, "dtype", "float32"),
            threads=arguments.threads,
            quantize=arguments.quantize,
            window=arguments.window,
            adapters=arguments.adapter,
            quantized_inputs=arguments.quantized_inputs,
            bf16_inputs=arguments.bf16_inputs,
            check_memory=arguments.check_memory,
            progress=progress,
            on_compile=show_compiling,
        )


class Bar(Protocol):
    """A function that moves a progress bar and can change the text beside it."""

    def __call__(self, done: int, total: int, text: str = "") -> None: ...


def n_kernels(n: int) -> str:
    """Return a number of kernels in words."""
    return "1 kernel" if n == 1 else f"{n} kernels"


_bars: list[Bar] = []  # those on the terminal; the last one is in its last line


def show_compiling(done: int, total: int, kernel: str) -> None:
    """Show on standard error which kernel is compiled: beside the bar that is there, or in a line of its own.

    The line is gone when all are compiled. Without a terminal one line says how many there are.
    """
    text = f"compiling kernels (once on this machine): {done + 1} of {total}, {kernel}" if kernel else ""
    if _bars:  # only a terminal has bars
        _bars[-1](done, total, text)
    elif sys.stderr is None or not sys.stderr.isatty():
        if not done:
            say(f"mistral-ref: note: compiling {n_kernels(total)}, once on this machine", error=True)
    else:
        show_in_place(text)


@contextmanager
def progress_bar(description: str, *, is_long: bool) -> Iterator[Bar | None]:
    """Show a progress bar on standard error during a long task, and yield the function that moves it.

    Without a terminal, or if the task is not long, there is no bar, and None is yielded.
    """
    if not is_long or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    # Imported here: the import takes a tenth of a second, and --help and short prompts do not need it.
    import rich.console  # noqa: PLC0415
    import rich.progress  # noqa: PLC0415

    with rich.progress.Progress(console=rich.console.Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=None)

        def move(done: int, total: int, text: str = "") -> None:
            bar.update(task, completed=done, total=total, description=text or description)

        _bars.append(move)
        try:
            yield move
        finally:
            _bars.remove(move)
