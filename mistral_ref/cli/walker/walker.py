"""Walker: the commands of a walk through a pass. Each goes somewhere, prints something, or changes a value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mistral_ref.cli.common import progress_bar
from mistral_ref.cli.walker.focus import Focus
from mistral_ref.cli.walker.selection import as_index
from mistral_ref.cli.walker.shell import Shell, count, needed, number
from mistral_ref.cli.walker.view import View
from mistral_ref.errors import InputError
from mistral_ref.study.stepper import Stepper

_SLOW = 10**10  # weights times steps to walk over, from which on a bar is shown


class Walker(Shell):
    """The commands of a walk."""

    order = (
        *("next", "back", "into", "out", "jump", "where", "show", "map", "top", "token", "head", "all", "source"),
        *("cost", "why", "zero", "scale", "set", "swap", "undo", "edits", "predict", "generate", "compare", "quit"),
        "help",
    )
    closing_line = "The beginning of a name will do. SEL chooses by axis: `head 3`, `token 0:4 dim 7`; -1 is the last."

    def __init__(self, stepper: Stepper) -> None:
        super().__init__()
        self.stepper, self.focus = stepper, Focus(stepper)
        self.view = View(stepper, self.focus)
        self.is_inside = False  # of a layer: going step by step, not layer by layer

    def say(self, text: str) -> None:
        """Print a text as it is."""
        self.view.say(text)

    def begin(self) -> None:
        """Say where one is, and how to go on."""
        self.view.greeting()
        self._arrive()

    def onecmd(self, line: str) -> bool:
        """Run one command. What an edit makes infinite or NaN is for the statistics to tell, not for NumPy."""
        with np.errstate(all="ignore"):
            return super().onecmd(line)

    def emptyline(self) -> bool:
        """Enter: the next one."""
        self.do_next("")
        return False

    def complete_jump(self, text: str, line: str, *ignored: object) -> list[str]:
        """Complete the name of a step, or its short name in the layer where one stands."""
        typed = line.partition(" ")[2].lstrip()
        layer = self.stepper.step.name.rpartition(".")[0]
        short = [
            name.removeprefix(f"{layer}.") for name in self.stepper.names if layer and name.startswith(f"{layer}.")
        ]
        return [name[len(typed) - len(text) :] for name in [*short, *self.stepper.names] if name.startswith(typed)]

    # ---- moving

    def do_next(self, arg: str) -> None:
        """next [N]: go on to the next step, or over the next layer (Enter does the same); N of them at once"""
        n, index, last = count(arg), self.stepper.index, len(self.stepper.names) - 1
        if index == last:
            self.say("this was the last step; `predict` tells what it means, `quit` leaves")
            return
        for _ in range(min(n, last)):
            index = min(index + 1 if self.is_inside else self._last_of(min(index + 1, last)), last)
        self._go(index)

    def do_back(self, arg: str) -> None:
        """back [N]: go to the step before, or to the layer before; N of them at once"""
        n, index = count(arg), self.stepper.index
        if index == 0:
            raise InputError("this is the first step")
        for _ in range(min(n, index)):
            first = self._first_of(index)
            index = max(index - 1 if self.is_inside or first == 0 else first - 1, 0)
        self._go(index)

    def do_into(self, arg: str) -> None:
        """into: go into this layer (from the embedding into the first), to its first step, and on step by step"""
        name = self.stepper.step.name
        if name in ("norm", "logits"):
            raise InputError(f"{name} is a step by itself; there is nothing to go into")
        self._go(self._first_of(1 if name == "embedding" else self.stepper.index), is_inside=True)

    def do_out(self, arg: str) -> None:
        """out: go to the end of this layer, and from there layer by layer"""
        self._go(self._last_of(self.stepper.index), is_inside=False)

    def do_jump(self, arg: str) -> None:
        """jump NAME: go to layers.2.heads; heads, in this layer; 2, a layer's first step; or the next of a glob"""
        self._go(self.stepper.find(needed(arg, "the name of a step")), is_inside=True)

    def do_where(self, arg: str) -> None:
        """where: list the steps of this layer, and mark where one stands"""
        first, last = self._first_of(self.stepper.index), self._last_of(self.stepper.index)
        edited = {edit.step for edit in self.stepper.edits}
        for index in range(first, last + 1):
            name = self.stepper.names[index]
            mark = ">" if index == self.stepper.index else " "
            self.say(f"{mark} {name}{'   edited' if name in edited else ''}")

    # ---- looking

    def do_show(self, arg: str) -> None:
        """show [SEL]: print the value as numbers; `show token 2 head 0` prints a part

        Of three axes the last token or query is taken, or head 0, unless SEL says; `show token : head :` is everything.
        """
        self.view.show(arg)

    def do_map(self, arg: str) -> None:
        """map [SEL]: draw the value as a heat map

        Of three axes the last token or query is taken, or head 0, unless SEL says.
        """
        self.view.map(arg)

    def do_top(self, arg: str) -> None:
        """top [SEL]: what stands out: the strongest keys, the likeliest next pieces, or the largest values"""
        self.view.top(arg)

    def do_token(self, arg: str) -> None:
        """token N: look at one token from now on, in show, map and top; `all` looks at everything again"""
        self._look_at("token", arg)

    def do_head(self, arg: str) -> None:
        """head N: look at one head from now on, in show, map and top; `all` looks at everything again"""
        self._look_at("head", arg)

    def do_all(self, arg: str) -> None:
        """all: look at all tokens and heads again"""
        self.focus.look_at_everything()
        self.say("looking at everything")

    def do_source(self, arg: str) -> None:
        """source: print the lines that computed this step"""
        self.view.source()

    def do_cost(self, arg: str) -> None:
        """cost [all]: what this step costs; `cost all`: every kind of step, by the machine's limits and by the clock"""
        if arg.strip() not in ("", "all"):
            raise InputError("cost takes nothing, or `all`")
        (self.view.costs if arg.strip() else self.view.cost)()

    def do_why(self, arg: str) -> None:
        """why: which heads and layers made the likeliest next token likely"""
        self.view.why()

    # ---- changing

    def do_zero(self, arg: str) -> None:
        """zero [SEL]: set the value to 0, or a part of it: `zero head 3`, `zero token 2`"""
        self._assign(arg, f"zero {arg}".strip(), np.zeros_like)

    def do_scale(self, arg: str) -> None:
        """scale FACTOR [SEL]: multiply the value, or a part of it"""
        factor, rest = number(arg, "a factor")
        self._assign(rest, f"scale {arg}", lambda part: part * part.dtype.type(factor))

    def do_set(self, arg: str) -> None:
        """set NUMBER [SEL]: set the value, or a part of it, to a number"""
        constant, rest = number(arg, "a number")
        self._assign(rest, f"set {arg}", lambda part: np.full_like(part, constant))

    def do_swap(self, arg: str) -> None:
        """swap AXIS I J: exchange two of an axis: `swap token 1 4` gives each of the tokens the other's activation"""
        words = arg.split()
        if len(words) != 3:
            raise InputError("swap takes an axis and two numbers, such as `swap token 1 4`")
        axes = self.stepper.step.axes
        chosen = [self.focus.selection(f"{words[0]} {word}", is_focused=False) for word in words[1:]]
        ((name, first),), ((_, second),) = (part.items() for part in chosen)
        if isinstance(first, slice) or isinstance(second, slice):
            raise InputError("swap takes two numbers, not ranges")
        if first == second:
            raise InputError(f"both are {name} {first}; swap takes two that differ")
        axis = axes.index(name)

        def swapped(value: np.ndarray) -> np.ndarray:
            order = np.arange(value.shape[axis])
            order[[first, second]] = second, first
            return value.take(order, axis)

        self._edit(f"swap {arg}", swapped)

    def do_undo(self, arg: str) -> None:
        """undo: take back the last change"""
        undone = self.stepper.undo()
        self.say(f"taken back: {undone.description} at {undone.step}")

    def do_edits(self, arg: str) -> None:
        """edits: list the changes made so far"""
        for edit in self.stepper.edits:
            self.say(f"  {edit.step}: {edit.description}")
        if not self.stepper.edits:
            self.say("nothing has been edited")

    # ---- what becomes of it

    def do_predict(self, arg: str) -> None:
        """predict: finish the pass and tell which tokens are likeliest next, with the changes and without"""
        self.view.predictions()

    def do_generate(self, arg: str) -> None:
        """generate [N]: go on writing, N tokens (20), with the changes and without; the likeliest token each time

        Every pass takes all tokens so far, and the changes are made in each: what was chosen by number stays chosen.
        """
        n = count(arg, default=20)
        is_long = self.stepper.model.config.n_parameters * n > _SLOW
        with progress_bar("writing", is_long=is_long) as progress:
            self.view.continuations(n, progress)

    def do_compare(self, arg: str) -> None:
        """compare: the edited pass beside the one without edits: how far each step departs"""
        self.view.comparison()

    def do_quit(self, arg: str) -> bool:
        """quit: leave (so does Ctrl-D)"""
        return True

    # ---- helpers

    def place(self) -> str:
        """Return the name of the step, or of the layer while one goes layer by layer."""
        name = self.stepper.step.name
        return name if self.is_inside else name.rpartition(".")[0] or name

    def _first_of(self, index: int) -> int:
        """Return the index of the first step of a layer; a step of no layer is its own."""
        layer = self.stepper.names[index].rpartition(".")[0]
        return self.stepper.names.index(f"{layer}.attention_norm") if layer else index

    def _last_of(self, index: int) -> int:
        layer = self.stepper.names[index].rpartition(".")[0]
        return self.stepper.names.index(f"{layer}.residual_after_ffn") if layer else index

    def _go(self, index: int, *, is_inside: bool | None = None) -> None:
        is_long = abs(index - self.stepper.index) * self.stepper.model.config.n_parameters > _SLOW
        with progress_bar("walking", is_long=is_long) as progress:
            self.stepper.go(index, progress)
        self.is_inside = self.is_inside if is_inside is None else is_inside  # only now: going there may be interrupted
        self._arrive()

    def _arrive(self) -> None:
        is_layer = self.stepper.step.name.startswith("layers.") and not self.is_inside
        (self.view.layer if is_layer else self.view.step)()

    def _look_at(self, axis: str, text: str) -> None:
        self.focus.look_at(axis, needed(text, f"the number of a {axis}, counted from 0"))
        self.say(f"looking at {', '.join(f'{name} {index}' for name, index in self.focus.looked_at.items())}")

    def _assign(self, text: str, description: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change the part of the value that words choose."""
        chosen = self.focus.selection(text, is_focused=False)
        index = as_index(chosen, self.stepper.step.axes)

        def changed(value: np.ndarray) -> np.ndarray:
            value[index] = change(value[index])
            return value

        self._edit(description + self.focus.readers(chosen), changed)

    def _edit(self, description: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.stepper.edit(description, function)
        self.say(f"{self.stepper.step.name}: {description}; now {self.stepper.step.statistics}")
