"""mistral-ref step: walk through a forward pass in the terminal, look at every tensor, change it, and go on."""

from __future__ import annotations

import argparse
import cmd
import linecache
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

import mistral_ref
from mistral_ref import lens
from mistral_ref.cli.common import add_compute_options, add_model_option, as_text, load_model, progress_bar
from mistral_ref.cli.selection import Index, axis_called, parsed_index, parsed_selection
from mistral_ref.cli.study import add_broken_option, add_last_option, maybe_broken, split_prompt
from mistral_ref.compare import HEADINGS
from mistral_ref.display import colours, heat_map, legend, markdown_table, numbers, shade, size_text
from mistral_ref.errors import InputError, MistralRefError, shown
from mistral_ref.stepper import Stepper

_EXAMPLES = """\
examples:
  mistral-ref step "Once upon a time"
  mistral-ref step --last 4 "Once upon a time there was a little girl"     the last 4 tokens, over a cache
  mistral-ref step --broken tiled-heads "Tom had a red ball"               with a bug in it
  printf 'jump 2\\njump heads\\nzero head 3\\npredict\\n' | mistral-ref step "Lily saw a"
"""
_ROOT = Path(mistral_ref.__file__).parents[1]
_SLOW = 10**10  # weights times steps to walk over, from which on a bar is shown


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser(
        "step",
        help="walk through a pass, tensor by tensor",
        description="Walk through the forward pass of a text: next, back, into a layer and out of it; look at every "
        "value as numbers or as a heat map; change it, and see what becomes of the prediction. `help` lists the "
        "commands, which may come over a pipe as well.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", help="the text to walk through")
    add_model_option(parser)
    add_compute_options(parser, backend="numpy")
    add_last_option(parser)
    add_broken_option(parser, "the model")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Walk until the reader has seen enough."""
    model = maybe_broken(load_model(arguments), arguments.broken)
    tokens, cache = split_prompt(model, as_text(arguments.prompt), arguments.last)
    Walker(Stepper(model, tokens, cache)).cmdloop()


class Walker(cmd.Cmd):
    """The commands of a walk, read from a terminal or a pipe."""

    doc_header = "commands (help COMMAND tells more; the first letter, or any beginning, will do)"
    ruler = ""

    def __init__(self, stepper: Stepper) -> None:
        super().__init__()
        self.stepper, self.model = stepper, stepper.model
        self.is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self.use_rawinput = self.is_terminal
        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.is_inside = False  # of a layer: going step by step, not layer by layer
        self.focus: dict[str, str] = {}  # axis -> index or slice, as typed
        self.start = 0 if stepper.cache is None else stepper.cache.length

    # ---- the loop

    @property
    def prompt(self) -> str:  # type: ignore[override]
        """What the terminal shows while it waits."""
        return f"({self._place()}) " if self.is_terminal else ""

    def preloop(self) -> None:
        """Say where one is, and how to go on."""
        pieces = [self.model.piece(token) for token in self.stepper.tokens]
        self._say(f"{self.model!r}")
        self._say(f"{len(pieces)} tokens from position {self.start}: {' '.join(pieces)}")
        self._say("Enter: next. into: into a layer. help: all commands. quit: leave.\n")
        self._arrive()

    def precmd(self, line: str) -> str:
        """Show a command that came over a pipe, so that what is printed reads as if it had been typed."""
        if not self.is_terminal and line != "EOF":
            self._say(f"({self._place()}) {line.rstrip()}")
        return line

    def onecmd(self, line: str) -> bool:
        """Run one command; a mistake is one line, and over a pipe the end."""
        try:
            return bool(super().onecmd(self._whole(line.strip())))
        except MistralRefError as error:
            if not self.is_terminal:
                raise
            self._say(str(error))
            return False

    def _whole(self, line: str) -> str:
        """Return a line with the beginning of a command made whole; the first that begins so, in order of use, wins."""
        match = re.match(r"[a-z]+", line)
        order = [*_ORDER, "help"]
        if match is None or match[0] in order:
            return line
        return next((name for name in order if name.startswith(match[0])), match[0]) + line[match.end() :]

    def default(self, line: str) -> None:
        """Refuse what is no command."""
        if line == "EOF":
            return
        raise InputError(f"{shown(line)} is no command; help lists them")

    def emptyline(self) -> bool:
        """Enter: the next one."""
        self.do_next("")
        return False

    def completenames(self, text: str, *ignored: object) -> list[str]:
        """Complete the name of a command."""
        return [name for name in [*_ORDER, "help"] if name.startswith(text)]

    def complete_jump(self, text: str, line: str, *ignored: object) -> list[str]:
        """Complete the name of a step."""
        typed = line.partition(" ")[2]
        return [name[len(typed) - len(text) :] for name in self.stepper.names if name.startswith(typed)]

    def do_help(self, arg: str) -> None:
        """help [COMMAND]: the list of commands, or what one does"""
        if arg:
            name = self._whole(arg)
            if name not in [*_ORDER, "help"]:
                raise InputError(f"{shown(arg)} is no command; help lists them")
            self._say(str(getattr(self, f"do_{name}").__doc__))
            return
        for name in [*_ORDER, "help"]:
            usage, _, meaning = (getattr(self, f"do_{name}").__doc__ or "").partition("\n")[0].partition(": ")
            self._say(f"  {usage:<28}{meaning}")
        self._say("The beginning of a name will do. SEL chooses by axis: `head 3`, `token 0:4 dim 7`; -1 is the last.")

    # ---- moving

    def do_next(self, arg: str) -> None:
        """next: go on to the next step, or over the next layer (Enter does the same)"""
        names, index = self.stepper.names, self.stepper.index
        if index == len(names) - 1:
            self._say("this was the last step; `predict` tells what it means, `quit` leaves")
            return
        self._go(index + 1 if self.is_inside else self._last_of(index + 1))

    def do_back(self, arg: str) -> None:
        """back: go to the step before, or to the layer before"""
        index = self.stepper.index
        if index == 0:
            raise InputError("this is the first step")
        first = self._first_of(index)
        self._go(index - 1 if self.is_inside or first == 0 else first - 1)

    def do_into(self, arg: str) -> None:
        """into: go into this layer, to its first step, and from there step by step"""
        self.is_inside = True
        self._go(self._first_of(self.stepper.index))

    def do_out(self, arg: str) -> None:
        """out: go to the end of this layer, and from there layer by layer"""
        self.is_inside = False
        self._go(self._last_of(self.stepper.index))

    def do_jump(self, arg: str) -> None:
        """jump NAME: go to layers.2.heads; heads, in this layer; 2, a layer's first step; or the next of a glob"""
        index = self.stepper.find(_needed(arg, "the name of a step"))
        self.is_inside = True
        self._go(index)

    def do_where(self, arg: str) -> None:
        """where: list the steps of this layer, and mark where one stands"""
        first, last = self._first_of(self.stepper.index), self._last_of(self.stepper.index)
        edited = {edit.step for edit in self.stepper.edits}
        for index in range(first, last + 1):
            name = self.stepper.names[index]
            mark = ">" if index == self.stepper.index else " "
            self._say(f"{mark} {name}{'   edited' if name in edited else ''}")

    # ---- looking

    def do_show(self, arg: str) -> None:
        """show [SEL]: print the value as numbers; `show token 2 head 0` prints a part"""
        values, axes, chosen = self._selected(arg)
        self._say(f"{self.stepper.step.name} {chosen}{size_text(axes, values.shape)}")
        self._say(numbers(values, self.console.width))

    def do_map(self, arg: str) -> None:
        """map [SEL]: draw the value as a heat map; of a value with three axes one matrix, the first unless SEL says"""
        values, axes, chosen = self._selected(arg)
        while values.ndim > 2:
            chosen += f"{axes[0]} 0 of {len(values)}, "
            values, axes = values[0], axes[1:]
        rows = self._labels(axes[0]) if values.ndim == 2 and len(values) == len(self._labels(axes[0])) else []
        margin = max((len(label) for label in rows), default=0) + 1
        heat = heat_map(values, max(self.console.height - 8, 16), max(self.console.width - margin - 1, 16))
        self._say(f"{self.stepper.step.name} {chosen}{size_text(axes, values.shape)}")
        rows = rows if len(rows) == len(heat.cells) else [""] * len(heat.cells)
        for label, cells, row in zip(rows, heat.cells, colours(heat.cells), strict=True):
            line = Text(f"{label:>{margin - 1}} ")
            for cell, (red, green, blue) in zip(cells.tolist(), row.tolist(), strict=True):
                line.append(shade(cell), f"rgb({red},{green},{blue})" if abs(cell) > 0 else "")
            self.console.print(line)
        self._say(legend(heat))

    def do_top(self, arg: str) -> None:
        """top [SEL]: what stands out: the strongest keys, the likeliest next pieces, or the largest values"""
        step, kind = self.stepper.step, self.stepper.step.name.rpartition(".")[2]
        if kind in ("logits", "embedding") or kind.startswith("residual"):
            values, _, _ = self._selected(arg, most_axes=1, default="-1")
            logits_V = values if kind == "logits" else lens.residual_logits(self.model, values[np.newaxis])[0]
            self._say("likeliest next, were the model to end here:" if kind != "logits" else "likeliest next:")
            self._say(_probabilities(lens.likeliest(self.model, logits_V)))
            return
        values, axes, chosen = self._selected(arg, most_axes=1 if kind == "attention_weights" else 3, default="-1")
        order = np.argsort(-np.abs(np.where(np.isfinite(values), values, 0.0)).ravel(), kind="stable")[:8]
        self._say(f"{step.name} {chosen}largest values")
        labels = self._labels(axes[-1]) if kind == "attention_weights" else []
        for flat in order:
            at = tuple(int(i) for i in np.unravel_index(flat, values.shape))
            where = labels[at[-1]] if labels else " ".join(f"{axis} {i}" for axis, i in zip(axes, at, strict=True))
            self._say(f"  {values[at]:>10.4g}  {where}")

    def do_token(self, arg: str) -> None:
        """token N: look at one token from now on, in show, map and top; `all` looks at everything again"""
        self.focus["token"] = _needed(arg, "a token's number, counted from 0")
        self._say(f"looking at {self._focus_text()}")

    def do_head(self, arg: str) -> None:
        """head N: look at one head from now on, in show, map and top; `all` looks at everything again"""
        self.focus["head"] = _needed(arg, "a head's number, counted from 0")
        self._say(f"looking at {self._focus_text()}")

    def do_all(self, arg: str) -> None:
        """all: look at all tokens and heads again"""
        self.focus.clear()
        self._say("looking at everything")

    def do_source(self, arg: str) -> None:
        """source: print the lines that computed this step"""
        file, _, line = self.stepper.step.source.rpartition(":")
        for number in range(max(int(line) - 4, 1), int(line) + 3):
            if text := linecache.getline(str(_ROOT / file), number):
                self._say(f"{'>' if number == int(line) else ' '} {number:>4}  {text.rstrip()}")

    # ---- changing

    def do_zero(self, arg: str) -> None:
        """zero [SEL]: set the value to 0, or a part of it: `zero head 3`, `zero token 2`"""
        self._assign(arg, f"zero {arg}".strip(), np.zeros_like)

    def do_scale(self, arg: str) -> None:
        """scale FACTOR [SEL]: multiply the value, or a part of it"""
        factor, rest = _number(arg, "a factor")
        self._assign(rest, f"scale {arg}", lambda part: part * part.dtype.type(factor))

    def do_set(self, arg: str) -> None:
        """set NUMBER [SEL]: set the value, or a part of it, to a number"""
        number, rest = _number(arg, "a number")
        self._assign(rest, f"set {arg}", lambda part: np.full_like(part, number))

    def do_swap(self, arg: str) -> None:
        """swap AXIS I J: exchange two of an axis: `swap token 1 4` gives each of the tokens the other's activation"""
        words = arg.split()
        if len(words) != 3:
            raise InputError("swap takes an axis and two numbers, such as `swap token 1 4`")
        axes = self.stepper.step.axes
        axis = axes.index(axis_called(words[0], axes))
        size = self.stepper.step.value.shape[axis]
        first, second = (parsed_index(word, axes[axis], size) for word in words[1:])
        if isinstance(first, slice) or isinstance(second, slice):
            raise InputError("swap takes two numbers, not ranges")

        def swapped(value: np.ndarray) -> np.ndarray:
            order = np.arange(size)
            order[[first, second]] = second, first
            return value.take(order, axis)

        self._edit(f"swap {arg}", swapped)

    def do_undo(self, arg: str) -> None:
        """undo: take back the last change"""
        undone = self.stepper.undo()
        self._say(f"taken back: {undone.description} at {undone.step}")

    def do_edits(self, arg: str) -> None:
        """edits: list the changes made so far"""
        for edit in self.stepper.edits:
            self._say(f"  {edit.step}: {edit.description}")
        if not self.stepper.edits:
            self._say("nothing has been edited")

    # ---- what becomes of it

    def do_predict(self, arg: str) -> None:
        """predict: finish the pass and tell which tokens are likeliest next, with the changes and without"""
        without = _probabilities(lens.likeliest(self.model, self.stepper.logits(edited=False)[-1]))
        if not self.stepper.edits:
            self._say(f"likeliest next:\n{without}")
            return
        self._say(f"with the edits:\n{_probabilities(lens.likeliest(self.model, self.stepper.logits()[-1]))}")
        self._say(f"without:\n{without}")

    def do_compare(self, arg: str) -> None:
        """compare: the edited pass beside the one without edits: how far each step departs"""
        comparison = self.stepper.compare()
        self._say(f"{markdown_table(HEADINGS, comparison.furthest_by_layer().rows())}\n{comparison.verdict()}")

    def do_quit(self, arg: str) -> bool:
        """quit: leave (so does Ctrl-D)"""
        return True

    def do_EOF(self, arg: str) -> bool:  # noqa: N802 (the name that cmd asks for)
        """Leave at the end of the input."""
        if self.is_terminal:
            self._say("")
        return True

    # ---- helpers

    def _say(self, text: str) -> None:
        self.console.print(Text(text))

    def _place(self) -> str:
        name = self.stepper.step.name
        return name if self.is_inside else name.rpartition(".")[0] or name

    def _first_of(self, index: int) -> int:
        """Return the index of the first step of a layer; a step of no layer is its own."""
        layer = self.stepper.names[index].rpartition(".")[0]
        return self.stepper.names.index(f"{layer}.attention_norm") if layer else index

    def _last_of(self, index: int) -> int:
        layer = self.stepper.names[index].rpartition(".")[0]
        return self.stepper.names.index(f"{layer}.residual_after_ffn") if layer else index

    def _go(self, index: int) -> None:
        is_long = abs(index - self.stepper.index) * self.model.config.n_parameters > _SLOW
        with progress_bar("walking", is_long=is_long) as progress:
            self.stepper.go(index, progress)
        self._arrive()

    def _arrive(self) -> None:
        """Print what there is to say of the place where one stands: of a step, or of a whole layer."""
        step = self.stepper.step
        layer = step.name.rpartition(".")[0]
        if layer and not self.is_inside:
            self._say_layer(layer)
            return
        self._say(f"{step.name}   {size_text(step.axes, step.value.shape)}, {step.value.dtype}")
        self._say(f"  {step.formula}\n  {step.sentence}\n  {step.statistics}\n  {step.source}")

    def _say_layer(self, layer: str) -> None:
        rms, number = self.stepper.rms, int(layer.split(".")[1])
        before = rms["embedding" if number == 0 else f"layers.{number - 1}.residual_after_ffn"]
        last_D = self.stepper.step.value[-1:]
        choices = lens.likeliest(self.model, lens.residual_logits(self.model, last_D)[0], 3)
        self._say(
            f"{layer}   residual stream, rms {before:.3g}\n"
            f"  + attention, rms {rms[f'{layer}.attention_out']:.3g}\n"
            f"  + feed-forward, rms {rms[f'{layer}.ffn_out']:.3g}\n"
            f"  = residual stream, rms {rms[f'{layer}.residual_after_ffn']:.3g}\n"
            f"  were the model to end here, next would be {', '.join(f'{piece} {p:.2f}' for piece, p in choices)}"
        )

    def _labels(self, axis: str) -> list[str]:
        """Return the pieces along an axis of tokens or keys; of keys before this pass only the position is known."""
        pieces = [self.model.piece(token) for token in self.stepper.tokens]
        keys = self.stepper.step.key_positions
        if axis == "key" and keys is not None:
            return [*(f"@{position}" for position in range(keys.start, self.start)), *pieces][-len(keys) :]
        return pieces if axis in ("token", "query") else []

    def _focus_text(self) -> str:
        return ", ".join(f"{axis} {index}" for axis, index in self.focus.items())

    def _selection(self, text: str, *, is_focused: bool) -> dict[str, Index]:
        """Return what words choose of the present step, after what one is looking at for now."""
        step = self.stepper.step
        chosen: dict[str, Index] = {}
        for axis, index in self.focus.items() if is_focused else ():
            if any(name in step.axes for name in _FOCUS_AXES[axis]):
                chosen |= parsed_selection(f"{axis} {index}", step.axes, step.value.shape)
        return chosen | parsed_selection(text, step.axes, step.value.shape)

    def _selected(self, text: str, most_axes: int = 3, default: str = "") -> tuple[np.ndarray, list[str], str]:
        """Return a part of the present value, the axes that it still has, and in words what was chosen.

        Where more than `most_axes` are left, the first ones are taken at `default`.
        """
        step = self.stepper.step
        chosen = self._selection(text, is_focused=True)
        for axis in step.axes:
            if sum(isinstance(chosen.get(axis, slice(None)), slice) for axis in step.axes) > most_axes:
                chosen[axis] = parsed_index(default, axis, step.value.shape[step.axes.index(axis)])
        values = step.value[_as_index(chosen, step.axes)]
        left = [axis for axis in step.axes if isinstance(chosen.get(axis, slice(None)), slice)]
        words = [f"{axis} {_in_words(index)}, " for axis, index in chosen.items()]
        return values, left, "".join(words)

    def _assign(self, text: str, description: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change the part of the value that words choose."""
        index = _as_index(self._selection(text, is_focused=False), self.stepper.step.axes)

        def changed(value: np.ndarray) -> np.ndarray:
            value[index] = change(value[index])
            return value

        self._edit(description, changed)

    def _edit(self, description: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.stepper.edit(description, function)
        self._say(f"{self.stepper.step.name}: {description}; now {self.stepper.step.statistics}")


# What one means by looking at a token or a head: the axes of these names.
_FOCUS_AXES = {"token": ("token", "query"), "head": ("head", "kv_head")}
# The commands in the order of the help text; of several that begin alike the first is meant.
_ORDER = (
    *("next", "back", "into", "out", "jump", "where", "show", "map", "top", "token", "head", "all", "source"),
    *("zero", "scale", "set", "swap", "undo", "edits", "predict", "compare", "quit"),
)


def _as_index(chosen: dict[str, Index], axes: Sequence[str]) -> tuple[Index, ...]:
    return tuple(chosen.get(axis, slice(None)) for axis in axes)


def _in_words(index: Index) -> str:
    return f"{index.start}:{index.stop}" if isinstance(index, slice) else str(index)


def _needed(text: str, what: str) -> str:
    if not text.strip():
        raise InputError(f"expected {what}")
    return text.strip()


def _number(text: str, what: str) -> tuple[float, str]:
    """Return the number that a line begins with, and the rest of the line."""
    first, _, rest = text.strip().partition(" ")
    try:
        return float(first), rest
    except ValueError:
        raise InputError(f"expected {what}, found {shown(first)}") from None


def _probabilities(choices: list[tuple[str, float]]) -> str:
    return "\n".join(f"  {probability:>6.1%}  {piece}" for piece, probability in choices)
