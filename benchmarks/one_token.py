"""Where each microsecond of a token goes: the operations of one decoding pass, and what is between them.

Tokens are decoded one by one, as `generate` does, without sampling. First as they are, to know what a token takes; then
with a clock around each operation, in turn with passes without clocks. "kernel" is the time inside compiled code as the
caller meets it (the call included), "around" what the operation itself does in Python and NumPy before and after it:
checking, making arrays. "between" is the rest: the generator of steps, the cache's arithmetic, the loop.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest import mock

from common import finish, parser_for, status, write_files

import mistral_ref
from mistral_kernels import attention, elementwise, panels, products
from mistral_ref import compiled_ops
from mistral_ref.display import markdown_table
from mistral_ref.errors import checked_int
from mistral_ref.measure.benchmark import spread
from mistral_ref.measure.machine import machine, machine_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """\
examples:
  python benchmarks/one_token.py                              the demonstration model
  python benchmarks/one_token.py --model DIR --threads 1 --depth 1000
"""

OPERATIONS = ("embed", "rotation", "rms_norm", "linear", "split_heads", "rotate", "write", "_heads", "swiglu")
# Where the operations find what makes their kernels.
FACTORIES = [(products, name) for name in ("matvec", "matmul", "matvec_quantized", "matmul_quantized")]
FACTORIES += [(panels, "write"), (attention, "attention")]
FACTORIES += [(elementwise, name) for name in ("rms_norm", "rotate", "swiglu", "mix_experts")]


class Clock:
    """Seconds spent in each operation, and of them in kernels."""

    def __init__(self) -> None:
        self.in_all: dict[str, float] = defaultdict(float)
        self.in_kernel: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self._operation = ""

    def operation(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that does the same and counts its time under `name`."""

        def timed(*arguments: Any) -> Any:
            self._operation = name
            start = time.perf_counter()
            result = function(*arguments)
            self.in_all[name] += time.perf_counter() - start
            self.calls[name] += 1
            return result

        return timed

    def factory(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return a factory whose kernels count their time under the operation that calls them."""

        def make_timed(*arguments: Any) -> Callable[..., None]:
            kernel = make(*arguments)

            def timed(*operands: Any) -> None:
                start = time.perf_counter()
                kernel(*operands)
                self.in_kernel[self._operation] += time.perf_counter() - start

            return timed

        return make_timed

    @contextmanager
    def around(self, ops: compiled_ops.CompiledOps) -> Iterator[None]:
        """Put clocks around the operations and kernels of `ops` meanwhile."""
        patches = [mock.patch.object(ops, name, self.operation(name, getattr(ops, name))) for name in OPERATIONS]
        patches += [mock.patch.object(place, name, self.factory(getattr(place, name))) for place, name in FACTORIES]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    parser.add_argument("--model", metavar="DIR", help="default: the demonstration model")
    parser.add_argument("--threads", type=int, metavar="N", help="default: one for each performance core")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="of a sample (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="samples (default: %(default)s)")
    parser.add_argument("--depth", type=int, default=64, metavar="N", help="tokens before (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the machine and all samples there")
    parser.add_argument("--figure", metavar="FILE", help="draw the table: .svg, .png or .pdf (needs the extra plots)")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Time tokens with and without clocks; print the table, and write the file."""
    n_tokens, n_repeats = (checked_int(name, getattr(arguments, name), least=1) for name in ("tokens", "repeats"))
    model = mistral_ref.load(arguments.model, threads=arguments.threads)
    before = model.new_cache()
    model.forward([0] * checked_int("depth", arguments.depth, least=1), before, last_only=True)

    def microseconds() -> float:
        cache = before.copy()
        start = time.perf_counter()
        for _ in range(n_tokens):
            model.forward([0], cache, last_only=True)
        return (time.perf_counter() - start) / n_tokens * 1e6

    microseconds()
    clock, plain, timed = Clock(), [], []
    for repeat in range(n_repeats):
        status(f"{repeat + 1} of {n_repeats}")
        plain.append(microseconds())
        with clock.around(model.ops):
            timed.append(microseconds())
    per_token = 1e6 / (n_tokens * n_repeats)
    rows = [
        [name.strip("_"), f"{clock.calls[name] / (n_tokens * n_repeats):.0f}"]
        + [f"{us:.1f}" for us in (clock.in_kernel[name] * per_token, around(clock, name) * per_token)]
        for name in sorted(OPERATIONS, key=lambda name: -clock.in_all[name])
    ]
    kernels, others = (per_token * total for total in (sum(clock.in_kernel.values()), sum(clock.in_all.values())))
    rows.append(["between", "", "", f"{median(timed) - others:.1f}"])
    rows.append(["in all", "", f"{kernels:.1f}", f"{median(timed) - kernels:.1f}"])
    description = machine(model.ops.threads)
    status()
    print("\n".join([*machine_lines(description), str(model)]))
    typical, low, high = spread(plain)
    print(f"\na token: {typical:.0f} us ({low:.0f} to {high:.0f}), {1e6 / typical:.0f} tokens/s; ", end="")
    print(f"with clocks {median(timed):.0f} us\n")
    print(markdown_table(["microseconds a token", "calls", "kernel", "around"], rows))
    content = {"machine": description, "plain_us": plain, "timed_us": timed, "rows": rows}
    write_files(arguments, content, lambda: draw(rows))


def draw(rows: Sequence[Sequence[str]]) -> Axes:
    """Draw the table but for its sums: what a token spends in each kernel, and in Python around it."""
    from mistral_ref.study.drawing import BLUE, GREY, axes_or_new, title  # noqa: PLC0415

    names = [name for name, *_ in rows[:-1]]
    inside, outside = ([float(row[column] or 0) for row in rows[:-1]] for column in (2, 3))
    ax = axes_or_new(None, 6.4, 1.0 + 0.25 * len(names))
    handles = [ax.barh(names, inside, color=BLUE, label="in kernels")]
    handles.append(ax.barh(names, outside, left=inside, color=GREY, label="in Python around them"))
    ax.invert_yaxis()
    ax.set(xlabel="microseconds a token")
    ax.spines[["top", "right"]].set_visible(False)
    title(ax, "Where the time of one token goes", handles)
    return ax


def around(clock: Clock, name: str) -> float:
    """Return the seconds that an operation spent outside kernels."""
    return clock.in_all[name] - clock.in_kernel[name]


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
