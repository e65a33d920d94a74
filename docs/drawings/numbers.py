"""Pictures of chapters 8, 10 and 11 of the course: SwiGLU and experts, formats of numbers, time."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import mistral_ref
from mistral_ref.config import MixtureOfExperts
from mistral_ref.files.rounding import quantized
from mistral_ref.measure.cost import Limits, StepCost, step_costs, total_cost
from mistral_ref.measure.shapes import shape
from mistral_ref.measure.synthetic import encoded, hollow_weights, make_checkpoint
from mistral_ref.quantized_matrix import scale_values
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.study.drawing import (
    BLUE,
    BLUES,
    FAINT,
    GREY,
    INK,
    PALE_BLUE,
    VERMILLION,
    Rectangle,
    axes_or_new,
    styled,
    title,
)
from mistral_ref.weights import FeedForward, Kind, Matrix

TEXT = "Once upon a time there was a little girl named Lily. She loved to play in the"
GATES = np.array([2.0, 0.0, -3.0])  # of the example by hand in chapter 8
TOKENS = (10, 20, 30, 40, 50, 60)  # any, of a model that has learnt nothing
LAPTOP = Limits(bandwidth=50e9, peak=500e9)  # an example, not a measurement
_READABLE = 8.5  # points, of labels on ticks


def figures(model: mistral_ref.Model) -> dict[str, Axes]:
    """Return every picture by the name of its file."""
    drawn = {
        "course_08_swiglu": swiglu(model),
        "course_08_experts": experts(),
        "course_10_lines": lines(),
        "course_10_group": group(model),
        "course_11_roofline": roofline(),
        "course_11_shares": shares(),
    }
    for picture in drawn.values():
        figure = picture.get_figure()
        assert figure is not None
        for ax in figure.axes:
            ax.tick_params(labelsize=_READABLE)
    return drawn


@styled
def swiglu(model: mistral_ref.Model) -> Axes:
    """Draw silu with three gates of an example on it, and under it where the gates of a model lie."""
    figure = Figure((7.2, 4.6), layout="constrained")
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ops, x = ReferenceOps("float64"), np.linspace(-4.5, 3.5, 401)
    ax.axhline(0, color=FAINT, lw=1)
    ax.plot(x, np.maximum(x, 0), color=GREY, lw=1.2, ls="--")
    ax.plot(x, ops.swiglu(x, np.ones_like(x)), color=BLUE, lw=2.5)
    heights = ops.swiglu(GATES, np.ones_like(GATES))
    ax.plot(GATES, heights, "o", color=VERMILLION, ms=7)
    places = ((0.25, -0.35), (0.2, -0.55), (-0.1, -0.75))
    for gate, height, (dx, dy) in zip(GATES, heights, places, strict=True):
        ax.text(
            gate + dx, height + dy, f"silu({gate:g}) = {height:.2f}".replace("-", "−"), color=VERMILLION, fontsize=9
        )
    ax.text(-4.4, 1.9, "silu(g) = g · sigmoid(g)", color=BLUE, fontsize=10)
    ax.text(-4.4, 1.35, "dashed: max(g, 0), which cuts off hard", color=GREY, fontsize=9)
    ax.set(ylim=(-1.1, 3.6), ylabel="what up is multiplied by")

    trace = model.trace(TEXT, keep="layers.*.gate")
    gates = np.concatenate([value[1:].ravel() for value in trace.values()])  # without the BOS, which is like no other
    bins = np.arange(-4.5, 3.6, 0.125)
    below.hist(gates[gates < 0], bins, color=PALE_BLUE)
    below.hist(gates[gates >= 0], bins, color=BLUE)
    closed = float((gates < 0).mean())
    below.text(-4.4, 0.6, f"{closed:.0%} below 0", transform=below.get_xaxis_transform(), color=INK, fontsize=9)
    below.text(1.4, 0.6, f"{1 - closed:.0%} above", transform=below.get_xaxis_transform(), color=INK, fontsize=9)
    below.set(
        xlabel="gate g: above, three by hand; below, all those of a sentence in the demonstration model", yticks=[]
    )
    for one in (ax, below):
        one.spines[["top", "right"]].set_visible(False)
    below.spines["left"].set_visible(False)
    title(ax, "SwiGLU: the gate decides how much passes")
    return ax


@styled
def experts() -> Axes:
    """Draw which experts each token was sent to, and their shares, in a mixture with random weights."""
    moe = MixtureOfExperts(num_experts=8, num_experts_per_tok=2)
    with tempfile.TemporaryDirectory() as folder:
        mixture = mistral_ref.load(make_checkpoint(folder, shape("tiny").replace(moe=moe)), backend="numpy")
        weights_TE = mixture.trace(TOKENS, keep="layers.1.expert_weights")["layers.1.expert_weights"]
        del mixture  # it maps the file
    ax = axes_or_new(None, 7.2, 3.9)
    for (token, expert), share in np.ndenumerate(weights_TE):
        face, edge = (BLUES(0.1 + 0.5 * share), "white") if share else ("white", FAINT)
        ax.add_patch(Rectangle((expert - 0.46, token - 0.42), 0.92, 0.84, facecolor=face, edgecolor=edge))
        if share:
            ax.text(expert, token, f"{share:.2f}", ha="center", va="center", color=INK, fontsize=10)
    n_tokens, n_experts = weights_TE.shape
    ax.set(xlim=(-0.6, n_experts - 0.4), ylim=(n_tokens - 0.5, -0.5))
    ax.set_xticks(range(n_experts), [f"expert {expert}" for expert in range(n_experts)])
    ax.set_yticks(range(n_tokens), [f"token {token}" for token in range(n_tokens)])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("number: share of a chosen expert, a row adds up to 1. Empty: not chosen, not read, not computed")
    ax.set_title("A mixture of experts: each token goes through two of eight", pad=12)
    return ax


def _grid(kind: Kind, low: float, high: float) -> np.ndarray:
    """Return all numbers of a format between two powers of two near 1, or from 0 on."""
    fine = np.linspace(low, high, 2**14 + 1, dtype=np.float32)[np.newaxis]
    scale = np.ones((1, 1), np.float32) if kind == "fp8" else None
    return np.unique(Matrix("grid", kind, encoded(fine, kind), scale).rows(slice(None), np.float64))


@styled
def lines() -> Axes:
    """Draw the numbers of four formats as ticks; each line is one gap of the line above, magnified."""
    rows: list[tuple[Kind, str, float, float]] = [
        ("fp8", "fp8 e4m3", 0, 4),
        ("bf16", "bf16", 1, 1 + 2**-3),
        ("f16", "f16", 1, 1 + 2**-7),
        ("f32", "float32", 1, 1 + 2**-10),
    ]
    about = ("gap above 1: 1/8\nlargest: 448", "gap above 1: 1/128\nlargest: 3.4e38",
             "gap above 1: 1/1,024\nlargest: 65,504", "gap above 1: 1/8,388,608\nlargest: 3.4e38")  # fmt: skip
    ax = axes_or_new(None, 7.2, 4.4)
    for row, ((kind, name, low, high), words) in enumerate(zip(rows, about, strict=True)):
        y = -row
        if kind == "f32":  # 8,192 gaps: more than a picture has points
            ax.add_patch(Rectangle((0, y - 0.13), 1, 0.26, facecolor=BLUE, edgecolor="none"))
        else:
            ax.plot([0, 1], [y, y], color=INK, lw=1)
            at = (_grid(kind, low, high) - low) / (high - low)
            ax.vlines(at, y - 0.13, y + 0.13, color=BLUE, lw=1.6)
        for value, x, side in ((low, 0, "left"), (high, 1, "right")):
            ax.text(x, y - 0.3, f"{value:.11g}", ha=side, va="center", fontsize=8.5, color=GREY)
        ax.text(-0.03, y, name, ha="right", va="center", fontsize=10)
        ax.text(1.03, y, words, ha="left", va="center", fontsize=8.5, color=INK)
        if row + 1 < len(rows):
            below = rows[row + 1]
            left, right = ((value - low) / (high - low) for value in below[2:])
            ax.fill([left, right, 1, 0], [y - 0.15, y - 0.15, y - 0.87, y - 0.87], color=PALE_BLUE, alpha=0.35, lw=0)
            gap = Rectangle(
                (left, y - 0.16), right - left, 0.32, facecolor="none", edgecolor=VERMILLION, lw=1.2, zorder=3
            )
            ax.add_patch(gap)
    ax.text(0.5, -3.3, "8,192 gaps, too close to be drawn", ha="center", va="center", fontsize=8.5, color=GREY)
    ax.set(xlim=(-0.17, 1.36), ylim=(-3.45, 0.3))
    ax.set_axis_off()
    title(ax, "Four formats: each line is one gap of the line above it, magnified")
    return ax


@styled
def group(model: mistral_ref.Model) -> Axes:
    """Draw 32 neighbouring weights and what they become in 4 bits: one of 16 levels, which the group shares."""
    network = model.weights.layers[0].feed_forward
    assert isinstance(network, FeedForward)
    small = quantized(network.w1, 4, 32)
    before, after = (matrix.rows(slice(0, 1), np.float64)[0, :32] for matrix in (network.w1, small))
    scale = float(scale_values()[small.scales[0, 0, 0, 0]] * small.unit)
    zero = small.scales[0, 0, 1, 0] / 16
    levels = scale * (np.arange(16) - zero)
    ax = axes_or_new(None, 7.2, 4.2)
    ax.hlines(levels, -0.7, 31.7, color=FAINT, lw=0.9)
    ax.hlines(0, -0.7, 31.7, color=GREY, lw=0.8, ls=":")
    at = np.arange(32)
    ax.vlines(at, before, after, color=VERMILLION, lw=1.5)
    ax.plot(at, after, "_", color=INK, ms=10, mew=2)
    ax.plot(at, before, "o", color=BLUE, ms=4.5)
    for code in (0, 15):
        ax.text(32, levels[code], f"code {code}", va="center", fontsize=8.5, color=GREY)
    ax.text(32, 0, "weight 0", va="center", fontsize=8.5, color=GREY)
    ax.set(xlim=(-0.9, 35.2), xlabel="which of the 32 neighbours", ylabel="weight", xticks=[0, 8, 16, 24, 31])
    ax.spines[["top", "right"]].set_visible(False)
    words = f"16 levels, {scale:.3f} apart. Dot: the weight. Dash: the level it becomes. Line between: the error"
    ax.text(0, 1.02, words, transform=ax.transAxes, fontsize=8.5, color=INK)
    ax.set_title("One group of 32 weights in 4 bits", pad=20)
    return ax


def _gate_cost(n_tokens: int) -> StepCost:
    """Return what w1 of a layer of Mistral 7B costs for a number of tokens at once."""
    config = shape("mistral-7b", layers=1)
    costs = step_costs(config, hollow_weights(config), n_tokens)
    return next(cost for cost in costs if cost.name == "layers.0.gate")


@styled
def roofline() -> Axes:
    """Draw the roof of a machine, and on it one product of Mistral 7B with more and more tokens at once."""
    bandwidth, peak = (limit / 1e9 for limit in LAPTOP)
    ridge, left, right = peak / bandwidth, 0.3, 1500.0
    ax = axes_or_new(None, 7.2, 4.4)
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(12, 1100))
    ax.axvspan(left, ridge, color=PALE_BLUE, alpha=0.25, lw=0)
    ax.plot([left, ridge, right], [bandwidth * left, peak, peak], color=INK, lw=2)
    ax.text(0.36, 640, "memory is the limit:\ntwice the tokens, the same time", fontsize=9, color=INK, va="center")
    ax.text(13, 870, "arithmetic is the limit:\ntwice the tokens, twice the time", fontsize=9, color=INK, va="center")
    for n_tokens in (1, 2, 4, 8, 16, 64, 512):
        cost = _gate_cost(n_tokens)
        speed = cost.flops / cost.predicted(LAPTOP) / 1e9
        ax.plot(cost.intensity, speed, "o", color=BLUE, ms=8)
        words = {1: "1 token", 512: "512 tokens at once"}.get(n_tokens, str(n_tokens))
        offset, align = ((-9, 4), "right") if cost.intensity < ridge else ((0, -17), "center")
        ax.annotate(words, (cost.intensity, speed), offset, textcoords="offset points", fontsize=9, color=BLUE,
                    ha=align, va="center")  # fmt: skip
    ax.plot([ridge, ridge], [12, peak], color=GREY, lw=0.9, ls=":")
    ax.text(ridge * 1.06, 16, f"{ridge:g} FLOP a byte:\npeak / bandwidth", fontsize=8.5, color=GREY, va="center")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.set(xlabel="intensity: operations for each byte read or written", ylabel="speed at most, GFLOP/s")
    ax.spines[["top", "right"]].set_visible(False)
    title(ax, f"One product (w1 of Mistral 7B, bf16) under the roof of {bandwidth:g} GB/s and {peak:g} GFLOP/s")
    return ax


_KINDS = {
    "attention's products": ("q", "k", "v", "attention_out"),
    "feed-forward's products": ("gate", "up", "ffn_out"),
    "output": ("logits",),
    "attention over the cache": ("heads",),
}
_HATCHES = ("", "////", "", "xxxx", "")
_COLOURS = (BLUE, PALE_BLUE, INK, "white", FAINT)


def _shares(n_tokens: int, start: int, what: str) -> Iterator[float]:
    """Yield the parts of `_KINDS`, and of all the rest, in the FLOPs or bytes of a pass of Mistral 7B."""
    config = shape("mistral-7b")
    costs = step_costs(config, hollow_weights(config), n_tokens, start, cache_dtype="float16")
    by_kind: dict[str, list[StepCost]] = defaultdict(list)
    for cost in costs:
        by_kind[cost.name.rpartition(".")[2]].append(cost)
    total = getattr(total_cost("all", costs), what)
    parts = [sum(getattr(total_cost(name, by_kind[name]), what) for name in names) for names in _KINDS.values()]
    return (part / total for part in (*parts, total - sum(parts)))


@styled
def shares() -> Axes:
    """Draw what each kind of step takes of the bytes of a token, and of the operations of a prompt."""
    bars = {
        "bytes of one token,\nafter 0 others": (1, 0, "bytes"),
        "bytes of one token,\nafter 4,096 others": (1, 4096, "bytes"),
        "operations of a prompt\nof 512": (512, 0, "flops"),
        "operations of a prompt\nof 16,384": (16384, 0, "flops"),
    }
    ax = axes_or_new(None, 7.2, 3.8)
    names = [*_KINDS, "all else, too thin to be seen"]
    for row, counted in enumerate(bars.values()):
        edge = 0.0
        for part, colour, hatch in zip(_shares(*counted), _COLOURS, _HATCHES, strict=True):
            ax.barh(row, part, left=edge, height=0.6, color=colour, hatch=hatch, edgecolor=GREY, lw=0.6)
            if part > 0.05:
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
                ax.text(edge + part / 2, row, f"{part:.0%}", ha="center", va="center", fontsize=9, color=INK, bbox=box)
            edge += part
    ax.set_yticks(range(len(bars)), list(bars))
    ax.set(ylim=(len(bars) - 0.5, -0.5), xlim=(0, 1), xticks=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, hatch=hatch, edgecolor=GREY, label=name)
               for name, colour, hatch in zip(names, _COLOURS, _HATCHES, strict=True)]  # fmt: skip
    ax.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.4, -0.02), ncols=3, fontsize=8.5)
    title(ax, "Mistral 7B: where the bytes of a token go, and the operations of a prompt")
    return ax
