"""Figures of what happens in a model: attention, heads, the ring, RoPE, logit lens, residual stream, logits, cost.

    from mistral_ref.study import plots

    trace = model.trace("Once upon a time", keep="layers.*.attention_weights")
    ax = plots.attention(trace, layer=2, head=3, window=model.config.sliding_window[2])
    ax.figure.savefig("attention.svg")

Every function draws into `ax`, or into a figure of its own, and returns the Axes. A notebook shows Axes that were made
here, as the last value of a cell, as a picture. Needs matplotlib: pip install 'mistral-ref[plots]'.
"""

from __future__ import annotations

from statistics import median
from typing import Literal

import numpy as np

from mistral_ref.cache import Ring
from mistral_ref.errors import checked_int
from mistral_ref.measure.cost_table import CostTable
from mistral_ref.reference_ops import attends
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
from mistral_ref.trace import Trace

__all__ = [
    "attention", "attribution", "head_map", "logit_lens", "receptive_field", "residual_norms", "ring", "roofline",
    "rope", "rope_scores",
]  # fmt: skip


@styled
def attention(trace: Trace, layer: int, head: int, *, window: int | None, ax: Axes | None = None) -> Axes:
    """Draw the attention weights of one query head: a row for each query, a column for each key, oldest first.

    Two lines enclose what a query sees, 0 <= query - key < window: on the right the causal edge, on the left the
    window's. What lies outside is hatched, unlike a weight of 0, which is white. A weight that stands outside all the
    same is drawn, so that a wrong window, or the trace of an engine that has one, betrays itself. What no weight can be
    (NaN, more than 1) is orange.

    window      of the layer, model.config.sliding_window[layer]; None where it has none
    """
    window = None if window is None else checked_int("window", window, least=1)
    picture = lens.attention(trace, layer, head)
    weights_TS = picture.weights_TS
    n_queries, n_keys = weights_TS.shape
    queries_T = trace.start + np.arange(n_queries)
    keys_S = trace.start + n_queries - n_keys + np.arange(n_keys)
    sees_TS = attends(queries_T[:, np.newaxis], keys_S, window)

    is_square = n_keys < 3 * n_queries
    width = min(max(0.21 * n_keys, 3.5), 6.0)
    ax = axes_or_new(ax, width + 1.9, (width * n_queries / n_keys if is_square else max(0.21 * n_queries, 1.5)) + 1.7)
    ax.patch.set(**UNSEEN)
    cells_TS = np.where(np.isfinite(weights_TS), weights_TS, 2)  # 2: beyond the scale, orange
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
    """Draw a line that stands at x in each row, from `first_row` on."""
    rows_T = first_row + np.arange(len(x_T))
    heights = np.stack([rows_T - 0.5, rows_T + 0.5], axis=1).ravel()
    return ax.plot(np.repeat(x_T, 2), heights, clip_on=False, solid_capstyle="butt", **style)  # type: ignore[arg-type]


def _place(piece: str, position: int) -> str:
    """Return a token's piece and position, or the position alone, "@12", for a token before the trace."""
    return piece if piece == f"@{position}" else f"{literal(piece)} {position}"


def _stream_label(name: str) -> str:
    """Return what a reader calls a value of the residual stream.

    >>> _stream_label("layers.3.residual_after_ffn")
    'layer 3, feed-forward'
    """
    layer, _, kind = name.removeprefix("layers.").partition(".")
    return f"layer {layer}, {'attention' if kind == 'residual_after_attention' else 'feed-forward'}" if kind else name


@styled
def logit_lens(predictions: lens.LogitLens, *, token: int | None = None, ax: Axes | None = None) -> Axes:
    """Draw the table of a logit lens, from the embedding at the bottom to the model's own prediction at the top.

    The colour of a cell is the probability of its piece.

    token   None: a column for each token of the trace, with the likeliest next piece in its cells, where there is
            room; else the index of one token, with a column for each of its likeliest pieces
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
    """Draw the RMS of the residual stream, sqrt(mean(x²)), after each step.

    A thin line is a token, the thick one their mean. Markers show the RMS of what attention and feed-forward added
    there, mean over tokens. The trace has to hold `embedding` or some of the `residual_after_...`; what it holds of
    `attention_out` and `ffn_out` is drawn.
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
    """Draw what each part added to one logit: a row for each layer, a column for each head, one for the feed-forwards.

    The embedding, which the layers add to, is the row at the bottom. All cells add up to the logit.
    """
    n_layers, n_heads = parts.heads_LH.shape
    scale = max(abs(value) for _, value in parts.rows()) or 1.0
    cell = 0.5 if n_heads <= 16 else 0.2
    ax = axes_or_new(ax, max(cell * (n_heads + 2), 4) + 1.6, max(0.7 * cell * (n_layers + 2), 1) + 1.3)
    left = n_heads - 0.2  # of the feed-forwards' column, which is wide enough for its name
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
def roofline(table: CostTable, *, ax: Axes | None = None) -> Axes:
    """Draw how fast each kind of step goes, and could go, by its intensity: the roofline model (see cost.py).

    The roof is min(peak, bandwidth * intensity). A dot shows the FLOP/s measured, the circle joined to it those
    predicted. Steps without arithmetic (the embedding) have no place. Dots above the roof have weights in the caches.
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
