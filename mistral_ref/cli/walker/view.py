"""View: prints everything about the step at which a walk stands."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from mistral_ref.cli.output import fit_for
from mistral_ref.cli.walker.focus import Focus, Selected
from mistral_ref.cli.walker.selection import as_index
from mistral_ref.cli.width import fitted, terminal_width
from mistral_ref.display import numbers, size_text
from mistral_ref.errors import InputError, Progress, printable, short_repr
from mistral_ref.heat_map import cell_ranges, heat_map, legend, merged_text, shade
from mistral_ref.measure.cost import step_costs
from mistral_ref.measure.cost_table import cost_table
from mistral_ref.study import lens
from mistral_ref.study.stepper import Stepper
from mistral_ref.walk import source_lines

_MAX_PIECES = 40  # how many pieces of a prompt the greeting shows
_MAX_ROWS = 512  # how many rows a heat map has; if a value has more, several of them share a row


class _Console(Console):
    """A console that raises BrokenPipeError if nobody reads its output; rich's own console would end the program."""

    def on_broken_pipe(self) -> None:
        """Raise the error that `main` expects."""
        raise BrokenPipeError


class View:
    """Prints the step at which a Stepper stands, or the part of its value that a focus chooses."""

    def __init__(self, stepper: Stepper, focus: Focus) -> None:
        self.stepper, self.focus, self.model = stepper, focus, stepper.model
        self.pieces, self.start = focus.pieces, focus.start
        self.console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.width = terminal_width()

    def say(self, text: str) -> None:
        """Print a text; a terminal gets lines that fit it."""
        self.console.print(Text(fitted(fit_for(self.console.file, text))))

    def greeting(self) -> None:
        """Print the model and the tokens of the walk, and how to begin."""
        self.say(f"{self.model!r}")
        pieces, n = self.pieces, len(self.pieces)
        if n > _MAX_PIECES:
            half = _MAX_PIECES // 2
            pieces = [*pieces[:half], f"... {n - 2 * half} more ...", *pieces[-half:]]
        self.say(f"{n} tokens from position {self.start}: {' '.join(pieces)}")
        self.say("Enter: next. into: into a layer. help: all commands. quit: leave.\n")

    def step(self) -> None:
        """Print a step: its axes, its formula, its meaning, its statistics and its source."""
        step = self.stepper.step
        self.say(f"{step.name}   {size_text(step.axes, step.value.shape)}, {step.value.dtype}")
        self.say(f"  {step.formula}\n  {step.sentence}\n  {step.statistics}\n  {step.source}")

    def layer(self) -> None:
        """Print a summary of a whole layer; the walk stands at the layer's last step."""
        layer = self.stepper.step.name.rpartition(".")[0]
        rms, number = self.stepper.rms, int(layer.split(".")[1])
        before = rms["embedding" if number == 0 else f"layers.{number - 1}.residual_after_ffn"]
        last_D = self.stepper.step.value[-1:]
        logits_V = lens.residual_logits(self.model, last_D)[0]
        following = nothing_likeliest(logits_V) or "next would be " + ", ".join(
            f"{piece} {percent(probability)}" for piece, probability in lens.likeliest(self.model, logits_V, 3)
        )
        self.say(
            f"{layer}   residual stream, rms {before:.3g}\n"
            f"  + attention, rms {rms[f'{layer}.attention_out']:.3g}\n"
            f"  + feed-forward, rms {rms[f'{layer}.ffn_out']:.3g}\n"
            f"  = residual stream, rms {rms[f'{layer}.residual_after_ffn']:.3g}\n"
            f"  if the model ended here: {following}"
        )

    def show(self, text: str) -> None:
        """Print a part of the value as numbers."""
        part = self.focus.selected(text, 2)
        self.say(self._heading(part))
        self.say(numbers(part.values, self.console.width))

    def map(self, text: str) -> None:
        """Draw a part of the value as a heat map."""
        part = self.focus.selected(text, 2, always=True)
        matrix = np.atleast_2d(part.values)
        rows = cell_ranges(len(matrix), _MAX_ROWS)
        labels = self._row_labels(part, rows) if part.values.ndim == 2 else [""]
        margin = max(map(cell_len, labels)) + 1
        columns = cell_ranges(matrix.shape[1], max(self.console.width - margin - 1, 16))
        is_weights = self.stepper.step.name.endswith("attention_weights")
        heat = heat_map(matrix, len(rows), len(columns), is_root=is_weights)
        cells = zip(part.axes[::-1], matrix.shape[::-1], (len(columns), len(rows)), strict=False)
        self.say(", ".join(filter(None, [self._heading(part), *(merged_text(*sizes) for sizes in cells)])))
        for label, row in zip(labels, heat.cells.tolist(), strict=True):
            line = Text(" " * (margin - 1 - cell_len(label)) + f"{label} ")
            for cell in row:
                line.append(shade(cell), "red" if cell > 0 else "bright_blue" if cell < 0 else "")
            self.console.print(line)
        if part.axes:
            at = part.at[part.axes[-1]]
            self.say(" " * margin + ruler([at[column.start] for column in columns]))
            pieces = self.focus.pieces_along(part.axes[-1])
            if pieces and len(columns) == len(at):
                self.say(in_lines(self._columns(at, pieces), self.console.width))
        self.say(legend(heat))

    def _columns(self, at: Sequence[int], pieces: Sequence[str]) -> list[str]:
        """Return the numbers of columns with their pieces; all keys from before this pass make one entry."""
        n_before = len(pieces) - len(self.pieces)
        before = [number for number in at if number < n_before]
        known = [f"{number} {pieces[number]}" for number in at if number >= n_before]
        return [f"{before[0]} to {before[-1]} {pieces[before[0]]} to {pieces[before[-1]]}", *known] if before else known

    def _row_labels(self, part: Selected, rows: Sequence[range]) -> list[str]:
        """Return a label for each row: a piece or a number; "FIRST to LAST" if the row merges several."""
        at, names = part.at[part.axes[0]], self.focus.names_along(part.axes[0])
        return [names[at[row.start]] if len(row) == 1 else f"{at[row.start]} to {at[row.stop - 1]}" for row in rows]

    def top(self, text: str) -> None:
        """Print the strongest keys, the likeliest next pieces, or the largest values, depending on the step."""
        step, kind = self.stepper.step, self.stepper.step.name.rpartition(".")[2]
        if kind in ("logits", "embedding") or kind.startswith("residual"):
            part = self.focus.selected(text, 1, always=True)
            if part.axes != step.axes[1:]:
                raise InputError(f"top takes whole tokens here, such as `top token 2`; found {short_repr(text)}")
            logits_V = part.values if kind == "logits" else lens.residual_logits(self.model, part.values[np.newaxis])[0]
            self.say(f"{step.name} {part.words}likeliest next{'' if kind == 'logits' else ', if the model ended here'}")
            self.say(self._likeliest(logits_V))
            return
        is_attention = kind in ("scores", "attention_weights")
        part = self.focus.selected(text, 1 if is_attention else 2)
        self.say(f"{step.name} {part.words}{'strongest keys' if is_attention else 'largest values'}")
        is_seen = np.isfinite(part.values)
        if kind == "attention_weights":
            is_seen &= self.focus.visible_keys()[as_index(part.chosen, step.axes)] | (part.values != 0)
        sizes = np.where(is_seen, part.values if is_attention else np.abs(part.values), -np.inf)
        keys = self.focus.names_along("key") if "key" in part.axes else []
        order = np.argsort(-sizes, axis=None, kind="stable")[: min(8, int(is_seen.sum()))]
        for flat in order:
            at = tuple(int(i) for i in np.unravel_index(flat, part.values.shape))
            numbers_at = {axis: part.at[axis][i] for axis, i in zip(part.axes, at, strict=True)}
            where = [keys[i] if axis == "key" else f"{axis} {i}" for axis, i in numbers_at.items()]
            self.say(f"  {part.values[at]:>10.4g}  {' '.join(where)}")
        if not order.size:
            self.say("no finite value to show here")

    def source(self) -> None:
        """Print the lines that computed the step."""
        source = self.stepper.step.source
        for number, text in source_lines(source, before=4, after=2):
            self.say(f"{'>' if source.endswith(f':{number}') else ' '} {number:>4}  {text}")

    def merges(self, at: int) -> None:
        """Print how the word of one token was merged."""
        tokenizer = self.model.tokenizer
        tokens = self.stepper.tokens
        if tokenizer is None:
            raise InputError("this model has no tokenizer; its tokens are ids")
        word = tokenizer.word_of(tokens, at) if tokens[at] < tokenizer.vocab_size else ""
        if not word:
            raise InputError(f"token {at} is {self.pieces[at]}, which is no part of a word")
        for parts in tokenizer.merges(word):
            self.say("  " + " ".join(parts))

    def cost(self) -> None:
        """Print the cost of the step: its operations, its bytes, and operations per byte."""
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
        """Print the cost of each kind of step: the time that the machine's limits predict, and the time measured."""
        self.say(cost_table(self.model, self.stepper.tokens, self.stepper.cache).text(self.width))

    def why(self) -> None:
        """Print which parts of the model made the likeliest next token likely."""
        trace = self.stepper.trace(["embedding", "layers.*.heads", "layers.*.ffn_out", "layers.*.residual_after_ffn"])
        self.say(str(lens.attribution(self.model, trace)))

    def predictions(self) -> None:
        """Print the likeliest next tokens, with the edits and without them."""
        without = self._likeliest(self.stepper.logits(edited=False)[-1])
        if self.stepper.edits:
            self.say(f"with the edits:\n{self._likeliest(self.stepper.logits()[-1])}\nwithout:\n{without}")
        else:
            self.say(f"likeliest next:\n{without}")

    def continuations(self, n: int, progress: Progress | None) -> None:
        """Print n tokens that continue the text, with the edits and without them."""
        sides = {"with the edits:": True, "without:": False} if self.stepper.edits else {"goes on:": False}
        lines: list[str] = []
        for heading, is_edited in sides.items():
            texts: list[str] = []
            for text in self.stepper.continuation(n, edited=is_edited):
                texts.append(printable(text))
                if progress:
                    progress(n * len(lines) + len(texts), n * len(sides))
            lines.append(f"{heading:<{max(map(len, sides))}} {''.join(texts)}")
        self.say("\n".join(lines))

    def comparison(self) -> None:
        """Print how far the steps of the edited pass depart from those of the pass without edits."""
        if not self.stepper.edits:
            self.say("nothing has been edited")
            return
        self.say(self.stepper.compare().text(every=False, width=self.width))

    def _likeliest(self, logits_V: np.ndarray) -> str:
        if why_none := nothing_likeliest(logits_V):
            return f"  {why_none}"
        choices = lens.likeliest(self.model, logits_V)
        return "\n".join(f"  {percent(probability):>8}  {piece}" for piece, probability in choices)

    def _heading(self, part: Selected) -> str:
        return f"{self.stepper.step.name} {part.words}{size_text(part.axes, part.values.shape)}"


def nothing_likeliest(logits_V: np.ndarray) -> str:
    """Return why no token is the likeliest; "" if a token is the likeliest."""
    if np.isfinite(logits_V.max()):
        return ""
    return f"the logits hold {'NaN' if np.isnan(logits_V).any() else 'infinity'}, so nothing is likeliest"


def percent(probability: float) -> str:
    """Return a probability in percent; a small one has two significant digits.

    >>> percent(0.25), percent(0.000123)
    ('25.0%', '0.012%')
    """
    return f"{probability:.1%}" if probability >= 0.001 else f"{100 * probability:.2g}%"


def ruler(at: Sequence[int]) -> str:
    """Return a line of numbers to print below columns: the number of every tenth column.

    >>> ruler(range(12))
    '0         10'
    """
    ticks = [(column, str(number)) for column, number in enumerate(at) if column % 10 == 0]
    return "".join(f"{tick:<10}" for column, tick in ticks if column + len(tick) <= max(len(at), 1)).rstrip()


def in_lines(texts: Sequence[str], width: int) -> str:
    """Return texts in lines of at most `width` cells; a text is never broken into two lines.

    >>> print(in_lines(["0 <s>", "1 ▁Once", "2 ▁upon"], 16))
    0 <s>  1 ▁Once
    2 ▁upon
    """
    lines = [""]
    for text in texts:
        joined = f"{lines[-1]}  {text}" if lines[-1] else text
        if lines[-1] and cell_len(joined) > width:
            lines.append(text)
        else:
            lines[-1] = joined
    return "\n".join(lines)
