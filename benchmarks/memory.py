"""What memory a model takes: fresh processes that load it, and go on to a token, a prompt and a full cache.

A process each for keys and values in float32, float16 and int8.
After each stage it looks at what the system says of it:

  resident at most    most memory that was ever its own or of a file that it had mapped, up to here
  anonymous           what is of no file now: this is what the model needs besides its weights, which are mapped, and
                      which the system can drop and read again

"of it cache" is what cache.bytes_for says of keys and values; "before" is what Python and the compiled kernels take.
Kernels are loaded, never compiled: where a process had to compile, it is started again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numba.core.event
from common import finish, notice, parser_for, status

import mistral_ref
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int
from mistral_ref.host import chosen_threads, process_memory
from mistral_ref.measure.machine import machine, machine_lines, work_folder
from mistral_ref.measure.shapes import shape
from mistral_ref.measure.speed import CHUNK
from mistral_ref.measure.synthetic import checkpoint_folder, make_checkpoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """\
examples:
  python benchmarks/memory.py                                 two layers of Mistral 7B: 1.3 GiB on disk
  python benchmarks/memory.py --layers 8 --figure memory.svg
  python benchmarks/memory.py --quick --shape stories-110m    keys and values in float32 alone
"""

HEADINGS = ["cache", "after", "resident at most MiB", "anonymous MiB", "of it cache MiB", "file MiB"]
Observed = dict[str, Any]  # stage, peak_resident, anonymous, cache_bytes


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    common.add_slice_options(parser)
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=4096, metavar="N", help="tokens in the cache (%(default)s)")
    parser.add_argument("--work-dir", metavar="DIR", help="for weights (default: in the user's cache folder)")
    common.add_threads_option(parser)
    common.add_output_options(parser, "keys and values in float32 alone", "anonymous and resident memory")
    parser.add_argument("--child", metavar="DTYPE", help=argparse.SUPPRESS)  # of the cache
    return parser.parse_args()


def stages(directory: Path, arguments: argparse.Namespace, dtype: str) -> Iterator[tuple[str, int]]:
    """Do one thing after the other; yield what has been done, and the bytes that keys and values take by then."""
    yield "before", 0
    model = mistral_ref.load(directory, threads=arguments.threads)
    yield "load", 0
    cache = model.new_cache(dtype=dtype)
    model.forward([0], cache, last_only=True)
    yield "1 token", cache.bytes_for(1)
    cache = model.new_cache(max_tokens=arguments.prompt, dtype=dtype)
    model.forward([0] * arguments.prompt, cache, last_only=True)
    yield f"prompt of {arguments.prompt}", cache.bytes_for(arguments.prompt)
    cache = common.filled_cache(model.config, model.ops, arguments.depth, dtype=dtype)
    model.forward([0], cache, last_only=True)
    yield f"{arguments.depth} tokens", cache.bytes_for(arguments.depth + 1)


def observe(directory: Path, arguments: argparse.Namespace) -> None:
    """Print as JSON what memory this process has after each stage, and how often it has compiled."""
    found = []
    with numba.core.event.install_recorder("numba:compile") as compiled:
        for stage, cache_bytes in stages(directory, arguments, arguments.child):
            found.append({"stage": stage, "cache_bytes": cache_bytes, **process_memory(os.getpid())})
    print(json.dumps({"stages": found, "compiled": len(compiled.buffer)}))


def in_fresh_process(arguments: argparse.Namespace, dtype: str) -> list[Observed]:
    """Return what a process of its own observes, one that had nothing to compile."""
    command = [sys.executable, __file__, "--child", dtype]
    for name in ("shape", "layers", "prompt", "depth", "work_dir", "threads"):
        command += [f"--{name.replace('_', '-')}", str(getattr(arguments, name))]
    command += ["--dtype", arguments.kind]
    for _ in range(2):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise InputError(f"the process has ended with status {done.returncode}; what it said stands above")
        answer = json.loads(done.stdout)
        if not answer["compiled"]:
            break
    return answer["stages"]


def mib(n_bytes: int | None) -> str:
    """Return bytes as a cell of the table."""
    return "unknown" if n_bytes is None else f"{n_bytes / 2**20:.0f}"


def measure(arguments: argparse.Namespace) -> None:
    """Start the processes; print the table, and write the files."""
    n_threads = arguments.threads = chosen_threads(arguments.threads)
    config = shape(arguments.shape, layers=arguments.layers)
    longest = config.max_seq_len or 2**20
    checked_int("prompt", arguments.prompt, least=1, most=longest)
    checked_int("depth", arguments.depth, least=1, most=longest - 1)
    arguments.work_dir = work_folder(arguments.work_dir)
    directory = checkpoint_folder(arguments.shape, config, arguments.kind, arguments.work_dir)
    if arguments.child:
        observe(directory, arguments)
        return
    common.require_memory(config, arguments.kind)
    notice(f"weights: {directory}")
    make_checkpoint(directory, config, kind=arguments.kind)
    file_bytes = (directory / "consolidated.safetensors").stat().st_size
    about = {"shape": arguments.shape, "layers": config.n_layers, "dtype": arguments.kind, "chunk": CHUNK}
    description = machine(n_threads) | about
    print("\n".join(machine_lines(description)))
    processes = []
    for dtype in ["float32"] if arguments.quick else ["float32", "float16", "int8"]:
        status(f"a process with {dtype} in the cache")
        processes.append({"cache": dtype, "stages": in_fresh_process(arguments, dtype)})
    rows = [
        [process["cache"], found["stage"]]
        + [mib(found[name]) for name in ("peak_resident", "anonymous", "cache_bytes")]
        + [mib(file_bytes)]
        for process in processes
        for found in process["stages"]
    ]
    status()
    print(f"\n{markdown_table(HEADINGS, rows)}")
    content = {"machine": description, "file_bytes": file_bytes, "processes": processes}
    common.write_files(arguments, content, lambda: draw(processes, file_bytes))


def draw(processes: Sequence[dict[str, Any]], file_bytes: int) -> Axes:
    """Draw a bar for each stage of each process: anonymous memory, and behind it what was resident at most."""
    from mistral_ref.study.drawing import BLUE, INK, PALE_BLUE, Line2D, Patch, axes_or_new, title  # noqa: PLC0415

    bars = [(process, found) for process in processes for found in process["stages"]]
    y = [-(i + i // len(processes[0]["stages"])) for i in range(len(bars))]  # a gap between processes
    ax = axes_or_new(None, 7.6, 0.22 * len(bars) + 1.4)
    for name, color in (("peak_resident", PALE_BLUE), ("anonymous", BLUE)):
        ax.barh(y, [(found[name] or 0) / 2**20 for _, found in bars], color=color, height=0.8)
    ax.axvline(file_bytes / 2**20, color=INK, lw=0.9, ls="--")
    ax.set_yticks(y, [f"{process['cache']}: {found['stage']}" for process, found in bars])
    ax.set(xlabel="MiB")
    ax.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=BLUE, label="anonymous now"), Patch(color=PALE_BLUE, label="resident at most so far")]
    handles.append(Line2D([], [], color=INK, lw=0.9, ls="--", label="the file of weights"))
    title(ax, "Memory of a process after each stage", handles)
    return ax


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
