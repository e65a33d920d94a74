"""Diagrams that need no trace: the head map, the receptive field, the ring, and RoPE. plots.py offers them too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import checked_int
from mistral_ref.reference_ops import ReferenceOps, attends
from mistral_ref.ring import Ring
from mistral_ref.rope import inverse_frequencies, rotation
from mistral_ref.study.drawing import (
    BLUE,
    FAINT,
    GREY,
    INK,
    PALE_BLUE,
    SMALL,
    UNSEEN,
    VERMILLION,
    Axes,
    Circle,
    Patch,
    Rectangle,
    axes_or_new,
    label_ticks,
    room,
    styled,
    title,
)

_MAX_CELLS = 32  # the largest number of rows or columns in the drawing of a ring: more cannot be read
_SEEN, _OLD, _LATER, _WRITTEN = "seen", "too old: not seen", "later: not seen yet", "written now, over the key in small"
_SLOT_STYLES: dict[str, dict[str, Any]] = {
    _SEEN: {"facecolor": PALE_BLUE, "edgecolor": "white"},
    _OLD: UNSEEN,
    _LATER: {"facecolor": "white", "edgecolor": GREY, "ls": ":", "lw": 0.8},
    _WRITTEN: {"facecolor": "none", "edgecolor": VERMILLION, "lw": 2},
}


@styled
def head_map(config: ModelConfig, *, ax: Axes | None = None) -> Axes:
    """Draw which of G key/value heads each of H query heads reads.

    Query head h reads key/value head h // (H/G), so neighbours share one. The cache keeps keys and values of only the G
    key/value heads. This is grouped-query attention (arXiv:2305.13245).

        H = 4, G = 2    query head      0 1 2 3
                        reads k and v   0 0 1 1
    """
    n_heads, n_kv_heads = config.n_heads, config.n_kv_heads
    group = n_heads // n_kv_heads
    ax = axes_or_new(ax, min(max(0.46 * n_heads, 4.2), 11) + 1.3, 2.1)
    ax.set(xlim=(-0.6, n_heads - 0.4), ylim=(-0.5, 1.5))
    every = int(np.ceil(1.7 * n_heads / room(ax.xaxis)))  # where room is short, only every n-th number is drawn
    for kv_head in range(n_kv_heads):
        heads, colour = range(kv_head * group, (kv_head + 1) * group), (PALE_BLUE, FAINT)[kv_head % 2]
        middle = (heads[0] + heads[-1]) / 2
        ax.plot([[middle] * group, heads], [[0] * group, [1] * group], color=GREY, lw=0.8, zorder=0)
        ax.add_patch(Rectangle((heads[0] - 0.42, -0.25), group - 0.16, 0.5, facecolor=colour, edgecolor=INK, lw=1.2))
        if heads[-1] // every > (heads[0] - 1) // every:
            ax.text(middle, 0, str(kv_head), ha="center", va="center", color=INK)
        for head in heads:
            ax.add_patch(Rectangle((head - 0.42, 0.8), 0.84, 0.4, facecolor=colour, edgecolor=GREY, lw=0.8))
            if head % every == 0:
                ax.text(head, 1, str(head), ha="center", va="center", color=INK)
    names = [f"{n_kv_heads} key/value head{_s(n_kv_heads)}\n(kept in the cache)", f"{n_heads} query head{_s(n_heads)}"]
    label_ticks(ax.yaxis, names)
    ax.set(xticks=[], xlabel=f"query head h reads key/value head {'h' if group == 1 else f'h // {group}'}")
    ax.tick_params(axis="y", length=0)
    ax.spines[:].set_visible(False)
    title(ax, f"Head map: {group} query head{_s(group)} to each key/value head")
    return ax


def _s(number: int) -> str:
    return "" if number == 1 else "s"


@styled
def receptive_field(n_layers: int, window: int, n_tokens: int | None = None, *, ax: Axes | None = None) -> Axes:
    """Draw which positions can influence the last of n tokens: a row for each layer, a column for each position.

    In one layer a token sees itself and the W - 1 tokens before it. Each of these has seen W - 1 more in the layer
    below. So each layer reaches W - 1 positions further back, and L layers reach back L (W - 1) positions (Mistral 7B,
    arXiv:2310.06825, section 2).

        window 3            position  0 1 2 3 4 5 6
             after layer 1                        x
             after layer 0                    x x x
             embedding                    x x x x x

    n_tokens    None: as many as can influence the last token, and some more
    """
    n_layers = checked_int("n_layers", n_layers, least=1)
    window = checked_int("window", window, least=1)
    reach = n_layers * (window - 1)
    n_tokens = reach + 1 + max(2, reach // 10) if n_tokens is None else checked_int("n_tokens", n_tokens, least=1)
    one_layer, last = Ring(window, None, 1), n_tokens - 1
    oldest = [last]  # the oldest position that reaches the last token, from the highest row down to the embedding
    for _ in range(n_layers):
        oldest.append(one_layer.first_visible(oldest[-1]))
    rows, first_seen = np.arange(n_layers, -1, -1), np.array([last] + [one_layer.first_visible(last)] * n_layers)

    ax = axes_or_new(ax, 7.2, min(max(0.36 * (n_layers + 1), 1.8), 7) + 1.4)
    lefts = np.array(oldest) - 0.5
    ax.set(xlim=(-0.5, last + 0.5), ylim=(-0.6, n_layers + 0.6))
    ax.fill_betweenx(rows, lefts, last + 0.5, color=PALE_BLUE, alpha=0.35, lw=0)
    handles: list[Any] = [
        ax.barh(rows, last - first_seen + 1, 0.62, first_seen - 0.5, color=BLUE, label="window of the last token"),
        ax.barh(rows, first_seen - oldest, 0.62, lefts, color=PALE_BLUE, label="reached through others"),
    ]
    if n_tokens <= 2 * _MAX_CELLS:
        ax.vlines(np.arange(n_tokens - 1) + 0.5, -0.6, n_layers + 0.6, color="white", lw=0.8)
    handles += ax.plot(lefts, rows, color=VERMILLION, lw=1.5, marker="o", ms=3.5, clip_on=False, zorder=3,
                       label=f"edge: {window - 1:,} further back each layer")  # fmt: skip
    label_ticks(ax.yaxis, ["embedding", *(f"after layer {layer}" for layer in range(n_layers))])
    for row in ax.get_yticks():
        count = last - oldest[n_layers - int(row)] + 1
        ax.annotate(f"{count:,}", (1.01, row), xycoords=ax.get_yaxis_transform(), va="center", fontsize=SMALL)
    ax.annotate("tokens", (1.01, -0.03), xycoords="axes fraction", va="top", fontsize=SMALL)
    ax.locator_params("x", integer=True)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set(xlabel="position")
    ax.spines[["top", "right", "left"]].set_visible(False)
    title(ax, f"Receptive field of token {last:,}: {n_layers} layer{_s(n_layers)}, window {window:,}", handles)
    return ax


@styled
def ring(window: int, chunk: int = 1, n_tokens: int = 12, *, ax: Axes | None = None) -> Axes:
    """Draw which keys the slots of one layer's ring hold while n tokens go through it, in passes of `chunk` tokens.

    There is a column for each query and a row for each slot. A cell shows the position of the key that the slot holds
    when the query looks. The key of position p is in slot p % capacity, where capacity = window + chunk - 1.

    A pass writes all its keys before its first query looks. Therefore a pass of several tokens needs more slots than
    the window has keys.
    """
    window = checked_int("window", window, 1, _MAX_CELLS)
    chunk = checked_int("chunk", chunk, 1, _MAX_CELLS + 1 - window)
    n_tokens = checked_int("n_tokens", n_tokens, 1, _MAX_CELLS)
    slots = Ring(window, window + chunk - 1, window + chunk - 1)
    ax = axes_or_new(ax, max(0.5 * n_tokens, 5.4) + 0.8, 0.5 * slots.capacity + 1.3)
    held, kinds = np.full(slots.capacity, -1), set()
    for start in range(0, n_tokens, chunk):
        stop = min(start + chunk, n_tokens)
        lost, held[slots.slots(start, stop)] = held.copy(), np.arange(start, stop)
        for query in range(start, stop):
            for slot in np.flatnonzero(held >= 0).tolist():
                key, was = int(held[slot]), int(lost[slot]) if query == start else int(held[slot])
                kinds.update(_draw_slot(ax, query, slot, key, was, window))
        if chunk > 1:
            ax.axvline(stop - 0.5, color=INK, lw=1.5)
    ax.set(xlim=(-0.5, n_tokens - 0.5), ylim=(slots.capacity - 0.5, -0.5), aspect="equal")
    label_ticks(ax.xaxis, [str(query) for query in range(n_tokens)])
    label_ticks(ax.yaxis, [str(slot) for slot in range(slots.capacity)])
    passes = "" if chunk == 1 else f"; passes of {chunk} between the lines"
    ax.set(xlabel=f"position of the token that looks{passes}", ylabel="slot = position % capacity")
    handles = [Patch(label=kind, **style) for kind, style in _SLOT_STYLES.items() if kind in kinds]
    title(ax, f"The ring: which key each of {slots.capacity} slots holds (window {window}, chunk {chunk})", handles)
    return ax


def _draw_slot(ax: Axes, query: int, slot: int, key: int, was: int, window: int) -> list[str]:
    """Draw one cell of the ring, with the key `was` that it held before the pass; return its kinds for the legend."""
    kind = _SEEN if attends(query, key, window) else _OLD if key < query else _LATER
    ax.add_patch(Rectangle((query - 0.5, slot - 0.5), 1, 1, **_SLOT_STYLES[kind]))
    box = {"facecolor": _SLOT_STYLES[kind]["facecolor"], "edgecolor": "none", "pad": 1}
    colour = INK if kind == _SEEN else GREY
    ax.text(query, slot, str(key), ha="center", va="center", color=colour, fontsize=10, bbox=box)
    if was == key:
        return [kind]
    ax.add_patch(Rectangle((query - 0.44, slot - 0.44), 0.88, 0.88, **_SLOT_STYLES[_WRITTEN]))
    if was >= 0:
        ax.text(query, slot + 0.29, f"over {was}", ha="center", va="center", color=VERMILLION, fontsize=6)
    return [kind, _WRITTEN]


@styled
def rope(
    config: ModelConfig, positions: Sequence[int] = (0, 1, 2, 3, 10, 100, 1000, 10000), *, ax: Axes | None = None
) -> Axes:
    """Draw how RoPE turns three pairs of a head's numbers: the fastest pair, a middle one and the slowest.

    Each pair has a clock hand for each position. At position p pair j is turned by p * theta^(-2j/K) (RoFormer,
    arXiv:2104.09864). A model with YaRN turns by angles that YaRN has changed.
    """
    positions = [checked_int("position", position, least=0) for position in positions]
    frequencies = inverse_frequencies(config.rope_theta, config.head_dim, config.yarn)
    pairs = sorted({0, (len(frequencies) - 1) // 2, len(frequencies) - 1})
    ax = axes_or_new(ax, max(0.85 * len(positions), 3.4) + 1.9, 1.1 * len(pairs) + 0.8)
    for row, pair in enumerate(pairs):
        step, turn = _digits(np.degrees(frequencies[pair])), _digits(2 * np.pi / frequencies[pair])
        about = f"pair {pair}\n{step}° a token\na turn in {turn} tokens"
        ax.text(-0.7, -1.3 * row, about, ha="right", va="center", fontsize=SMALL)
        for column, position in enumerate(positions):
            angle, y = position * frequencies[pair], -1.3 * row
            ax.add_patch(Circle((column, y), 0.42, facecolor="none", edgecolor=GREY, lw=0.7))
            ax.plot([column, column + 0.42], [y, y], color=GREY, lw=0.7, ls=":")
            hand = [column, column + 0.42 * np.cos(angle)], [y, y + 0.42 * np.sin(angle)]
            ax.plot(*hand, color=BLUE, lw=2, marker="o", ms=4, markevery=[1])
            degrees = f"{_digits(np.degrees(angle))}°"
            ax.text(column, y - 0.56, degrees, ha="center", va="center", fontsize=6.5, color=GREY)
    for column, position in enumerate(positions):
        ax.text(column, 0.62, f"position {position:,}" if column == 0 else f"{position:,}", ha="center", fontsize=SMALL)
    ax.set(xlim=(-2.0, len(positions) - 0.4), ylim=(-1.3 * len(pairs) + 0.6, 0.85), aspect="equal")
    ax.set_axis_off()
    title(ax, "RoPE turns each pair of a head's numbers as the position grows")
    return ax


def _digits(number: float) -> str:
    """Return a number with at least three digits and without an exponent.

    >>> _digits(57295.8), _digits(0.0102314)
    ('57,296', '0.0102')
    """
    if number >= 100:
        return f"{number:,.0f}"
    return np.format_float_positional(number, 3, unique=False, fractional=False, trim="-")


@styled
def rope_scores(config: ModelConfig, *, n_distances: int = 64, seed: int = 0, ax: Axes | None = None) -> Axes:
    """Draw the score of one random query and one random key against their distance i - j, for several positions i.

    All curves are the same, since R(i)q · R(j)k = q · R(j - i)k. Query temperature is left out: it would scale the
    scores of late queries.
    """
    n_distances = checked_int("n_distances", n_distances, least=2)
    config, ops = config.replace(query_temperature=None), ReferenceOps("float64")
    rng = np.random.default_rng(checked_int("seed", seed, least=0))
    q_1K, k_1K = rng.standard_normal((2, 1, config.head_dim))
    distances_S = np.arange(n_distances)
    ax = axes_or_new(ax, 6.4, 3.2)
    styles = [
        {"color": PALE_BLUE, "lw": 6, "solid_capstyle": "butt"},
        {"color": BLUE, "lw": 2.2},
        {"color": INK, "lw": 1, "ls": (0, (2, 3))},
    ]
    for query, style in zip((n_distances, 4 * n_distances, 64 * n_distances), styles, strict=True):
        at_query, at_keys = (rotation(p, config, "float64") for p in (np.array([query]), query - distances_S))
        q_1HK = ops.rotate(q_1K[np.newaxis], at_query.query_cos, at_query.query_sin)
        k_SGK = ops.rotate(np.tile(k_1K, (n_distances, 1, 1)), at_keys.key_cos, at_keys.key_sin)
        scores_S = k_SGK[:, 0] @ q_1HK[0, 0] / np.sqrt(config.head_dim)
        ax.plot(distances_S, scores_S, label=f"query at position {query:,}", **style)  # type: ignore[arg-type]
    ax.set(xlabel="distance i − j from query to key", ylabel="score q' · k' / √K", xlim=(0, n_distances - 1))
    ax.spines[["top", "right"]].set_visible(False)
    title(ax, "RoPE: the score of one query and one key depends on their distance alone", ax.lines)
    return ax
