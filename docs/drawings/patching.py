"""The picture of chapter 14 of the course: where a fact is, and which heads carry it."""

from __future__ import annotations

from matplotlib.figure import Figure

import mistral_ref
from mistral_ref.study import patching, plots
from mistral_ref.study.drawing import Axes


def figures(model: mistral_ref.Model) -> dict[str, Axes]:
    """Return the picture by the name of its file."""
    she, he = (model.token_ids(f"and {word}")[-1] for word in ("she", "he"))
    tom, lily = (f"{name} went to the park. Then" for name in ("Tom", "Lily"))
    left, right = Figure((11.6, 3.3), layout="constrained").subplots(1, 2)
    plots.sweep(patching.patch(model, tom, lily, by="token", metric=(she, he)), share=True, ax=left)
    plots.sweep(patching.patch(model, tom, lily, by="head", token=-1, metric=(she, he)), share=True, ax=right)
    return {"course_14_patching": right}
