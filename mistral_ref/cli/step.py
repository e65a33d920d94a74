"""mistral-ref step: walk through a forward pass in the terminal, look at every tensor, change it, and go on."""

from __future__ import annotations

import argparse
import cmd
import re
import sys
from collections.abc import Callable

import numpy as np

from mistral_ref.cli.common import add_compute_options, add_model_option, as_text, load_model, progress_bar
from mistral_ref.cli.selection import axis_called, parsed_index
from mistral_ref.cli.study import add_broken_option, add_last_option, maybe_broken, split_prompt
from mistral_ref.cli.view import View, as_index
from mistral_ref.errors import InputError, MistralRefError, shown
from mistral_ref.stepper import Stepper

_EXAMPLES = """\
examples:
  mistral-ref step "Once upon a time"
  mistral-ref step --last 4 "Once upon a time there was a little girl"     the last 4 tokens, over a cache
  mistral-ref step --broken tiled-heads "Tom had a red ball"               with a bug in it
  printf 'jump 2\\njump heads\\nzero head 3\\npredict\\n' | mistral-ref step "Lily saw a"
"""
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
        self.stepper, self.view = stepper, View(stepper)
        self.is_terminal = sys.stdin is not None and sys.stdin.isatty()
        self.use_rawinput = self.is_terminal
        self.is_inside = False  # of a layer: going step by step, not layer by layer

    # ---- the loop

    @property
    def prompt(self) -> str:  # type: ignore[override]
        """What the terminal shows while it waits."""
        return f"({self._place()}) " if self.is_terminal else ""

    def preloop(self) -> None:
        """Say where one is, and how to go on."""
        self.view.greeting()
        self._arrive()

    def precmd(self, line: str) -> str:
        """Show a command that came over a pipe, so that what is printed reads as if it had been typed."""
        if not self.is_terminal and line != "EOF":
            self.view.say(f"({self._place()}) {line.rstrip()}")
        return line

    def onecmd(self, line: str) -> bool:
        """Run one command; a mistake is one line, and over a pipe the end."""
        try:
            return bool(super().onecmd(self._whole(line.strip())))
        except MistralRefError as error:
            if not self.is_terminal:
                raise
            self.view.say(str(error))
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
            self.view.say(str(getattr(self, f"do_{name}").__doc__))
            return
        for name in [*_ORDER, "help"]:
            usage, _, meaning = (getattr(self, f"do_{name}").__doc__ or "").partition("\n")[0].partition(": ")
            self.view.say(f"  {usage:<28}{meaning}")
        self.view.say(
            "The beginning of a name will do. SEL chooses by axis: `head 3`, `token 0:4 dim 7`; -1 is the last."
        )

    # ---- moving

    def do_next(self, arg: str) -> None:
        """next: go on to the next step, or over the next layer (Enter does the same)"""
        names, index = self.stepper.names, self.stepper.index
        if index == len(names) - 1:
            self.view.say("this was the last step; `predict` tells what it means, `quit` leaves")
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
            self.view.say(f"{mark} {name}{'   edited' if name in edited else ''}")

    # ---- looking

    def do_show(self, arg: str) -> None:
        """show [SEL]: print the value as numbers; `show token 2 head 0` prints a part"""
        self.view.show(arg)

    def do_map(self, arg: str) -> None:
        """map [SEL]: draw the value as a heat map; of a value with three axes one matrix, the first unless SEL says"""
        self.view.map(arg)

    def do_top(self, arg: str) -> None:
        """top [SEL]: what stands out: the strongest keys, the likeliest next pieces, or the largest values"""
        self.view.top(arg)

    def do_token(self, arg: str) -> None:
        """token N: look at one token from now on, in show, map and top; `all` looks at everything again"""
        self._focus("token", arg)

    def do_head(self, arg: str) -> None:
        """head N: look at one head from now on, in show, map and top; `all` looks at everything again"""
        self._focus("head", arg)

    def do_all(self, arg: str) -> None:
        """all: look at all tokens and heads again"""
        self.view.focus.clear()
        self.view.say("looking at everything")

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
        self.view.say(f"taken back: {undone.description} at {undone.step}")

    def do_edits(self, arg: str) -> None:
        """edits: list the changes made so far"""
        for edit in self.stepper.edits:
            self.view.say(f"  {edit.step}: {edit.description}")
        if not self.stepper.edits:
            self.view.say("nothing has been edited")

    # ---- what becomes of it

    def do_predict(self, arg: str) -> None:
        """predict: finish the pass and tell which tokens are likeliest next, with the changes and without"""
        self.view.predictions()

    def do_compare(self, arg: str) -> None:
        """compare: the edited pass beside the one without edits: how far each step departs"""
        self.view.comparison()

    def do_quit(self, arg: str) -> bool:
        """quit: leave (so does Ctrl-D)"""
        return True

    def do_EOF(self, arg: str) -> bool:  # noqa: N802 (the name that cmd asks for)
        """Leave at the end of the input."""
        if self.is_terminal:
            self.view.say("")
        return True

    # ---- helpers

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
        is_long = abs(index - self.stepper.index) * self.stepper.model.config.n_parameters > _SLOW
        with progress_bar("walking", is_long=is_long) as progress:
            self.stepper.go(index, progress)
        self._arrive()

    def _arrive(self) -> None:
        is_layer = self.stepper.step.name.startswith("layers.") and not self.is_inside
        (self.view.layer if is_layer else self.view.step)()

    def _focus(self, axis: str, text: str) -> None:
        self.view.focus[axis] = _needed(text, f"the number of a {axis}, counted from 0")
        self.view.say(f"looking at {', '.join(f'{name} {index}' for name, index in self.view.focus.items())}")

    def _assign(self, text: str, description: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Change the part of the value that words choose."""
        index = as_index(self.view.selection(text, is_focused=False), self.stepper.step.axes)

        def changed(value: np.ndarray) -> np.ndarray:
            value[index] = change(value[index])
            return value

        self._edit(description, changed)

    def _edit(self, description: str, function: Callable[[np.ndarray], np.ndarray]) -> None:
        self.stepper.edit(description, function)
        self.view.say(f"{self.stepper.step.name}: {description}; now {self.stepper.step.statistics}")


# The commands in the order of the help text; of several that begin alike the first is meant.
_ORDER = (
    *(
        "next",
        "back",
        "into",
        "out",
        "jump",
        "where",
        "show",
        "map",
        "top",
        "token",
        "head",
        "all",
        "source",
        "cost",
        "why",
    ),
    *("zero", "scale", "set", "swap", "undo", "edits", "predict", "compare", "quit"),
)


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
