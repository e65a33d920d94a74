"""How the time of a token, and that of a prompt, grow with the width of a model.

Stacks of random layers in Mistral 7B's proportions: heads of 128, a key/value head for every four query heads, a
feed-forward width of 3.5 dim. A layer then holds 13 dim² weights, so theory says that its time grows with the square of
the width, as long as reading weights (one token) or multiplying with them (a prompt) is all there is to it. Each stack
has so many layers that no cache holds its weights, two at least; times are those of one layer, and so comparable.

The exponent is the slope of log time over log dim by least squares, taken run by run.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import common
import numpy as np
from common import finish, parser_for, status

from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.config import ModelConfig
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int
from mistral_ref.measure.benchmark import Measurement, alternate, multiply_add_limit, read_limit, spread
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.synthetic import checkpoint_bytes
from mistral_ref.weights import Kind, matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """\
examples:
  python benchmarks/widths.py                                 dim 512 to 4096, prompts of 512 tokens
  python benchmarks/widths.py --quick --figure widths.svg     up to 2048, prompts of 128
  python benchmarks/widths.py --dims 1024 2048 3072 --layers 2 --dtype f32
"""

HEADINGS = ["dim", "layers", "MiB", "ms a token", "GB/s", "% of read", "min to max"]
HEADINGS += ["prompt t/s", "GFLOP/s", "% of peak", "min to max"]
VOCABULARY = 512  # few enough that the two ends of the model take next to no time
THEORY = 2


def stack(dim: int, n_layers: int | None, kind: Kind) -> ModelConfig:
    """Return a model of a width with n layers; None: with weights that no cache holds."""
    if checked_int("dims", dim, least=512, most=2**14) % 512:
        raise InputError(f"dims is {dim}; expected multiples of 512: heads of 128, four for each key/value head")
    heads = dim // 128
    one = ModelConfig(
        dim=dim, n_layers=1, n_heads=heads, n_kv_heads=heads // 4, head_dim=128, hidden_dim=7 * dim // 2,
        vocab_size=VOCABULARY, norm_eps=1e-5, rope_theta=1e4, sliding_window=(None,), rope_row_order="interleaved",
    )  # fmt: skip
    if n_layers is None:
        two = one.replace(n_layers=2, sliding_window=(None, None))
        layer_bytes = checkpoint_bytes(two, kind) - checkpoint_bytes(one, kind)
        n_layers = max(2, math.ceil(common.buffer_bytes() / layer_bytes))
    n_layers = checked_int("layers", n_layers, least=1)
    return one.replace(n_layers=n_layers, sliding_window=(None,) * n_layers)


def per_layer(measured: Sequence[Measurement], configs: Sequence[ModelConfig]) -> np.ndarray:
    """Return the seconds of one layer: (widths, repeats)."""
    return np.array([m.seconds for m in measured]) / np.array([[config.n_layers] for config in configs])


def slopes(dims: Sequence[int], values: np.ndarray) -> list[float]:
    """Return the exponents e of values (widths, repeats) ~ dim^e: the slopes of their logarithms, for each repeat.

    >>> [round(slope, 9) for slope in slopes([1, 2, 4], np.array([[3, 1], [12, 2], [48, 4]]))]
    [2.0, 1.0]
    """
    return np.polyfit(np.log(dims), np.log(values), 1)[0].tolist()


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    parser.add_argument("--dims", type=int, nargs="+", metavar="D", help="multiples of 512 (default: 512 to 4096)")
    parser.add_argument(
        "--layers", type=int, metavar="N", help="of each (default: more than the caches hold, 2 or more)"
    )
    parser.add_argument("--prompt", type=int, metavar="N", help="tokens of a prompt (default: 512)")
    common.add_kind_option(parser)
    common.add_threads_option(parser)
    common.add_timing_options(parser)
    common.add_output_options(parser, "up to 2048, prompts of 128", "the time of a layer by its width")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Measure all widths in turn; print the tables, and write the files."""
    dims = sorted(set(arguments.dims or ((512, 1024, 2048) if arguments.quick else (512, 1024, 2048, 4096))))
    if len(dims) < 2:
        raise InputError("dims is one width; expected two at least, for a slope")
    n_prompt = arguments.prompt if arguments.prompt is not None else 128 if arguments.quick else 512
    n_prompt = checked_int("prompt", n_prompt, least=1, most=2**15)
    configs = [stack(dim, arguments.layers, arguments.kind) for dim in dims]
    ops = CompiledOps(threads=arguments.threads)
    description = machine(ops.threads) | {"dtype": arguments.kind, "prompt": n_prompt}
    print("\n".join(machine_lines(description)))
    read, peak = read_limit(ops.threads, common.buffer_bytes()), multiply_add_limit(ops.threads)
    candidates, sizes = [], []
    for dim, config in zip(dims, configs, strict=True):
        status(f"dim {dim}: making the weights of {config.n_layers} layers")
        model = common.random_model(config, arguments.kind, ops)
        sizes.append(sum(matrix.nbytes for matrix in matrices(model.weights)))
        candidates.append(common.decoding(f"dim {dim}, one token", model, read))
        candidates.append(common.prompting(f"dim {dim}, a prompt", model, peak, n_prompt))
    measured = alternate(candidates, repeats=arguments.repeats, seconds=arguments.seconds, progress=status)
    decode, prompt = measured[::2], measured[1::2]

    rows, figures = [], []
    for config, n_bytes, one, many in zip(configs, sizes, decode, prompt, strict=True):
        times = [
            f"{1e3 * spread(one.seconds).median:.3g}",
            f"{spread(one.rates).median:.1f}",
            *common.percent_cells(one),
        ]
        times += [f"{n_prompt / spread(many.seconds).median:.0f}", f"{spread(many.rates).median:.1f}"]
        rows.append(
            [str(config.dim), str(config.n_layers), f"{n_bytes / 2**20:.0f}", *times, *common.percent_cells(many)]
        )
        figures.append({"dim": config.dim, "layers": config.n_layers, "weights_bytes": n_bytes,
                        "decode": one.as_json(), "prompt": many.as_json()})  # fmt: skip
    exponents: dict[str, Any] = {}
    for name, test in (("one token", decode), (f"prompt of {n_prompt}", prompt)):
        work = np.array([[m.work / config.n_layers] for m, config in zip(test, configs, strict=True)])
        exponents[name] = {"measured": slopes(dims, per_layer(test, configs)), "counted": slopes(dims, work)[0]}
    status()
    print(f"\n{markdown_table(HEADINGS, rows)}")
    slope_rows = [
        [name, *spread(found["measured"]).text(2), f"{found['counted']:.2f}", str(THEORY)]
        for name, found in exponents.items()
    ]
    headings = ["a layer's time grows as dim to the power of", "measured", "min to max", "of what cost.py counts"]
    print(f"\n{markdown_table([*headings, 'theory'], slope_rows)}")
    content = {"machine": description, "widths": figures, "exponents": exponents}
    times = {name: per_layer(test, configs) for name, test in zip(exponents, (decode, prompt), strict=True)}
    common.write_files(arguments, content, lambda: draw(dims, times, exponents))


def draw(dims: Sequence[int], seconds: dict[str, np.ndarray], exponents: dict[str, Any]) -> Axes:
    """Draw the milliseconds of one layer over the width, and the square of the width through the widest."""
    from mistral_ref.study.drawing import BLUE, GREY, VERMILLION, Line2D, axes_or_new, title  # noqa: PLC0415

    ax, handles = axes_or_new(None, 6.4, 4.4), []
    ax.set(xscale="log", yscale="log", xlabel="width of the model, dim", ylabel="milliseconds a layer")
    for (name, times), color, marker in zip(seconds.items(), (BLUE, VERMILLION), "os", strict=True):
        milliseconds = 1e3 * times
        last = float(np.median(milliseconds[-1]))
        ax.plot(dims, [last * (dim / dims[-1]) ** THEORY for dim in dims], color=GREY, lw=0.8, ls=":")
        label = f"{name}: dim^{spread(exponents[name]['measured']).median:.2f}"
        handles.append(common.whiskers(ax, dims, milliseconds.tolist(), color=color, marker=marker, label=label))
    handles.append(Line2D([], [], color=GREY, lw=0.8, ls=":", label="the square of dim"))
    ax.set_xticks(dims, [str(dim) for dim in dims])
    ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.spines[["top", "right"]].set_visible(False)
    title(ax, "The time of one layer by the width of the model", handles)
    return ax


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
