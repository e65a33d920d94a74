"""Figures of what happens in a model: attention, heads, the ring, RoPE, logit lens, residual stream, logits, cost.

    from mistral_ref.study import plots

    trace = model.trace("Once upon a time", keep="layers.*.attention_weights")
    ax = plots.attention(trace, layer=2, head=3)
    ax.figure.savefig("attention.svg")

Every function draws into `ax`, or without `ax` into a new figure, and returns the Axes. If new Axes are the last value
of a notebook's cell, the notebook shows them as a picture. The figures need matplotlib: pip install
'mistral-ref[plots]'.
"""

from __future__ import annotations

import re
from statistics import median
from typing import Literal

import numpy as np

from mistral_ref.errors import InputError, checked_int
from mistral_ref.measure.cost_table import CostTable
from mistral_ref.reference_ops import attends
from mistral_ref.ring import Ring
from mistral_ref.study import lens
from mistral_ref.study.diagrams import head_map, receptive_field, ring, rope, rope_scores
from mistral_ref.study.drawing import (
    BLUE,
    BLUES,
    FAINT,
    GREY,
    INK,
    SMALL,
    UNSEEN,
    VERMILLION,
    Axes,
    Line2D,
    LogLocator,
    Patch,
    PowerNorm,
    axes_or_new,
    colour_scale,
    label_ticks,
    literal,
    room,
    spread,
    styled,
    title,
)
from mistral_ref.study.patching import Sweep
from mistral_ref.trace import Trace

__all__ = [
    "attention", "attribution", "head_map", "logit_lens", "receptive_field", "residual_norms", "ring", "roofline",
    "rope", "rope_scores", "sweep",
]  # fmt: skip


@styled
def attention(
    trace: Trace, layer: int, head: int, *, window: int | Literal["auto"] | None = "auto", ax: Axes | None = None
) -> Axes:
    """Draw the attention weights of one query head: a row for each query, a column for each key, oldest first.

    A query sees the keys with 0 <= query - key < window. Two lines enclose them: the causal edge on the right, the edge
    of the window on the left. Cells outside the lines are hatched; a weight of 0 between the lines is white. A weight
    outside the lines that is not 0 is drawn as well, so that the reader sees a wrong window. A value that no weight can
    have (NaN, or more than 1) is orange.

    window      the window to draw; "auto": the layer's own, as the trace knows it; None: the layer has no window

    Raises InputError if the trace does not know the layers' windows, as a dump of another engine may not.
    """
    picture = lens.attention(trace, layer, head)
    if window == "auto":
        if trace.windows is None or layer >= len(trace.windows):
            raise InputError(f"this trace does not know layer {layer}'s window; expected window=, a number or None")
        window = trace.windows[layer]
    window = None if window is None else checked_int("window", window, least=1)
    weights_TS = picture.weights_TS
    n_queries, n_keys = weights_TS.shape
    queries_T = trace.start + np.arange(n_queries)
    keys_S = trace.start + n_queries - n_keys + np.arange(n_keys)
    sees_TS = attends(queries_T[:, np.newaxis], keys_S, window)

    is_square = n_keys < 3 * n_queries
    width = min(max(0.21 * n_keys, 3.5), 6.0)
    ax = axes_or_new(ax, width + 1.9, (width * n_queries / n_keys if is_square else max(0.21 * n_queries, 1.5)) + 1.7)
    ax.patch.set(**UNSEEN)
    cells_TS = np.where(np.isfinite(weights_TS), weights_TS, 2)  # 2 is beyond the colour scale, so it is orange
    cells_TS[~sees_TS & (weights_TS == 0)] = np.nan  # transparent
    aspect: Literal["equal", "auto"] = "equal" if is_square else "auto"
    ax.imshow(cells_TS, cmap=BLUES, norm=PowerNorm(0.5, 0, 1), aspect=aspect, interpolation="none")
    colour_scale(ax.images[-1], "weight (square-root scale)", ticks=(0, 0.01, 0.1, 0.25, 0.5, 1))
    handles = [
        Patch(**UNSEEN, label="out of sight"),
        *_edge(ax, queries_T - keys_S[0] + 0.5, 0, color=INK, lw=1.2, label="causal edge: nothing later is seen"),
    ]
    oldest_T = np.array([Ring(window, None, 1).first_visible(query) for query in queries_T.tolist()])
    if window is not None and oldest_T[-1] > 0:
        first_row = int(np.argmax(oldest_T > 0))
        label = f"window's edge: {window} keys, itself included"
        handles += _edge(ax, oldest_T[first_row:] - keys_S[0] - 0.5, first_row, color=VERMILLION, lw=2.5, label=label)
    for axis, pieces, positions in ((ax.xaxis, picture.keys, keys_S), (ax.yaxis, picture.queries, queries_T)):
        label_ticks(axis, [_place(piece, int(at)) for piece, at in zip(pieces, positions, strict=True)])
    ax.tick_params(axis="x", rotation=90)
    ax.set(xlabel="key: a token that is looked at", ylabel="query: a token that looks")
    title(ax, f"Attention: who looks at whom in layer {layer}, head {head}", handles, n_rows=len(handles))
    return ax


def _edge(ax: Axes, x_T: np.ndarray, first_row: int, **style: object) -> list[Line2D]:
    """Draw a line that is at x_T[i] in the i-th row, counted from `first_row`."""
    rows_T = first_row + np.arange(len(x_T))
    heights = np.stack([rows_T - 0.5, rows_T + 0.5], axis=1).ravel()
    return ax.plot(np.repeat(x_T, 2), heights, clip_on=False, solid_capstyle="butt", **style)  # type: ignore[arg-type]


def _place(piece: str, position: int) -> str:
    """Return a token's piece and position, or the position alone, "@12", for a token before the trace."""
    return piece if piece == f"@{position}" else f"{literal(piece)} {position}"


def _stream_label(name: str) -> str:
    """Return a label for a step of the residual stream.

    >>> _stream_label("layers.3.residual_after_ffn")
    'layer 3, feed-forward'
    """
    layer, _, kind = name.removeprefix("layers.").partition(".")
    return f"layer {layer}, {'attention' if kind == 'residual_after_attention' else 'feed-forward'}" if kind else name


@styled
def logit_lens(predictions: lens.LogitLens, *, token: int | None = None, ax: Axes | None = None) -> Axes:
    """Draw the table of a logit lens, from the embedding at the bottom to the model's own prediction at the top.

    The colour of a cell shows the probability of its piece. The piece is written into the cell if there is room.

    token   None: there is a column for each token of the trace, with the likeliest next piece in each cell. The index
            of a token: there is a column for each of its likeliest next pieces.
    """
    n_rows, n_tokens, n_choices = predictions.ids_RTN.shape
    if token is None:
        ids_RC, logprobs_RC = predictions.ids_RTN[:, :, 0], predictions.logprobs_RTN[:, :, 0]
        columns, xlabel = [literal(label) for label in predictions.labels], "token that was read"
        about = "what would come next after each token"
    else:
        token = checked_int("token", token, -n_tokens, n_tokens - 1)
        ids_RC, logprobs_RC = predictions.ids_RTN[:, token], predictions.logprobs_RTN[:, token]
        columns, xlabel = [str(choice + 1) for choice in range(n_choices)], "choice, the likeliest first"
        about = f"what would come next after {literal(predictions.labels[token])}"
    n_columns = ids_RC.shape[1]
    ax = axes_or_new(ax, min(0.62 * n_columns, 15) + 2.6, max(0.2 * n_rows, min(0.27 * n_rows, 6)) + 1.4)
    ax.imshow(np.exp(logprobs_RC), cmap=BLUES, vmin=0, vmax=1, aspect="auto", origin="lower", interpolation="none")
    if n_rows <= room(ax.yaxis) and 4 * n_columns <= room(ax.xaxis):
        for (row, column), token_id in np.ndenumerate(ids_RC):
            colour = "white" if logprobs_RC[row, column] > np.log(0.6) else INK
            piece = literal(predictions.pieces[int(token_id)], 9)
            ax.text(column, row, piece, ha="center", va="center", color=colour, fontsize=SMALL)
    colour_scale(ax.images[-1], "probability")
    label_ticks(ax.xaxis, columns)
    label_ticks(ax.yaxis, [_stream_label(name) for name in predictions.names])
    ax.tick_params(axis="x", rotation=0 if token is not None else 90)
    ax.set(xlabel=xlabel, ylabel="had the model ended after")
    title(ax, f"Logit lens: {about}")
    return ax


@styled
def residual_norms(trace: Trace, *, ax: Axes | None = None) -> Axes:
    """Draw the RMS of the residual stream, sqrt(mean(x²)), after each of its steps.

    Each thin line is a token, and the thick line is their mean. Markers show the RMS of the value that attention or
    feed-forward added there, as a mean over the tokens. The trace must hold `embedding` or at least one of the steps
    `residual_after_...`. Markers are drawn for the steps `attention_out` and `ffn_out` that it holds.
    """
    names = lens.residual_names(trace)
    ax = axes_or_new(ax, min(max(0.42 * len(names), 4.4), 10) + 1.2, 4.2)
    rms_RT = np.array([_rms(trace[name]) for name in names])
    ax.plot(rms_RT, color=GREY, lw=0.6, alpha=0.6)
    handles = [Line2D([], [], color=GREY, lw=0.6, label="stream, each token")]
    handles += ax.plot(rms_RT.mean(axis=1), color=INK, lw=2.5, label="stream, mean")
    for part, after, label, style in (
        (
            "attention_out",
            "residual_after_attention",
            "attention adds",
            {"color": VERMILLION, "marker": "^", "ls": "--"},
        ),
        ("ffn_out", "residual_after_ffn", "feed-forward adds", {"color": BLUE, "marker": "s", "ls": ":"}),
    ):
        added = {at: name.replace(after, part) for at, name in enumerate(names) if name.endswith(after)}
        means = {at: _rms(trace[name]).mean() for at, name in added.items() if name in trace}
        if means:
            handles += ax.plot(list(means), list(means.values()), lw=1, ms=5, label=label, **style)  # type: ignore[arg-type]
    ax.set_yscale("log", subs=[])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    label_ticks(ax.xaxis, [_stream_label(name) for name in names])
    ax.tick_params(axis="x", rotation=90)
    ax.set(xlabel="after", ylabel="RMS (logarithmic)")
    ax.spines[["top", "right"]].set_visible(False)
    title(ax, "The residual stream: how large it is, and what is added to it", handles)
    return ax


def _rms(x_TD: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x_TD, dtype=np.float64), axis=-1))


@styled
def attribution(parts: lens.Attribution, *, ax: Axes | None = None) -> Axes:
    """Draw what each part of the model added to one logit. All cells add up to the logit.

    There is a row for each layer, a column for each head, and a column for the feed-forwards. The row at the bottom is
    the embedding, to which the layers add.
    """
    n_layers, n_heads = parts.heads_LH.shape
    scale = max(abs(value) for _, value in parts.rows()) or 1.0
    cell = 0.5 if n_heads <= 16 else 0.2
    ax = axes_or_new(ax, max(cell * (n_heads + 2), 4) + 1.6, max(0.7 * cell * (n_layers + 2), 1) + 1.3)
    left = n_heads - 0.2  # left edge of the feed-forwards' column, which is as wide as its name
    right = left + 0.75 / cell
    for values, extent in (
        (parts.heads_LH, (-0.5, n_heads - 0.5, -0.5, n_layers - 0.5)),
        (parts.ffn_L[:, np.newaxis], (left, right, -0.5, n_layers - 0.5)),
        (np.array([[parts.embedding]]), (-0.5, right, -1.8, -0.8)),
    ):
        ax.imshow(
            values, cmap="RdBu_r", vmin=-scale, vmax=scale, extent=extent, origin="lower", aspect="auto",
            interpolation="none",
        )  # fmt: skip
        for (row, column), value in np.ndenumerate(values):
            x = extent[0] + (column + 0.5) * (extent[1] - extent[0]) / values.shape[1]
            text = f"{round(value, 2) + 0.0:+.2f}" if n_heads <= 16 else "−" if value < -scale / 8 else ""
            ax.text(x, extent[2] + row + 0.5, text, ha="center", va="center", fontsize=SMALL,
                    color="white" if abs(value) > 0.6 * scale else INK)  # fmt: skip
    ax.set(xlim=(-0.5, right), ylim=(-1.8, n_layers - 0.5))
    colour_scale(ax.images[0], "added to the logit")
    label_ticks(ax.yaxis, ["embedding", *(f"layer {layer}" for layer in range(n_layers))], [-1.3, *range(n_layers)])
    label_ticks(ax.xaxis, [*map(str, range(n_heads)), "feed-forward"], [*range(n_heads), (left + right) / 2])
    ax.xaxis.tick_top()
    ax.xaxis.set_label_position("top")
    ax.set(xlabel="head")
    ax.spines[:].set_visible(False)
    title(ax, f"Logit of {literal(parts.piece)} after {literal(parts.label)}: {parts.logit:.2f}, the sum of all cells")
    return ax


@styled
def sweep(found: Sweep, *, share: bool = False, ax: Axes | None = None) -> Axes:
    """Draw what each change of a sweep did to the metric: a row for each step or layer, a column for each place.

    share   draw the share of the way to the other text's metric. Otherwise the change of the metric itself

    Raises InputError as `Sweep.share`.
    """
    values_RC = found.share if share else found.change
    n_rows, n_columns = values_RC.shape
    scale = np.nanmax(np.abs(values_RC), initial=0.0) or 1.0
    ax = axes_or_new(ax, min(max(0.5 * n_columns, 2.5), 12) + 2.8, min(max(0.32 * n_rows, 1), 10) + 1.4)
    ax.patch.set(**UNSEEN)
    ax.imshow(values_RC, cmap="RdBu_r", vmin=-scale, vmax=scale, aspect="auto", interpolation="none")
    if n_columns <= 16 and n_rows <= room(ax.yaxis):
        for (row, column), value in np.ndenumerate(values_RC):
            text = "" if np.isnan(value) else f"{value:+.2f}" if round(value, 2) else "0"
            colour = "white" if abs(value) > 0.6 * scale else INK
            ax.text(column, row, text, ha="center", va="center", fontsize=SMALL, color=colour)
    way = f"share of the way from {found.base:.2f} to {found.other:.2f}" if share else ""
    colour_scale(ax.images[0], way or f"change of the metric, {found.base:.2f} without")
    label_ticks(ax.yaxis, [re.sub(r"^layers\.(\d+)\.?", r"layer \1 ", name).rstrip() for name in found.rows])
    label_ticks(ax.xaxis, [literal(name) for name in found.columns])
    ax.tick_params(axis="x", rotation=90 if n_columns > 8 or n_columns * max(map(len, found.columns)) > 48 else 0)
    ax.spines[:].set_visible(False)
    title(ax, f"Numbers {found.what}, at each place by itself")
    return ax


@styled
def roofline(table: CostTable, *, ax: Axes | None = None) -> Axes:
    """Draw how fast each kind of step is, and how fast it could be: the roofline model (see cost.py).

    The horizontal axis is the step's intensity, FLOP per byte. The roof is min(peak, bandwidth * intensity). A dot
    shows the FLOP/s measured. A line joins it to a circle, which shows the FLOP/s predicted. A step without arithmetic
    (the embedding) is not drawn. If a dot is above the roof, the weights of the step fit the caches.
    """
    rows = [row for row in table.rows(by_kind=True) if row.cost.flops]
    bandwidth, peak = (limit / 1e9 for limit in table.limits)
    x = np.array([row.cost.intensity for row in rows])
    measured = np.array([row.cost.flops / median(row.seconds) for row in rows]) / 1e9
    predicted = np.array([row.cost.flops / row.predicted for row in rows]) / 1e9
    ridge = peak / bandwidth
    left, right = min(x.min(), ridge) / 2, max(x.max(), ridge) * 3
    low, high = min(measured.min(), predicted.min()) / 2, max(measured.max(), peak) * 2
    ax = axes_or_new(ax, 7.2, 4.4)
    ax.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    roof = f"roof: {bandwidth:,.1f} GB/s, {peak:,.0f} GFLOP/s"
    handles = ax.plot([left, ridge, right], [bandwidth * left, peak, peak], color=INK, lw=1.5, label=roof)
    ax.vlines(x, np.minimum(measured, predicted), np.maximum(measured, predicted), color=GREY, lw=0.8)
    handles += ax.plot(x, predicted, "o", mfc="white", mec=INK, ms=6, label="predicted")
    handles += ax.plot(x, measured, "o", color=BLUE, ms=6, label="measured")
    heights = np.log(measured / low) / np.log(high / low)
    for row, px, py, height in zip(rows, x, measured, spread(heights, 1 / room(ax.yaxis)), strict=True):
        ax.annotate(row.cost.name if row.cost.name != "total" else "whole pass", (px, py), (1.02, height),
                    textcoords="axes fraction", va="center", fontsize=SMALL,
                    arrowprops={"arrowstyle": "-", "color": FAINT, "lw": 0.7, "shrinkA": 0, "shrinkB": 3})  # fmt: skip
    ax.set(xlabel="intensity: FLOP per byte read or written", ylabel="speed, GFLOP/s")
    ax.spines[["top", "right"]].set_visible(False)
    title(ax, "Roofline: how fast each kind of step goes, and how fast it could", handles)
    return ax
