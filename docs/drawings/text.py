"""Pictures of chapters 1 to 3 and 9 of the course: from text to tokens, the residual stream, RMSNorm, sampling."""

from __future__ import annotations

from matplotlib.axes import Axes

import mistral_ref


def figures(model: mistral_ref.Model) -> dict[str, Axes]:
    """Return every picture by the name of its file."""
    return {}
