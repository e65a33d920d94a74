"""What the figures of plots.py share: new axes, one plain style, and text that is drawn exactly as it is written.

This module uses matplotlib without pyplot, so there is no global state, no window, and nothing to close.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import cache, wraps
from typing import Any, ParamSpec

import numpy as np

from mistral_ref.errors import InputError

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont, get_font
    from matplotlib.image import AxesImage
    from matplotlib.lines import Line2D
    from matplotlib.patches import Circle, Patch, Rectangle
    from matplotlib.ticker import LogLocator
except ModuleNotFoundError:
    raise InputError("figures need matplotlib: pip install 'mistral-ref[plots]'") from None

__all__ = [  # includes the names of matplotlib that the figures need: only this module imports matplotlib
    "BLUE", "BLUES", "FAINT", "GREY", "INK", "PALE_BLUE", "SMALL", "UNSEEN", "VERMILLION", "Axes", "Circle", "Line2D",
    "LogLocator", "Patch", "PowerNorm", "Rectangle", "axes_or_new", "colour_scale", "label_ticks", "literal", "room",
    "spread", "styled", "title",
]  # fmt: skip

Parameters = ParamSpec("Parameters")

# The colours of Okabe and Ito: colour-blind readers can distinguish them. Lines differ not only in colour, so that a
# reader can also distinguish them in a grey print.
BLUE, PALE_BLUE, VERMILLION, ORANGE = "#0072B2", "#A9D0EA", "#D55E00", "#E69F00"
INK, GREY, FAINT = "#222222", "#777777", "#DDDDDD"
BLUES = LinearSegmentedColormap.from_list("blues", ["#FFFFFF", PALE_BLUE, BLUE, "#00263E"]).with_extremes(
    bad=(0, 0, 0, 0), over=ORANGE
)
UNSEEN: dict[str, Any] = {"facecolor": "#EEEEEE", "edgecolor": "#AAAAAA", "hatch": "//////", "lw": 0}  # unseen cells
SMALL = 7.5  # points: the font size of labels on ticks and in cells
_LINE = 1.35  # the height of a line of text, in font sizes
_FONT = "DejaVu Sans"  # comes with matplotlib
_STYLE: dict[Any, Any] = {
    "font.family": _FONT,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
    "text.usetex": False,  # else pieces would be read as TeX
}


class _Axes(Axes):
    """Axes for which a notebook shows their figure."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=110)  # type: ignore[union-attr]
        return file.getvalue()


def styled(draw: Callable[Parameters, Axes]) -> Callable[Parameters, Axes]:
    """Let a function draw in the style of these figures; the user's own matplotlib style does not matter."""

    @wraps(draw)
    def draw_styled(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Axes:
        with matplotlib.rc_context(_STYLE):
            ax = draw(*args, **kwargs)
        ax.tick_params(which="both", labelsize=SMALL)
        return ax

    return draw_styled


def axes_or_new(ax: Axes | None, width: float, height: float) -> Axes:
    """Return `ax`, or if it is None the axes of a new figure; its width and height are in inches."""
    return Figure((width, height), layout="compressed").add_subplot(axes_class=_Axes) if ax is None else ax


@cache
def _drawable() -> frozenset[int]:
    return frozenset(get_font(findfont(_FONT)).get_charmap())


def literal(text: str, most: int = 16) -> str:
    r"""Return a text so that matplotlib draws it as it is: dollars do not begin a formula.

    Control characters, and characters that the font lacks, become escapes. A text longer than `most` characters is cut
    and ends in an ellipsis.

    >>> print(literal("$x^2$"), literal("a\n"), literal("\N{ROCKET}"))
    \$x^2\$ a\u{a} \u{1f680}
    """
    chars = [char if char.isprintable() and ord(char) in _drawable() else f"\\u{{{ord(char):x}}}" for char in text]
    ends = np.cumsum([len(char) for char in chars])
    if chars and ends[-1] > most:
        chars = [*chars[: int(np.searchsorted(ends, most - 1, side="right"))], "…"]
    return "".join(chars).replace("$", r"\$")  # matplotlib draws \$ as $


def room(axis: Axis) -> float:
    """Return how many lines of small text fit beside each other along an axis."""
    box, figure = axis.axes.bbox, axis.axes.get_figure()
    assert figure is not None
    return float(72 * (box.width if axis.axis_name == "x" else box.height) / figure.dpi / (SMALL * _LINE))  # type: ignore[attr-defined]


def label_ticks(axis: Axis, labels: Sequence[str], at: Sequence[float] | None = None) -> None:
    """Put texts at 0, 1, 2, ... (or `at`) along an axis. If there is no room for all, only every n-th is shown."""
    kept = slice(None, None, max(1, int(np.ceil(len(labels) / room(axis)))))
    where = range(len(labels)) if at is None else at
    axis.set_ticks(where[kept], labels[kept])


def title(ax: Axes, text: str, handles: Sequence[Any] = (), n_rows: int = 1) -> None:
    """Give axes their title, and between the title and the frame a legend of `n_rows` rows."""
    ax.set_title(text, pad=SMALL * (1 + 1.4 * n_rows) if handles else None)
    if handles:
        legend = ax.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=-(-len(handles) // n_rows),
            borderaxespad=0.4, borderpad=0, labelspacing=0.3, columnspacing=1.2, handletextpad=0.7,
        )  # fmt: skip
        legend.set_in_layout(False)  # a legend wider than its axes reaches beyond them, and does not make them narrower


def colour_scale(image: AxesImage, label: str, ticks: Sequence[float] | None = None) -> None:
    """Draw a colour bar beside an image: it shows which value a colour means."""
    figure = image.axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=image.axes, label=label, ticks=ticks, shrink=0.8, aspect=30, pad=0.02)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)


def spread(wanted: Sequence[float], gap: float) -> np.ndarray:
    """Return positions from 0 to 1 that are at least `gap` apart, in the order of the wanted positions.

    They are as near to the wanted positions as possible, in the sense of least squares: positions that are too near
    each other form a group about their mean (isotonic regression). If there are too many, some are beyond 1.

    >>> spread([0.75, 0.25, 0.25], 0.25).tolist()
    [0.75, 0.125, 0.375]
    """
    order = np.argsort(wanted, kind="stable")
    offsets = gap * np.arange(len(order))
    groups: list[list[float]] = []
    for value in np.asarray(wanted)[order] - offsets:
        groups.append([value])
        while len(groups) > 1 and np.mean(groups[-2]) > np.mean(groups[-1]):
            groups[-2:] = [groups[-2] + groups[-1]]
    means = np.concatenate([[np.mean(group)] * len(group) for group in groups])
    placed = np.empty(len(order))
    placed[order] = np.clip(means, 0, max(0, 1 - offsets[-1])) + offsets
    return placed
