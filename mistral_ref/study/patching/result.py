"""Sweep: what each of many changes did to a metric, as numbers, a table and a picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mistral_ref.display import html_table, markdown_table
from mistral_ref.errors import InputError
from mistral_ref.heat_map import HeatMap, heat_image, heat_map, heat_text, legend

_N_SHOWN = 10  # how many changes the table shows


@dataclass(frozen=True)
class Sweep:
    """What a metric became with each of many changes; `patch` and `ablate` make it.

    rows, columns   what was changed: a step for each row, a head or a token for each column; or, by step, a layer for
                    each row and a step for each column
    values_RC       the metric with each change; NaN where there is nothing to change
    base            the metric without a change
    other           the metric of the other text; None for an ablation
    what            what was done to the numbers
    computed        how many tokens went through how many layers, added up over all passes
    naive           how many there would have been if each changed pass had gone from the first token and layer on
    """

    rows: list[str]
    columns: list[str]
    values_RC: np.ndarray
    base: float
    other: float | None
    what: str
    computed: int
    naive: int

    @property
    def change(self) -> np.ndarray:
        """By how much each change moved the metric, (R, C)."""
        return self.values_RC - self.base

    @property
    def share(self) -> np.ndarray:
        """How much of the way from the prompt's metric to the other text's each change goes, (R, C): 1 is all of it.

        Raises InputError without another text, or if the two metrics are equal.
        """
        if self.other is None or self.other == self.base:
            raise InputError(f"the metric is {self.base:.4g} and that of the other text {self.other}: there is no way")
        return self.change / (self.other - self.base)

    def top(self, n: int = _N_SHOWN) -> list[tuple[str, str, float]]:
        """Return the n changes that moved the metric most: row, column, and by how much."""
        sizes = np.where(np.isnan(self.change), -1, np.abs(self.change))
        order = np.argsort(-sizes, axis=None, kind="stable")[:n]
        places = [np.unravel_index(at, sizes.shape) for at in order if sizes.flat[at] >= 0]
        return [(self.rows[row], self.columns[column], float(self.change[row, column])) for row, column in places]

    def heat(self) -> HeatMap:
        """Return the change of the metric as a heat map of at most 64 by 64 cells."""
        return heat_map(np.where(np.isnan(self.change), -np.inf, self.change), 64, 64)

    def caption(self) -> str:
        """Return what was measured, as a sentence."""
        other = "" if self.other is None else f"; the other text's is {self.other:.4g}"
        return (
            f"by how much the metric changes if numbers are {self.what}; without a change it is {self.base:.4g}{other}"
        )

    def _top_rows(self) -> list[list[str]]:
        return [[f"{row}, {column}", f"{change:+.4g}"] for row, column, change in self.top()]

    def __str__(self) -> str:
        heat = self.heat()
        label = self.rows if len(heat.cells) == len(self.rows) else [""] * len(heat.cells)
        rows = [[name, line] for name, line in zip(label, heat_text(heat), strict=True)]
        columns = f"{self.columns[0]} to {self.columns[-1]}" if len(self.columns) > 1 else self.columns[0]
        top = markdown_table(["changed most by", "change"], self._top_rows())
        return f"{self.caption()}\n{markdown_table(['', columns], rows)}\n{legend(heat)}\n\n{top}"

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows: a picture, and the changes that moved the metric most."""
        table = html_table(["changed most by", "change"], self._top_rows(), caption=self.caption())
        return f"<div>{heat_image(self.heat(), 12)}{table}</div>"
