"""Walker: the commands of a walk through a pass. They move, print something, or change a value."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mistral_ref.cli.common import progress_bar
from mistral_ref.cli.walker.commands import COMMANDS
from mistral_ref.cli.walker.focus import Focus
from mistral_ref.cli.walker.selection import as_index, parsed_index
from mistral_ref.cli.walker.shell import Shell, count, needed, number
from mistral_ref.cli.walker.view import View
from mistral_ref.errors import InputError
from mistral_ref.study.stepper import Stepper

_SLOW = 10**10  # a bar is shown if weights times steps (or tokens) are more than this


class Walker(Shell):
    """The commands of a walk; commands.py says what each of them does."""

    commands = COMMANDS
    closing_line = (
        "Names may be shortened. SEL is a part, by axis and index: `head 3`, `token 0:4 dim 7`; -1 is the last."
    )

    def __init__(self, stepper: Stepper) -> None:
        super().__init__()
        self.stepper, self.focus = stepper, Focus(stepper)
        self.view = View(stepper, self.focus)
        self.is_inside = False  # inside a layer: the walk goes step by step, not layer by layer

    def say(self, text: str) -> None:
        """Print a text without changing it."""
        self.view.say(text)

    def begin(self) -> None:
        """Print the greeting and the first step."""
        self.view.greeting()
        self._arrive()

    def onecmd(self, line: str) -> bool:
        """Run one command. NumPy's warnings are off: the statistics show if an edit makes values infinite or NaN."""
        with np.errstate(all="ignore"):
            return super().onecmd(line)

    def emptyline(self) -> bool:
        """Run `next` when the reader presses Enter."""
        self.do_next("")
        return False

    def complete_jump(self, text: str, line: str, *ignored: object) -> list[str]:
        """Complete the name of a step, or its short name if it is in the layer at which the walk stands."""
        typed = line.partition(" ")[2].lstrip()
        layer = self.stepper.step.name.rpartition(".")[0]
        short = [
            name.removeprefix(f"{layer}.") for name in self.stepper.names if layer and name.startswith(f"{layer}.")
        ]
        return [name[len(typed) - len(text) :] for name in [*short, *self.stepper.names] if name.startswith(typed)]

    # ---- moving

    def do_next(self, arg: str) -> None:
        n, index, last = count(arg), self.stepper.index, len(self.stepper.names) - 1
        if index == last:
            self.say("this was the last step; `predict` shows the likeliest next tokens, `quit` ends the walk")
            return
        for _ in range(min(n, last)):
            index = min(index + 1 if self.is_inside else self._last_of(min(index + 1, last)), last)
        self._go(index)

    def do_back(self, arg: str) -> None:
        n, index = count(arg), self.stepper.index
        if index == 0:
            raise InputError("this is the first step")
        for _ in range(min(n, index)):
            first = self._first_of(index)
            index = max(index - 1 if self.is_inside or first == 0 else first - 1, 0)
        self._go(index)

    def do_into(self, arg: str) -> None:
        name = self.stepper.step.name
        if name in ("norm", "logits"):
            raise InputError(f"{name} is a step by itself; there is nothing to go into")
        self._go(self._first_of(1 if name == "embedding" else self.stepper.index), is_inside=True)

    def do_out(self, arg: str) -> None:
        self._go(self._last_of(self.stepper.index), is_inside=False)

    def do_jump(self, arg: str) -> None:
        self._go(self.stepper.find(needed(arg, "the name of a step")), is_inside=True)

    def do_where(self, arg: str) -> None:
        first, last = self._first_of(self.stepper.index), self._last_of(self.stepper.index)
        edited = {edit.step for edit in self.stepper.edits}
        for index in range(first, last + 1):
            name = self.stepper.names[index]
            mark = ">" if index == self.stepper.index else " "
            self.say(f"{mark} {name}{'   edited' if name in edited else ''}")

    # ---- looking

    def do_show(self, arg: str) -> None:
        self.view.show(arg)

    def do_map(self, arg: str) -> None:
        self.view.map(arg)

    def do_top(self, arg: str) -> None:
        self.view.top(arg)

    def do_token(self, arg: str) -> None:
        self._look_at("token", arg)

    def do_head(self, arg: str) -> None:
        self._look_at("head", arg)

    def do_all(self, arg: str) -> None:
        self.focus.look_at_everything()
        self.say("looking at everything")

    def do_merges(self, arg: str) -> None:
        at = parsed_index(arg.strip() or "-1", "token", len(self.stepper.tokens))
        if isinstance(at, slice):
            raise InputError("merges takes one token, such as `merges 2`")
        self.view.merges(at)

    def do_source(self, arg: str) -> None:
        self.view.source()

    def do_cost(self, arg: str) -> None:
        if arg.strip() not in ("", "all"):
            raise InputError("cost takes nothing, or `all`")
        (self.view.costs if arg.strip() else self.view.cost)()

    def do_why(self, arg: str) -> None:
        self.view.why()

    # ---- changing

    def do_zero(self, arg: str) -> None:
        self._assign(arg, f"zero {arg}".strip(), np.zeros_like)

    def do_scale(self, arg: str) -> None:
        factor, rest = number(arg, "a factor")
        self._assign(rest, f"scale {arg}", lambda part: part * part.dtype.type(factor))

    def do_set(self, arg: str) -> None:
        constant, rest = number(arg, "a number")
        self._assign(rest, f"set {arg}", lambda part: np.full_like(part, constant))

    def do_swap(self, arg: str) -> None:
        words = arg.split()
        if len(words) != 3:
            raise InputError("swap takes an axis and two numbers, such as `swap token 1 4`")
        axes = self.stepper.step.axes
        chosen = [self.focus.selection(f"{words[0]} {word}", is_focused=False) for word in words[1:]]
        ((name, first),), ((_, second),) = (part.items() for part in chosen)
        if isinstance(first, slice) or isinstance(second, slice):
            raise InputError("swap takes two numbers, not ranges")
        if first == second:
            raise InputError(f"both numbers mean {name} {first}; expected two that differ")
        axis = axes.index(name)

        def swapped(value: np.ndarray) -> np.ndarray:
            order = np.arange(value.shape[axis])
            order[[first, second]] = second, first
            return value.take(order, axis)

        self._edit(f"swap {arg}", swapped)

    def do_undo(self, arg: str) -> None:
        undone = self.stepper.undo()
        self.say(f"taken back: {undone.description} at {undone.step}")

    def do_edits(self, arg: str) -> None:
        for edit in self.stepper.edits:
            self.say(f"  {edit.step}: {edit.description}")
        if not self.stepper.edits:
            self.say("nothing has been edited")

    # ---- what the changes do

    def do_predict(self, arg: str) -> None:
        self.view.predictions()

    def do_generate(self, arg: str) -> None:
        n = count(arg, default=20)
        is_long = self.stepper.model.config.n_parameters * n > _SLOW
        with progress_bar("writing", is_long=is_long) as progress:
            self.view.continuations(n, progress)

    def do_compare(self, arg: str) -> None:
        self.view.comparison()

    def do_quit(self, arg: str) -> bool:
        return True

    # ---- helpers

    def place(self) -> str:
        """Return the name of the step, or the name of the layer while the walk goes layer by layer."""
        name = self.stepper.step.name
        return name if self.is_inside else name.rpartition(".")[0] or name

    def _first_of(self, index: int) -> int:
        """Return the index of the first step of this step's layer; a step outside the layers keeps its own index."""
        layer = self.stepper.names[index].rpartition(".")[0]
        return self.stepper.names.index(f"{layer}.attention_norm") if layer else index

    def _last_of(self, index: int) -> int:
        layer = self.stepper.names[index].rpartition(".")[0]
        return self.stepper.names.index(f"{layer}.residual_after_ffn") if layer else index

    def _go(self, index: int, *, is_inside: bool | None = None) -> None:
        is_long = abs(index - self.stepper.index) * self.stepper.model.config.n_parameters > _SLOW
        with progress_bar("walking", is_long=is_long) as progress:
            self.stepper.go(index, progress)
        self.is_inside = self.is_inside if is_inside is None else is_inside  # after `go`, which Ctrl-C may interrupt
        self._arrive()

    def _arrive(self) -> None:
        is_layer = self.stepper.step.name.startswith("layers.") and not self.is_inside
        (self.view.layer if is_layer else self.view.step)()

    def _look_at(self, axis: str, text: str) -> None:
        self.focus.look_at(axis, needed(text, f"the number of a {axis}, counted from 0"))
        self.say(f"looking at {', '.join(f'{name} {index}' for name, index in self.focus.looked_at.items())}")

    def _assign(self, text: str, description: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change the part of the value that a text such as "head 3" chooses."""
        chosen = self.focus.selection(text, is_focused=False)
        index = as_index(chosen, self.stepper.step.axes)

        def changed(value: np.ndarray) -> np.ndarray:
            value[index] = change(value[index])
            return value

        self._edit(description + self.focus.readers(chosen), changed)

    def _edit(self, description: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.stepper.edit(description, function)
        self.say(f"{self.stepper.step.name}: {description}; now {self.stepper.step.statistics}")
