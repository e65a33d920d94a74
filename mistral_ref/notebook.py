"""What a notebook shows of the steps of a pass: tables of facts, and pictures of values."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np

from mistral_ref.display import html_table, size_text, statistics
from mistral_ref.heat_map import heat_figure

_MAX_SUMMARISED = 2**26  # bytes of values; above this the table of a trace has no statistics, to stay fast


class ShownStep(Protocol):
    """The attributes of a step that tables and pictures in a notebook need."""

    @property
    def name(self) -> str: ...
    @property
    def axes(self) -> tuple[str, ...]: ...
    @property
    def value(self) -> np.ndarray: ...
    @property
    def formula(self) -> str: ...
    @property
    def sentence(self) -> str: ...
    @property
    def source(self) -> str: ...


def step_html(step: ShownStep) -> str:
    """Return the HTML that a notebook shows for a step: a table of its facts, and its values as images.

    A value with a head axis gets one image for each head.
    """
    rows = [
        ["value", f"{size_text(step.axes, step.value.shape)}, {step.value.dtype}"],
        ["formula", step.formula],
        ["meaning", step.sentence],
        ["statistics", str(statistics(step.value))],
    ]
    rows += [["source", step.source]] if step.source else []
    head_axis = next((axis for axis in step.axes if axis in ("head", "kv_head")), None)
    picture = heat_figure(step.value, step.axes, head_axis, is_root=step.name.endswith("attention_weights"))
    return f"<div>{html_table([step.name, ''], rows)}{picture}</div>"


def steps_html(steps: Collection[ShownStep], caption: str) -> str:
    """Return the HTML table that a notebook shows for several steps; it has no statistics above 64 MiB of values."""
    is_small = sum(step.value.nbytes for step in steps) <= _MAX_SUMMARISED
    rows = [
        [
            step.name,
            size_text(step.axes, step.value.shape),
            str(step.value.dtype),
            str(statistics(step.value)) if is_small else "",
            step.formula,
            step.source,
        ]
        for step in steps
    ]
    return html_table(["step", "axes", "dtype", "statistics", "formula", "source"], rows, caption=caption)
