"""What the walk in the terminal shows of the place where one stands."""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

import mistral_ref
from mistral_ref import lens
from mistral_ref.cli.selection import Index, parsed_index, parsed_selection
from mistral_ref.compare import HEADINGS
from mistral_ref.cost import step_costs
from mistral_ref.cost_table import cost_table
from mistral_ref.display import heat_map, legend, markdown_table, numbers, shade, size_text
from mistral_ref.errors import InputError
from mistral_ref.stepper import Stepper

_ROOT = Path(mistral_ref.__file__).parents[1]
# What one means by looking at a token or a head: the axes of these names.
_FOCUS_AXES = {"token": ("token", "query"), "head": ("head",)}


class View:
    """Prints a Stepper's place.

    focus   axis -> index or slice, as typed: what of a value one is looking at for now
    start   position of the pass's first token
    """

    def __init__(self, stepper: Stepper) -> None:
        self.stepper, self.model = stepper, stepper.model
        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.focus: dict[str, str] = {}
        self.start = 0 if stepper.cache is None else stepper.cache.length
        self.pieces = [self.model.piece(token) for token in stepper.tokens]

    def say(self, text: str) -> None:
        """Print a text as it is."""
        self.console.print(Text(text))

    def greeting(self) -> None:
        """Print what is walked through, and how to begin."""
        self.say(f"{self.model!r}")
        self.say(f"{len(self.pieces)} tokens from position {self.start}: {' '.join(self.pieces)}")
        self.say("Enter: next. into: into a layer. help: all commands. quit: leave.\n")

    def step(self) -> None:
        """Print what there is to say of a step."""
        step = self.stepper.step
        self.say(f"{step.name}   {size_text(step.axes, step.value.shape)}, {step.value.dtype}")
        self.say(f"  {step.formula}\n  {step.sentence}\n  {step.statistics}\n  {step.source}")

    def layer(self) -> None:
        """Print what there is to say of a whole layer, at whose end one stands."""
        layer = self.stepper.step.name.rpartition(".")[0]
        rms, number = self.stepper.rms, int(layer.split(".")[1])
        before = rms["embedding" if number == 0 else f"layers.{number - 1}.residual_after_ffn"]
        last_D = self.stepper.step.value[-1:]
        choices = lens.likeliest(self.model, lens.residual_logits(self.model, last_D)[0], 3)
        self.say(
            f"{layer}   residual stream, rms {before:.3g}\n"
            f"  + attention, rms {rms[f'{layer}.attention_out']:.3g}\n"
            f"  + feed-forward, rms {rms[f'{layer}.ffn_out']:.3g}\n"
            f"  = residual stream, rms {rms[f'{layer}.residual_after_ffn']:.3g}\n"
            f"  were the model to end here, next would be {', '.join(f'{piece} {p:.2f}' for piece, p in choices)}"
        )

    def show(self, text: str) -> None:
        """Print a part of the value as numbers."""
        values, axes, chosen = self._selected(text)
        self.say(f"{self.stepper.step.name} {chosen}{size_text(axes, values.shape)}")
        self.say(numbers(values, self.console.width))

    def map(self, text: str) -> None:
        """Draw a part of the value as a heat map; of three axes the first is taken at 0."""
        values, axes, chosen = self._selected(text)
        while values.ndim > 2:
            chosen += f"{axes[0]} 0 of {len(values)}, "
            values, axes = values[0], axes[1:]
        rows = self._labels(axes[0]) if values.ndim == 2 and len(values) == len(self._labels(axes[0])) else []
        margin = max((cell_len(label) for label in rows), default=0) + 1
        heat = heat_map(values, max(self.console.height - 8, 16), max(self.console.width - margin - 1, 16))
        self.say(f"{self.stepper.step.name} {chosen}{size_text(axes, values.shape)}")
        rows = rows if len(rows) == len(heat.cells) else [""] * len(heat.cells)
        for label, cells in zip(rows, heat.cells.tolist(), strict=True):
            line = Text(" " * (margin - 1 - cell_len(label)) + f"{label} ")
            for cell in cells:
                line.append(shade(cell), "red" if cell > 0 else "bright_blue" if cell < 0 else "")
            self.console.print(line)
        self.say(legend(heat))

    def top(self, text: str) -> None:
        """Print what stands out: the strongest keys, the likeliest next pieces, or the largest values."""
        step, kind = self.stepper.step, self.stepper.step.name.rpartition(".")[2]
        if kind in ("logits", "embedding") or kind.startswith("residual"):
            values, _, chosen = self._selected(text, most_axes=1, default="-1")
            logits_V = values if kind == "logits" else lens.residual_logits(self.model, values[np.newaxis])[0]
            self.say(f"{step.name} {chosen}likeliest next{'' if kind == 'logits' else ', were the model to end here'}")
            self.say(self._likeliest(logits_V))
            return
        values, axes, chosen = self._selected(text, most_axes=1 if kind == "attention_weights" else 3, default="-1")
        order = np.argsort(-np.abs(np.where(np.isfinite(values), values, 0.0)).ravel(), kind="stable")[:8]
        self.say(f"{step.name} {chosen}largest values")
        labels = self._labels(axes[-1]) if kind == "attention_weights" else []
        for flat in order:
            at = tuple(int(i) for i in np.unravel_index(flat, values.shape))
            where = labels[at[-1]] if labels else " ".join(f"{axis} {i}" for axis, i in zip(axes, at, strict=True))
            self.say(f"  {values[at]:>10.4g}  {where}")

    def source(self) -> None:
        """Print the lines that computed the step."""
        file, _, line = self.stepper.step.source.rpartition(":")
        for number in range(max(int(line) - 4, 1), int(line) + 3):
            if text := linecache.getline(str(_ROOT / file), number):
                self.say(f"{'>' if number == int(line) else ' '} {number:>4}  {text.rstrip()}")

    def cost(self) -> None:
        """Print what the step costs: operations, bytes, and how many of the one there are for each of the other."""
        costs = step_costs(self.model.config, self.model.weights, len(self.pieces), self.start)
        name = self.stepper.step.name
        found = [cost for cost in costs if cost.name == name]
        if not found:
            raise InputError(f"{name} is a part of attention; its cost counts with `heads`")
        cost = found[0]
        self.say(
            f"{name}   {cost.flops:,} operations, {cost.weight_bytes:,} bytes of weights, "
            f"{cost.other_bytes:,} of activations and cache: {cost.intensity:.2f} operations a byte"
        )

    def costs(self) -> None:
        """Print what each kind of step costs, by the machine's limits and by the clock."""
        self.say(str(cost_table(self.model, self.stepper.tokens, self.stepper.cache)))

    def why(self) -> None:
        """Print which parts of the model made the likeliest next token likely."""
        trace = self.stepper.trace(["embedding", "layers.*.heads", "layers.*.ffn_out", "layers.*.residual_after_ffn"])
        self.say(str(lens.attribution(self.model, trace)))

    def predictions(self) -> None:
        """Print which tokens are likeliest next, with the edits and without."""
        without = self._likeliest(self.stepper.logits(edited=False)[-1])
        if self.stepper.edits:
            self.say(f"with the edits:\n{self._likeliest(self.stepper.logits()[-1])}\nwithout:\n{without}")
        else:
            self.say(f"likeliest next:\n{without}")

    def comparison(self) -> None:
        """Print how far the edited pass departs from the one without edits."""
        comparison = self.stepper.compare()
        self.say(f"{markdown_table(HEADINGS, comparison.furthest_by_layer().rows())}\n{comparison.verdict()}")

    def _likeliest(self, logits_V: np.ndarray) -> str:
        choices = lens.likeliest(self.model, logits_V)
        return "\n".join(f"  {probability:>6.1%}  {piece}" for piece, probability in choices)

    def _labels(self, axis: str) -> list[str]:
        """Return the pieces along an axis of tokens or keys; of keys before this pass only the position is known."""
        keys = self.stepper.step.key_positions
        if axis == "key" and keys is not None:
            return [*(f"@{position}" for position in range(keys.start, self.start)), *self.pieces][-len(keys) :]
        return self.pieces if axis in ("token", "query") else []

    def selection(self, text: str, *, is_focused: bool) -> dict[str, Index]:
        """Return what words choose of the present step, after what one is looking at for now."""
        step = self.stepper.step
        sizes = dict(zip(step.axes, step.value.shape, strict=True))
        chosen: dict[str, Index] = {}
        for axis, index in self.focus.items() if is_focused else ():
            if "kv_head" in sizes and axis == "head":  # the one that these query heads read
                group = self.model.config.n_heads // sizes["kv_head"]
                heads = (
                    np.arange(self.model.config.n_heads)[parsed_index(index, axis, self.model.config.n_heads)] // group
                )
                chosen["kv_head"] = slice(heads.min(), heads.max() + 1) if heads.ndim else int(heads)
            elif found := [name for name in _FOCUS_AXES[axis] if name in sizes]:
                chosen[found[0]] = parsed_index(index, found[0], sizes[found[0]])
        return chosen | parsed_selection(text, step.axes, step.value.shape)

    def _selected(self, text: str, most_axes: int = 3, default: str = "") -> tuple[np.ndarray, list[str], str]:
        """Return a part of the present value, the axes that it still has, and in words what was chosen.

        Where more than `most_axes` are left, the first ones are taken at `default`.
        """
        step = self.stepper.step
        chosen = self.selection(text, is_focused=True)
        for axis in step.axes:
            if sum(isinstance(chosen.get(axis, slice(None)), slice) for axis in step.axes) > most_axes:
                chosen[axis] = parsed_index(default, axis, step.value.shape[step.axes.index(axis)])
        values = step.value[as_index(chosen, step.axes)]
        left = [axis for axis in step.axes if isinstance(chosen.get(axis, slice(None)), slice)]
        words = [f"{axis} {_in_words(index)}, " for axis, index in chosen.items()]
        return values, left, "".join(words)


def as_index(chosen: dict[str, Index], axes: Sequence[str]) -> tuple[Index, ...]:
    """Return what chooses the same from an array: an index or a slice for every axis."""
    return tuple(chosen.get(axis, slice(None)) for axis in axes)


def _in_words(index: Index) -> str:
    return f"{index.start}:{index.stop}" if isinstance(index, slice) else str(index)
