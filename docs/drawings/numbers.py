"""Pictures of chapters 8, 10 and 11 of the course: SwiGLU and experts, formats of numbers, time."""

from __future__ import annotations

from matplotlib.axes import Axes

import mistral_ref


def figures(model: mistral_ref.Model) -> dict[str, Axes]:
    """Return every picture by the name of its file."""
    return {}
