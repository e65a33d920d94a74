"""Pictures of chapters 1 to 3 and 9 of the course: from text to tokens, the residual stream, RMSNorm, sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

import mistral_ref
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.sampling import keep_min_p, keep_top_p, softmax
from mistral_ref.study import lens
from mistral_ref.study.drawing import (
    BLUE,
    FAINT,
    GREY,
    INK,
    PALE_BLUE,
    UNSEEN,
    VERMILLION,
    Axes,
    Patch,
    Rectangle,
    axes_or_new,
    literal,
    styled,
    title,
)

SENTENCE = "Lily saw a zebra \N{GRINNING FACE}"
PROMPT = "Once upon a time there was a little"
UNDECIDED = "The dog ran to the"
TEMPERATURE, TOP_K, TOP_P, MIN_P = 0.7, 8, 0.9, 0.2
N_CANDIDATES = 10  # drawn of the sampling example
UNIFORM = 0.75  # the number that the example draws with
TEXT, NOTE = 9, 8  # points
BYTE_WIDTH = 1.8  # of a tile
PIECE_TILE: dict[str, Any] = {"facecolor": PALE_BLUE, "edgecolor": "white", "lw": 1.5}
BYTE_TILE: dict[str, Any] = {"facecolor": "white", "edgecolor": VERMILLION, "lw": 1.2}
CONTROL_TILE: dict[str, Any] = {"facecolor": "#EEEEEE", "edgecolor": GREY, "lw": 1, "ls": "--"}


def figures(model: mistral_ref.Model) -> dict[str, Axes]:
    """Return every picture by the name of its file."""
    return {
        "course_01_tokens": tokens(model),
        "course_02_residual_stream": residual_stream(model),
        "course_02_logit": logit(model),
        "course_03_rmsnorm": rms_norm(),
        "course_09_sampling": sampling(model),
    }


# ------------------------------------------------------------------------------------------------------- 1 tokens


@styled
def tokens(model: mistral_ref.Model) -> Axes:
    """Draw a text, the pieces that it is cut into, each under its characters, and their ids."""
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode(SENTENCE)
    ax = axes_or_new(None, 9.4, 2.5)
    left, x = 1.0, 2.6
    _tile(ax, left, 1.3, tokenizer.piece(ids[0]), ids[0], CONTROL_TILE)
    characters = iter(f" {SENTENCE}")  # SentencePiece puts a space in front
    n_bytes = sum(tokenizer.byte(token) is not None for token in ids)
    for place, token in enumerate(ids[1:]):
        piece = tokenizer.piece(token)
        if tokenizer.byte(token) is not None:
            _tile(ax, x, BYTE_WIDTH, piece, token, BYTE_TILE)
            x += BYTE_WIDTH
            continue
        width = max(0.6 * len(piece) + 0.2, 1.25)
        for i in range(len(piece)):
            at = x + (i + 0.5) * width / len(piece)
            char = next(characters)
            shown = "␣" if char == " " else char
            ax.text(at, 2.05, shown, ha="center", va="center", fontsize=11, color=GREY if char == " " else INK)
            if place == i == 0:
                ax.annotate("added", (at, 2.3), (at, 2.68), ha="center", fontsize=NOTE, color=GREY,
                            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.7, "shrinkB": 0})  # fmt: skip
        _tile(ax, x, width, piece, token, PIECE_TILE)
        x += width
    first = x - n_bytes * BYTE_WIDTH
    ax.text((first + x) / 2, 2.05, next(characters), ha="center", va="center", fontsize=14)
    ax.plot([first + 0.12, x - 0.12], [1.62] * 2, color=GREY, lw=0.8)
    for row, name in ((2.05, "text"), (1.05, "pieces"), (0.12, "ids")):
        ax.text(0.45, row, name, ha="right", va="center", fontsize=TEXT, color=GREY)
    ax.set(xlim=(-1.0, x + 0.2), ylim=(-0.2, 2.95))
    ax.set_axis_off()
    handles = [
        Patch(**PIECE_TILE, label="a piece of text"),
        Patch(**BYTE_TILE, label="a single byte, for what no piece covers"),
        Patch(**CONTROL_TILE, label="a mark that no text can spell"),
    ]
    title(ax, "A text becomes pieces, and pieces become numbers", handles)
    _legend_size(ax)
    return ax


def _tile(ax: Axes, x: float, width: float, piece: str, token: int, style: dict[str, Any]) -> None:
    """Draw a piece as a tile, with lines up to its text and its id below."""
    ax.add_patch(Rectangle((x + 0.05, 0.75), width - 0.1, 0.6, **style))
    ax.text(x + width / 2, 1.04, literal(piece), ha="center", va="center", fontsize=TEXT)
    ax.text(x + width / 2, 0.12, str(token), ha="center", va="center", fontsize=TEXT, color=BLUE, weight="bold")
    ax.plot([x + width / 2] * 2, [0.4, 0.68], color=FAINT, lw=1)
    if style is PIECE_TILE:
        ax.plot([x + 0.12, x + width - 0.12], [1.62, 1.62], color=GREY, lw=0.8)


def _legend_size(ax: Axes) -> None:
    legend = ax.get_legend()
    assert legend is not None
    for text in legend.get_texts():
        text.set_fontsize(NOTE)


# ---------------------------------------------------------------------------------------------- 2 residual stream


def _rms(x_D: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x_D, dtype=np.float64))))


@styled
def residual_stream(model: mistral_ref.Model) -> Axes:
    """Draw the residual stream of the last token as a river: its width is its RMS, and so is that of what flows in."""
    trace = model.trace(PROMPT, keep=["embedding", "*.attention_out", "*.ffn_out", "*.residual_after_*"])
    names = lens.residual_names(trace)
    sizes = [_rms(trace[name][-1]) for name in names]
    ax = axes_or_new(None, 9.4, 2.85)
    scale = 2.0  # of widths
    x = np.linspace(-0.6, len(sizes) - 0.4, 240)
    half = np.full_like(x, sizes[0])
    for at in range(1, len(sizes)):
        half += (sizes[at] - sizes[at - 1]) * _smooth(x - (at - 0.75), 0.5)
    half *= scale / 2
    ax.fill_between(x, -half, half, facecolor=PALE_BLUE, edgecolor="none", zorder=2)
    for at, name in enumerate(names[1:], start=1):
        is_attention = name.endswith("attention")
        part = name.replace("residual_after_attention", "attention_out").replace("residual_after_ffn", "ffn_out")
        _tributary(ax, at, scale * _rms(trace[part][-1]), 1 if is_attention else -1)
    for at, size in enumerate(sizes):
        ax.text(at + 0.05, 0, f"{size:.2f}", ha="center", va="center", fontsize=NOTE, zorder=4)
    for layer in range(model.config.n_layers):
        ax.text(2 * layer + 1.2, -1.9, f"layer {layer}", ha="center", va="center", fontsize=TEXT)
        ax.plot([2 * layer + 0.4, 2 * layer + 2.0], [-1.72] * 2, color=FAINT, lw=1)
    source = f"the row of\nthe embedding\nfor {literal(trace.pieces[-1])}"
    ax.text(-0.65, 0, source, ha="right", va="center", fontsize=NOTE)
    ax.text(len(sizes) - 0.3, 0, "to the norm\nand the output\nmatrix", ha="left", va="center", fontsize=NOTE)
    ax.set(xlim=(-2.1, len(sizes) + 1.1), ylim=(-2.05, 1.4), aspect="equal")
    ax.set_axis_off()
    handles = [
        Patch(facecolor=PALE_BLUE, label="the stream (its RMS written in it)"),
        Patch(facecolor=VERMILLION, label="from above: attention adds"),
        Patch(facecolor=BLUE, label="from below: the feed-forward adds"),
    ]
    title(ax, "The residual stream of one token: every block reads it, and adds to it", handles)
    _legend_size(ax)
    return ax


def _smooth(x: np.ndarray, width: float) -> np.ndarray:
    """Return a step from 0 to 1 that begins at 0 and ends at `width`, without corners."""
    t = np.clip(x / width, 0, 1)
    return t * t * (3 - 2 * t)


def _tributary(ax: Axes, at: float, width: float, side: int) -> None:
    """Draw a stream of this width that falls, or rises, into the river before `at`."""
    y = np.linspace(0.0, 1.28, 40)
    centre = at - 0.3 - 0.5 * _smooth(y - 0.1, 1.2)
    colour = VERMILLION if side > 0 else BLUE
    ax.fill_betweenx(side * y, centre - width / 2, centre + width / 2, facecolor=colour, edgecolor="none", zorder=1)


@styled
def logit(model: mistral_ref.Model) -> Axes:
    """Draw how the likeliest token's logit comes together: what each part adds, one after the other."""
    found = lens.attribution(model, model.trace(PROMPT))
    parts = [("embedding", found.embedding)]
    for layer, (heads_H, ffn) in enumerate(zip(found.heads_LH, found.ffn_L, strict=True)):
        parts += [(f"layer {layer}, attention", float(heads_H.sum())), (f"layer {layer}, feed-forward", float(ffn))]
    ax = axes_or_new(None, 7.6, 3.7)
    total = 0.0
    for row, (name, added) in enumerate(parts):
        style = {"facecolor": BLUE} if added >= 0 else {"facecolor": "white", "edgecolor": VERMILLION, "lw": 1.2}
        ax.add_patch(Rectangle((min(total, total + added), row - 0.34), abs(added), 0.68, **style))
        total += added
        ax.plot([total] * 2, [row - 0.34, row + 1.34], color=GREY, lw=0.7)
        ax.text(-0.25, row, name, ha="right", va="center", fontsize=NOTE)
        value = f"{added:+.2f}".replace("-", "−")
        ax.text(max(total, total - added) + 0.12, row, value, ha="left", va="center", fontsize=NOTE)
    last = len(parts)
    ax.add_patch(Rectangle((0, last - 0.34), total, 0.68, facecolor=PALE_BLUE))
    ax.text(-0.25, last, "the logit", ha="right", va="center", fontsize=NOTE, weight="bold")
    ax.text(total + 0.12, last, f"{total:.2f}", ha="left", va="center", fontsize=NOTE, weight="bold")
    ax.axvline(0, color=INK, lw=0.8)
    ax.set(xlim=(-3.2, total + 1.0), ylim=(last + 0.6, -0.7))
    ax.set_axis_off()
    title(ax, f"The logit of {literal(found.piece)} after {literal(found.label)} is the sum of what each part added")
    return ax


# ------------------------------------------------------------------------------------------------------ 3 RMSNorm


@styled
def rms_norm() -> Axes:
    """Draw RMSNorm of vectors of two numbers: along their direction to a circle, then by the weight to an ellipse."""
    ops, weight_D = ReferenceOps("float64"), np.array([1.3, 0.6])
    angles = np.radians([18, 62, 115, 160, 200, 247, 290, 338])
    lengths = np.array([2.3, 0.7, 2.9, 0.45, 2.0, 2.6, 0.9, 2.9])
    x_TD = lengths[:, np.newaxis] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    unit_TD = ops.rms_norm(x_TD, np.ones(2), 1e-5)
    y_TD = ops.rms_norm(x_TD, weight_D, 1e-5)
    panels = Figure((8.6, 3.3), layout="compressed").subplots(1, 3)
    turn = np.linspace(0, 2 * np.pi, 120)
    circle = np.sqrt(2) * np.stack([np.cos(turn), np.sin(turn)])
    panels[1].plot(*circle, color=GREY, lw=0.8, ls=":")
    panels[2].plot(*(circle * weight_D[:, np.newaxis]), color=GREY, lw=0.8, ls=":")
    _arrive(panels[0], 0 * x_TD, x_TD)
    _arrive(panels[1], x_TD, unit_TD)
    _arrive(panels[2], unit_TD, y_TD)
    titles = ("eight vectors x of two numbers", "x / RMS(x): all on one circle", "times weight (1.3, 0.6): an ellipse")
    for ax, text in zip(panels, titles, strict=True):
        title(ax, text)
    first: Axes = panels[0]
    return first


def _arrive(ax: Axes, from_TD: np.ndarray, to_TD: np.ndarray) -> None:
    """Draw numbered points where they are now, joined to the rings where they come from."""
    if from_TD.any():
        ax.plot(*from_TD.T, "o", mfc="white", mec=GREY, ms=4.5)
    for number, (from_D, to_D) in enumerate(zip(from_TD, to_TD, strict=True), start=1):
        ax.plot(*zip(from_D, to_D, strict=True), color=GREY if from_D.any() else FAINT, lw=0.9, zorder=1)
        way_D = to_D - from_D
        x, y = to_D + 0.36 * way_D / np.hypot(*way_D)
        ax.text(x, y, str(number), ha="center", va="center", fontsize=NOTE)
    ax.plot(*to_TD.T, "o", color=BLUE, ms=5.5, zorder=3)
    ax.axhline(0, color=FAINT, lw=0.8, zorder=0)
    ax.axvline(0, color=FAINT, lw=0.8, zorder=0)
    ax.set(xlim=(-3.5, 3.5), ylim=(-3.5, 3.5), aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


# ----------------------------------------------------------------------------------------------------- 9 sampling


@styled
def sampling(model: mistral_ref.Model) -> Axes:
    """Draw what temperature and three filters leave of the likeliest tokens, and the draw among what is left."""
    logits_V = model.forward(UNDECIDED)[-1].astype(np.float64)
    ids_N = np.argsort(-logits_V, kind="stable")
    plain_N, warm_N = softmax(logits_V[ids_N]), softmax(logits_V[ids_N], TEMPERATURE)
    top_k_N = softmax(logits_V[ids_N[:TOP_K]], TEMPERATURE)
    top_p_N = keep_top_p(top_k_N, TOP_P)
    min_p_N = keep_min_p(top_p_N, MIN_P)
    stages = (
        ("the model alone", plain_N, plain_N), (f"temperature {TEMPERATURE}", warm_N, warm_N),
        (f"top-k {TOP_K}", warm_N, top_k_N), (f"top-p {TOP_P}", top_k_N, top_p_N),
        (f"min-p {MIN_P}", top_p_N, min_p_N),
    )  # fmt: skip
    pieces = [literal(model.piece(int(token))) for token in ids_N[:N_CANDIDATES]]
    figure = Figure((9.4, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, len(stages), height_ratios=(5, 1))
    for column, (name, before_N, kept_N) in enumerate(stages):
        ax = figure.add_subplot(grid[0, column])
        _draw_stage(ax, before_N[:N_CANDIDATES], kept_N)
        ax.set_title(name, fontsize=TEXT)
        if column == 0:
            for row, piece in enumerate(pieces):
                ax.text(-0.02, row, piece, ha="right", va="center", fontsize=TEXT)
    _draw_strip(figure.add_subplot(grid[1, :]), min_p_N, pieces)
    figure.suptitle(f"What comes after “{UNDECIDED}”? Five views of the same ten tokens, and one draw", x=0.01,
                    ha="left", fontsize=10)  # fmt: skip
    return figure.axes[-1]


def _draw_stage(ax: Axes, before_N: np.ndarray, kept_N: np.ndarray) -> None:
    """Draw the probabilities after one step, and of the tokens that it has taken out those before it."""
    for row, before in enumerate(before_N):
        is_kept = row < len(kept_N)
        length = kept_N[row] if is_kept else before
        ax.add_patch(Rectangle((0, row - 0.35), length, 0.7, **({"facecolor": BLUE} if is_kept else UNSEEN)))
        ax.text(length + 0.015, row, f"{length:.2f}" if is_kept else "out", va="center", fontsize=NOTE,
                color=INK if is_kept else GREY)  # fmt: skip
    if len(kept_N) > N_CANDIDATES:
        more = f"… {len(kept_N) - N_CANDIDATES:,} more"
        ax.text(0.015, N_CANDIDATES, more, va="center", fontsize=NOTE, color=GREY)
    ax.set(xlim=(0, 0.68), ylim=(N_CANDIDATES + 0.5, -0.6), xticks=[], yticks=[])
    ax.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_strip(ax: Axes, p_N: np.ndarray, pieces: list[str]) -> None:
    """Draw [0, 1) shared out among the tokens that are left, and where the uniform number falls."""
    share_N = p_N / p_N.sum()
    start = 0.0
    for share, piece in zip(share_N, pieces, strict=False):
        ax.add_patch(Rectangle((start, 0), share, 1, facecolor=PALE_BLUE, edgecolor="white", lw=2))
        ax.text(start + share / 2, 0.5, f"{piece} {share:.2f}", ha="center", va="center", fontsize=TEXT)
        start += share
    ax.annotate(f"u = {UNIFORM}", (UNIFORM, 1.0), (UNIFORM, 1.9), ha="center", va="center", fontsize=NOTE,
                color=VERMILLION, arrowprops={"arrowstyle": "-|>", "color": VERMILLION, "lw": 1.2})  # fmt: skip
    ax.text(-0.01, 0.5, "the draw", ha="right", va="center", fontsize=TEXT)
    ax.text(0, -0.45, "0", ha="center", va="center", fontsize=NOTE)
    ax.text(1, -0.45, "1", ha="center", va="center", fontsize=NOTE)
    ax.set(xlim=(-0.1, 1.01), ylim=(-0.8, 2.2))
    ax.set_axis_off()
