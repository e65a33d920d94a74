"""Pictures of chapters 4 to 7 of the course: RoPE, heads, the window, the ring."""

from __future__ import annotations

from matplotlib.axes import Axes

import mistral_ref


def figures(model: mistral_ref.Model) -> dict[str, Axes]:
    """Return every picture by the name of its file."""
    return {}
