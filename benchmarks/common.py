"""What the scripts in this folder share: their options, models and caches made in memory, candidates, files, figures.

Weights and keys are random; speed does not ask what they say. Figures need matplotlib, which is imported when one is
asked for, and that is checked before anything is measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from mistral_ref.cache import KVCache
from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError, MistralRefError
from mistral_ref.files.build_weights import build_weights
from mistral_ref.files.checkpoint import Checkpoint
from mistral_ref.files.paths import local_path
from mistral_ref.files.tensor_file import Tensor
from mistral_ref.host import available_memory
from mistral_ref.measure.benchmark import Candidate, Limit, Measurement, spread, write_json
from mistral_ref.measure.machine import cache_bytes
from mistral_ref.measure.shapes import SHAPES
from mistral_ref.measure.speed import CHUNK, SpeedTest, work_of
from mistral_ref.measure.synthetic import checkpoint_bytes, plan, plan_metadata
from mistral_ref.model import Model
from mistral_ref.weights import Kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def notice(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr, flush=True)


def status(text: str = "") -> None:
    """Show what is going on in the last line of a terminal, in place of what it was before; without a text, nothing.

    Nothing is shown where standard error is no terminal.
    """
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)


def parser_for(description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help shows the script's own docstring, and examples."""
    return argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_slice_options(parser: argparse.ArgumentParser, layers: int = 2) -> None:
    """Add the options that say which layers of which shape."""
    parser.add_argument("--shape", default="mistral-7b", help=f"{', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=layers, metavar="N", help="of that shape (default: %(default)s)")
    add_kind_option(parser)


def add_kind_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the kind of weights."""
    parser.add_argument(
        "--dtype", dest="kind", choices=get_args(Kind), default="bf16", help="of the weights (default: %(default)s)"
    )


def add_threads_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the number of threads."""
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each performance core")


def add_timing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `benchmark.alternate`."""
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="samples of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.1, metavar="S", help="of a sample, at least (%(default)s)")


def add_output_options(parser: argparse.ArgumentParser, quick: str, figure: str) -> None:
    """Add --quick, and the files that a script writes; the texts say what is less then, and what is drawn."""
    parser.add_argument("--quick", action="store_true", help=f"{quick}: a minute at most, once kernels are compiled")
    parser.add_argument("--json", metavar="FILE", help="write the machine and every sample there")
    parser.add_argument("--figure", metavar="FILE", help=f"draw {figure}: .svg, .png or .pdf (needs the extra plots)")


def _show_warning(message: Warning | str, *_: object) -> None:
    status()
    notice(f"note: {message}")


def finish(measure: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Run a script's work and return its exit status: 2 after one line for a user's mistake."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        for path in (getattr(arguments, "json", None), getattr(arguments, "figure", None)):
            if path and not os.path.isdir(local_path(path).parent):
                raise InputError(f"{path}: cannot be written: no such folder")
        if getattr(arguments, "figure", None):
            _require_figures(arguments.figure)
        measure(arguments)
    except MistralRefError as error:
        status()
        notice(f"{Path(sys.argv[0]).name}: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _require_figures(path: str) -> None:
    """Raise InputError if there is no matplotlib, or if it does not write files of such a name."""
    from mistral_ref.study.drawing import Figure  # noqa: PLC0415

    known = Figure().canvas.get_supported_filetypes()
    if Path(path).suffix.removeprefix(".").lower() not in known:
        raise InputError(f"{path}: not a name for a figure; expected one that ends in .svg, .png or .pdf")


def write_files(arguments: argparse.Namespace, content: Mapping[str, Any], draw: Callable[[], Axes]) -> None:
    """Write the JSON file and the figure, if they were asked for."""
    if arguments.json:
        write_json(arguments.json, content)
    if arguments.figure:
        save_figure(arguments.figure, draw)


def save_figure(path: str, draw: Callable[[], Axes]) -> None:
    """Save the figure of the axes that `draw` returns, drawn in the style of mistral_ref.study.plots."""
    from mistral_ref.study.drawing import SMALL, styled  # noqa: PLC0415 (imports matplotlib)

    figure = styled(draw)().get_figure()
    for ax in figure.axes:
        ax.tick_params(which="both", labelsize=SMALL)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def rows_with_ranges(panels: Mapping[str, Mapping[str, Sequence[float]]], heading: str, unit: str) -> Axes:
    """Draw the median and the range of the samples of each name, a row each, in a panel for each group of names."""
    from mistral_ref.study.drawing import BLUE, Figure, title  # noqa: PLC0415

    sizes = [len(rows) for rows in panels.values()]
    figure = Figure((7.2, 0.8 + sum(0.7 + 0.2 * size for size in sizes)), layout="constrained")
    every = figure.subplots(len(panels), squeeze=False, height_ratios=[2 + size for size in sizes])[:, 0]
    for ax, (group, rows) in zip(every, panels.items(), strict=True):
        middle, low, high = np.array([spread(samples) for samples in rows.values()]).T
        ax.errorbar(middle, range(len(rows)), xerr=(middle - low, high - middle), fmt="o", color=BLUE, ms=4)
        ax.set_yticks(range(len(rows)), list(rows))
        ax.set(xlabel=f"{group}: {unit}")
        ax.set_xlim(left=0)
        ax.set_ylim(len(rows) - 0.4, -0.6)  # the first row on top
        ax.grid(axis="y", alpha=0.3)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    title(every[0], heading)
    return every[0]


def whiskers(ax: Axes, x: Sequence[float], samples: Sequence[Sequence[float]], **style: Any) -> Any:
    """Draw the median of each group of samples with its range, joined by a line; return its handle for a legend."""
    middle, low, high = np.array([spread(group) for group in samples]).T
    return ax.errorbar(x, middle, (middle - low, high - middle), capsize=2, elinewidth=0.8, ms=4, **style)


def buffer_bytes() -> int:
    """Return how many bytes are more than any cache of this machine holds: 256 MiB, or four of the largest."""
    return max(2**28, 4 * cache_bytes())


def require_memory(config: ModelConfig, kind: Kind) -> None:
    """Raise InputError if memory has no room for a model's weights."""
    n_bytes, available = checkpoint_bytes(config, kind), available_memory()
    if available is not None and n_bytes > available:
        raise InputError(
            f"{config.n_layers} layers of dim {config.dim} take {n_bytes / 2**30:.1f} GiB, "
            f"but {available / 2**30:.1f} GiB of memory are left; expected fewer layers"
        )


def random_model(config: ModelConfig, kind: Kind, ops: CompiledOps) -> Model:
    """Return a model with the weights that `synthetic.make_checkpoint` writes, in memory.

    Raises InputError if they take more than there is.
    """
    require_memory(config, kind)
    where, tensors = Path("memory"), {}
    all_planned = plan(config, kind, seed=0)
    for planned in all_planned:
        buffer = np.empty(planned.spec.nbytes + 64, np.uint8)
        start = -buffer.ctypes.data % 64  # as in the file: where vectors like it
        raw, done = buffer[start : start + planned.spec.nbytes], 0
        for piece in planned.pieces():
            raw[done : done + piece.nbytes] = np.ascontiguousarray(piece).view(np.uint8).reshape(-1)
            done += piece.nbytes
        tensors[planned.name] = Tensor(where, planned.name, planned.dtype, planned.shape, raw)
    checkpoint = Checkpoint(where, (), tensors, "interleaved", (), plan_metadata(all_planned, kind))
    return Model(config, build_weights(checkpoint, config), ops)


def filled_cache(
    config: ModelConfig, ops: CompiledOps, depth: int, n_new: int = 1, dtype: str | None = None
) -> KVCache:
    """Return a cache of `depth` random keys and values, the same in every layer, with room for `n_new` more.

    They are written as passes write theirs, so the rings are as a prompt of that length would have left them.
    """
    cache = KVCache(config, ops, chunk=max(n_new, CHUNK), max_tokens=depth + n_new, dtype=dtype)
    rng = np.random.default_rng(3)
    for start in range(0, depth, cache.chunk):
        n_tokens = min(cache.chunk, depth - start)
        written = cache.begin(n_tokens)
        k_TGK, v_TGK = rng.standard_normal((2, n_tokens, config.n_kv_heads, config.head_dim), np.float32)
        for layer in range(config.n_layers):
            written.write(layer, k_TGK, v_TGK)
        cache.commit(written, np.zeros(n_tokens, np.int64))
    return cache


def decoding(name: str, model: Model, read: Limit, depth: int = 0) -> Candidate:
    """Return a candidate that takes one token after `depth` others, again and again; its work is GB read."""
    cache = filled_cache(model.config, model.ops, depth)
    _, n_bytes = work_of(model, SpeedTest(0, 1, depth), cache.dtype)

    def run() -> None:
        model.forward([0], cache, last_only=True)
        cache.truncate(depth)

    return Candidate(name, run, n_bytes / 1e9, read)


def prompting(name: str, model: Model, peak: Limit, n_tokens: int) -> Candidate:
    """Return a candidate that takes a prompt of n tokens and gives the logits of the last; its work is GFLOP."""
    flops, _ = work_of(model, SpeedTest(n_tokens, 0, 0), model.ops.dtype.name)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, n_tokens)

    def run() -> None:
        model.forward(ids, model.new_cache(max_tokens=n_tokens, chunk=CHUNK), last_only=True)

    return Candidate(name, run, flops / 1e9, peak)


def percent_cells(measured: Measurement) -> tuple[str, str]:
    """Return the share of the limit in percent, and its range, as two cells of a table."""
    return spread([100 * share for share in measured.shares]).text(0)
