"""Pictures of chapters 4 to 7 of the course: RoPE, heads, the window, the ring."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, Rectangle, Wedge
from matplotlib.text import Text

import mistral_ref
from mistral_ref.reference_ops import ReferenceOps, attends, softmax
from mistral_ref.rope import rotation
from mistral_ref.study import plots
from mistral_ref.study.drawing import (
    BLUE,
    FAINT,
    GREY,
    INK,
    PALE_BLUE,
    UNSEEN,
    VERMILLION,
    axes_or_new,
    label_ticks,
    styled,
    title,
)

_LEAST_POINTS = 8.5  # of text in the course


def figures(model: mistral_ref.Model) -> dict[str, Axes]:
    """Return every picture by the name of its file."""
    window = model.config.sliding_window[0]
    assert window is not None
    drawn = {
        "course_04_rope": clocks(model.config),
        "course_05_attention": by_hand(),
        "course_05_head_map": plots.head_map(model.config),
        "course_06_window": window_grid(window=4, n_tokens=9),
        "course_06_receptive_field": plots.receptive_field(model.config.n_layers, window),
        "course_07_ring": rings(window=4, tokens=(3, 4, 9)),
        "course_07_chunks": plots.ring(window=4, chunk=3, n_tokens=12),
    }
    return {name: _legible(ax) for name, ax in drawn.items()}


def _legible(ax: Axes) -> Axes:
    """Let no text of a picture be smaller than is comfortable beside a page's own text."""
    for text in ax.findobj(Text):
        text.set_fontsize(max(text.get_fontsize(), _LEAST_POINTS))
    ax.tick_params(labelsize=_LEAST_POINTS)
    return ax


@styled
def clocks(config: mistral_ref.ModelConfig, pair: int = 2) -> Axes:
    """Draw one pair of a query and of a key as clock hands: as they are, and turned by three choices of positions."""
    ax = axes_or_new(None, 8.2, 2.9)
    q, k = (np.array([np.cos(angle), np.sin(angle)]) for angle in np.radians([50.0, 10.0]))
    cases = (
        (None, None, "not turned"),
        (5, 3, "q at 5, k at 3"),
        (15, 13, "q at 15, k at 13"),
        (15, 3, "q at 15, k at 3"),
    )
    for column, (i, j, about) in enumerate(cases):
        hands = []
        for vector, position in ((q, i), (k, j)):
            pairs_1HK = np.zeros((1, 1, config.head_dim))
            pairs_1HK[0, 0, 2 * pair : 2 * pair + 2] = vector
            if position is not None:
                turn = rotation(np.array([position]), config, "float64")
                pairs_1HK = ReferenceOps("float64").rotate(pairs_1HK, turn.key_cos, turn.key_sin)
            hands.append(pairs_1HK[0, 0, 2 * pair : 2 * pair + 2])
        x, (at_q, at_k) = 2.75 * column, (np.degrees(np.arctan2(hand[1], hand[0])) for hand in hands)
        between = (at_q - at_k) % 360
        ax.add_patch(Circle((x, 0), 1, facecolor="white", edgecolor=GREY, lw=0.8))
        ax.add_patch(Wedge((x, 0), 0.45, at_k, at_q, facecolor=PALE_BLUE, edgecolor="none"))
        for (dx, dy), name, colour, style in zip(hands, "qk", (BLUE, VERMILLION), ("-", (0, (3, 1.2))), strict=True):
            ax.plot([x, x + dx], [0, dy], color=colour, lw=2.4, ls=style)
            ax.plot([x + dx], [dy], color=colour, marker="o" if name == "q" else "s", ms=6)
            ax.text(x + 1.22 * dx, 1.22 * dy, name, color=colour, ha="center", va="center", fontsize=11, style="italic")
        ax.text(x, 1.62, about, ha="center", va="center", fontsize=9.5)
        apart = f"{between:.0f}° apart\nq · k = {hands[0] @ hands[1]:.2f}".replace("-", "−")
        ax.text(x, -1.72, apart, ha="center", va="center", fontsize=9.5, color=INK, linespacing=1.4)
    ax.set(xlim=(-1.5, 2.75 * 3 + 1.5), ylim=(-2.15, 1.85), aspect="equal")
    ax.set_axis_off()
    title(ax, "Turned by their positions, two hands keep their angle wherever their distance is the same")
    return ax


@styled
def by_hand() -> Axes:
    """Draw the example of chapter 5: a query, three keys, their scores and weights, and the weighted sum of values."""
    words = ["Tom", "fell", "he"]
    q_K = np.array([2.0, 0, 2, 0])
    k_SK = np.array([[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 0, 1]])
    v_SK = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]])
    scores_S = k_SK @ q_K / np.sqrt(len(q_K))
    weights_S = softmax(scores_S)
    ax = axes_or_new(None, 8.2, 3.0)
    columns = {"token": 0, "key": 1.6, "score\nq · k / √4": 3.35, "weight (softmax)": 5.4, "value": 7.6}
    for heading, x in columns.items():
        ax.text(x, 0.62, heading, ha="center", va="bottom", color=GREY, linespacing=1.3)
    x_token, x_key, x_score, x_weight, x_value = columns.values()
    for row, word in enumerate(words):
        y = -0.85 * row
        ax.text(x_token, y, word, ha="center", va="center", fontsize=11, weight="bold" if word == "he" else "normal")
        _vector(ax, x_key, y, k_SK[row], FAINT)
        ax.text(x_score, y, f"{scores_S[row]:.0f}", ha="center", va="center", fontsize=11)
        ax.add_patch(Rectangle((x_weight - 0.8, y - 0.2), 1.6, 0.4, facecolor="white", edgecolor=GREY, lw=0.8))
        ax.add_patch(Rectangle((x_weight - 0.8, y - 0.2), 1.6 * weights_S[row], 0.4, facecolor=BLUE))
        ax.text(x_weight + 0.92, y, f"{weights_S[row]:.2f}", va="center", fontsize=10)
        _vector(ax, x_value, y, v_SK[row], PALE_BLUE)
    y = -0.85 * len(words) - 0.2
    ax.axhline(y + 0.5, 0.01, 0.99, color=GREY, lw=0.8)
    ax.text(x_token, y, "query of\n“he”", ha="center", va="center", linespacing=1.2)
    _vector(ax, x_key, y, q_K, "white")
    ax.text(x_weight + 1.0, y, "each value × its weight,\nadded up", ha="right", va="center", linespacing=1.2)
    _vector(ax, x_value, y, weights_S @ v_SK, "white")
    ax.set(xlim=(-0.6, 8.75), ylim=(y - 0.4, 1.4))
    ax.set_axis_off()
    title(ax, "One query looks at three keys, and takes a mixture of their values")
    return ax


def _vector(ax: Axes, x: float, y: float, numbers: np.ndarray, colour: str) -> None:
    """Draw a few numbers in a row of cells about (x, y)."""
    width = 0.27 if np.array_equal(numbers, np.rint(numbers)) else 0.5
    for at, number in enumerate(numbers):
        left = x + (at - len(numbers) / 2) * width
        ax.add_patch(Rectangle((left, y - 0.26), width, 0.52, facecolor=colour, edgecolor=INK, lw=0.8))
        text = f"{number:.0f}" if width < 0.5 else f"{number:.2f}"
        ax.text(left + width / 2, y, text, ha="center", va="center", fontsize=9.5)


@styled
def window_grid(window: int, n_tokens: int) -> Axes:
    """Draw who sees whom: in each cell that counts the distance i - j, and beyond the window the key too many."""
    ax = axes_or_new(None, 5.6, 4.7)
    for query, key in np.ndindex(n_tokens, n_tokens):
        corner, distance = (key - 0.5, query - 0.5), query - key
        sees = attends(query, key, window)
        style = {"facecolor": PALE_BLUE if distance else BLUE, "edgecolor": "white", "lw": 1.2} if sees else UNSEEN
        ax.add_patch(Rectangle(corner, 1, 1, **style))
        if sees:
            colour = INK if distance else "white"
            ax.text(key, query, str(distance), ha="center", va="center", color=colour, fontsize=10)
        elif distance == window:
            ax.add_patch(Rectangle((key - 0.4, query - 0.4), 0.8, 0.8, facecolor="white", edgecolor=VERMILLION, lw=1.6))
            ax.text(key, query, str(distance), ha="center", va="center", color=VERMILLION, fontsize=10)
    ax.set(xlim=(-0.5, n_tokens - 0.5), ylim=(n_tokens - 0.5, -0.5), aspect="equal")
    label_ticks(ax.xaxis, [str(key) for key in range(n_tokens)])
    label_ticks(ax.yaxis, [str(query) for query in range(n_tokens)])
    ax.set(xlabel="position j of the key: who is looked at", ylabel="position i of the query: who looks")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    handles = [
        Rectangle((0, 0), 1, 1, facecolor=BLUE, label="itself"),
        Rectangle((0, 0), 1, 1, facecolor=PALE_BLUE, label="seen"),
        Rectangle((0, 0), 1, 1, **UNSEEN, label="out of sight"),
        Rectangle((0, 0), 1, 1, facecolor="white", edgecolor=VERMILLION, lw=1.6, label=f"{window}: one too many"),
    ]
    title(ax, f"A window of {window}: query i sees key j if 0 ≤ i − j < {window}", handles)
    return ax


@styled
def rings(window: int, tokens: tuple[int, ...]) -> Axes:
    """Draw a ring of as many slots as the window has keys, after each of some tokens that went through one by one."""
    ax = axes_or_new(None, 8.2, 3.1)
    turn = 360 / window
    for column, token in enumerate(tokens):
        x = 2.9 * column
        held: dict[int, int] = {}
        for position in range(token + 1):
            lost = held.get(position % window)
            held[position % window] = position
        for slot, position in held.items():
            middle = np.radians(90 - turn * (slot + 0.5))
            is_new = position == token
            ax.add_patch(
                Wedge((x, 0), 1, 90 - turn * (slot + 1) + 2, 90 - turn * slot - 2, width=0.55,
                      facecolor=PALE_BLUE, edgecolor=VERMILLION if is_new else "none", lw=2.4)
            )  # fmt: skip
            direction = np.array([np.cos(middle), np.sin(middle)])
            near, far = 0.72 * direction, 1.24 * direction
            weight, name = "bold" if is_new else "normal", f"slot {slot}"
            ax.text(x + near[0], near[1], str(position), ha="center", va="center", fontsize=14, weight=weight)
            ax.text(x + far[0], far[1], name, ha="center", va="center", color=GREY, fontsize=8.5)
        over = "" if lost is None else f"\nover {lost}"
        ax.text(x, 0, f"token {token}{over}", ha="center", va="center", fontsize=8.5, linespacing=1.3)
        seen = ", ".join(str(key) for key in range(token + 1) if attends(token, key, window))
        ax.text(x, -1.55, f"token {token} sees {seen}", ha="center", va="center", fontsize=9.5)
    ax.set(xlim=(-1.45, 2.9 * (len(tokens) - 1) + 1.45), ylim=(-1.75, 1.15), aspect="equal")
    ax.set_axis_off()
    title(ax, f"A window of {window} in a ring of {window} slots: position p lies in slot p % {window}")
    return ax
