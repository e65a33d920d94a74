"""What a notebook shows of steps and traces."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.checkpoints import FAMILIES
from support.pages import Page
from support.tiny import model_of

from mistral_ref import Trace
from mistral_ref.display import size_text, statistics
from mistral_ref.steps import CATALOGUE, Step

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("family", ["dense_windowed", "mixtral_windowed"])
def test_every_step_is_shown_in_a_notebook(family: str) -> None:
    model = model_of(FAMILIES[family].config)
    trace = model.trace([5, 6, 7])
    for name, step in trace.steps.items():
        page = Page(step._repr_html_())
        assert page.tables == [
            [
                [name, ""],
                ["value", f"{size_text(step.axes, step.value.shape)}, float32"],
                ["formula", step.formula],
                ["meaning", step.sentence],
                ["statistics", str(step.statistics)],
                ["source", step.source],
            ]
        ]
        heads = [axis for axis in step.axes if axis in ("head", "kv_head")]
        assert len(page.images) == (step.value.shape[step.axes.index(heads[0])] if heads else 1)
        caption = page.texts[-1]
        rows, columns = (axis for axis in step.axes if axis not in heads)
        sizes = dict(zip(step.axes, step.value.shape, strict=True))
        assert f"rows: {rows} {sizes[rows]}; columns: {columns} {sizes[columns]};" in caption
        assert f"white 0, red up to {np.abs(step.value[np.isfinite(step.value)]).max():.4g}, blue down to" in caption
        assert ("a picture for each" in caption) == bool(heads)
        assert ("square-root scale" in caption) == name.endswith("attention_weights")
        assert ("grey: out of sight" in caption) == name.endswith("scores")
        assert step.statistics == statistics(step.value)
        assert repr(step) == f"<Step {name} ({size_text(step.axes, step.value.shape)}) float32: {step.formula}>"
    (table,) = Page(trace._repr_html_()).tables
    assert table[0] == ["step", "axes", "dtype", "statistics", "formula", "source"]
    assert [row[0] for row in table[1:]] == list(trace)
    assert [row[3] for row in table[1:]] == [str(step.statistics) for step in trace.steps.values()]
    assert [row[5] for row in table[1:]] == [step.source for step in trace.steps.values()]
    assert Page(trace._repr_html_()).texts[0] == repr(trace)
    assert Page(Trace([], [], [])._repr_html_()).tables == [[table[0]]]


def test_a_step_of_broken_values_is_shown_too() -> None:
    for value in (np.full((2, 3), NAN), np.full((2, 3), -INF), np.zeros((0, 3)), np.full((2, 3), 1e308)):
        step = Step("norm", CATALOGUE["norm"], value)
        page = Page(step._repr_html_())
        assert page.tables[0][4] == ["statistics", str(statistics(value))]
        assert len(page.images) == (value.size > 0)
