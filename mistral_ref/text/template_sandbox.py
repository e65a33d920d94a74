"""Run a chat template that a stranger wrote: a program in the language of jinja2, in its sandbox, with bounded work.

The sandbox keeps a template from reaching anything outside. It bounds neither time nor memory. So every operation that
can make a large value of small ones is counted by a Budget:

    turns    a call that counts stands in the body of every loop and of every macro
    sizes    what `~`, `+`, `*`, calls, filters and lists make is measured, and refused if it is large; `~` and `*`, and
             `replace` and `join`, before it is made
    seconds  the time is looked at whenever something is counted

Filters and methods that pad a text to any width are not there.
"""

from __future__ import annotations

import datetime
import functools
import json
import secrets
import time
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from mistral_ref.errors import InputError, printable

MAX_TURNS = 100_000
MAX_CHARACTERS = 4 * 2**20  # in one text, and in all that is printed
MAX_SECONDS = 5.0
_MAX_VALUES = 100_000  # in lists and dicts, those inside them included
_MAX_SOURCE = 2**18
_MAX_BITS = 256
_FILTERS = (
    *("abs", "capitalize", "count", "d", "default", "dictsort", "escape", "e", "first", "float", "int", "items"),
    *("join", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "replace", "reverse"),
    *("round", "safe", "select", "selectattr", "sort", "string", "sum", "title", "trim", "unique", "upper"),
)
_PADDING = {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"}


class _RefusalError(Exception):
    """The template says that it cannot write this conversation, or it does what is not allowed."""


class Budget:
    """How much a template may still do."""

    def __init__(self) -> None:
        self.turns, self.deadline = MAX_TURNS, time.monotonic() + MAX_SECONDS

    def turn(self) -> str:
        """Count one turn of a loop, or one call of a macro."""
        self.turns -= 1
        if self.turns < 0:
            raise _RefusalError(f"its loops take more than {MAX_TURNS} turns, the maximum")
        self.look_at_the_time()
        return ""

    def look_at_the_time(self) -> None:
        """Refuse to go on when the time is over."""
        if time.monotonic() > self.deadline:
            raise _RefusalError(f"it takes more than {MAX_SECONDS:g} seconds, the maximum")

    def made(self, value: Any) -> Any:
        """Return a value that the template has made; refuse it if it is too large."""
        self.look_at_the_time()
        characters, values, waiting = 0, 0, [value]
        while waiting:
            one = waiting.pop()
            if isinstance(one, str):
                characters += len(one)
            elif isinstance(one, int) and one.bit_length() > _MAX_BITS:
                raise _RefusalError(f"it makes numbers of more than {_MAX_BITS} bits, the maximum")
            elif isinstance(one, list | tuple | dict):
                values += len(one)
                self.require(values <= _MAX_VALUES, f"lists of more than {_MAX_VALUES} values")
                waiting += one if not isinstance(one, dict) else [*one, *one.values()]
            self.require(characters <= MAX_CHARACTERS, f"texts of more than {MAX_CHARACTERS} characters")
        return value

    def require(self, holds: bool, what: str) -> None:
        """Refuse what is too large."""
        if not holds:
            raise _RefusalError(f"it makes {what}, the maximum")

    def concat(self, *values: Any) -> str:
        """Return what `~` makes of these values."""
        texts = [str(self.made(value)) for value in values]
        self.require(sum(map(len, texts)) <= MAX_CHARACTERS, f"texts of more than {MAX_CHARACTERS} characters")
        return "".join(texts)

    def check_operands(self, operator: str, left: Any, right: Any) -> None:
        """Refuse an operation of two values whose result would be large."""
        if operator == "%" and isinstance(left, str):
            raise _RefusalError("it formats a text with %, which is not allowed")
        if operator == "*":
            for one, n in ((left, right), (right, left)):
                if isinstance(one, str | list | tuple) and isinstance(n, int):
                    self.require(len(one) * n <= _MAX_VALUES, f"repetitions of more than {_MAX_VALUES} values")
        if operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 8):
            raise _RefusalError("it raises a number to a power; at most 2**32 and 8 are allowed")

    def check_growth(self, values: Any, inserted: Iterable[Any]) -> None:
        """Refuse `replace` and `join` where they could make a large text: they put one text into many places."""
        longest = max((len(one) for one in inserted if isinstance(one, str)), default=0)
        size = (len(values) + 1) * longest + sum(len(str(one)) for one in values)
        limit = 16 * MAX_CHARACTERS  # of what could be made; what is made is measured
        self.require(size <= limit, f"texts of more than {MAX_CHARACTERS} characters")


def render(source: str, variables: Mapping[str, Any], origin: str) -> str:
    """Return what a template prints with these variables.

    Raises InputError if jinja2 is not installed, or if the template is wrong, refuses the conversation, or needs more
    time or memory than it may have. The message begins with `origin`.
    """
    try:
        import jinja2  # noqa: PLC0415 - an extra, only for models of other families
    except ImportError:
        raise InputError(f"{origin}: the chat template needs jinja2; install mistral-ref[templates]") from None
    if len(source) > _MAX_SOURCE:
        raise InputError(f"{origin}: the chat template has more than {_MAX_SOURCE} characters, the maximum")
    budget = Budget()
    try:
        environment = _environment(budget)
        tree, helpers = _counting(environment.parse(source), budget)
        pieces, size = [], 0
        for piece in environment.from_string(tree).generate({**variables, **helpers}):
            size += len(piece)
            budget.require(size <= MAX_CHARACTERS, f"texts of more than {MAX_CHARACTERS} characters")
            pieces.append(piece)
        return "".join(pieces)
    except _RefusalError as refusal:
        problem = str(refusal)
    except jinja2.TemplateSyntaxError as error:
        problem = f"line {error.lineno}: {error.message}"
    except RecursionError:
        problem = "it calls itself too deeply"
    except MemoryError:
        problem = "it needs more memory than there is"
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    raise InputError(f"{origin}: the chat template cannot write this conversation: {printable(problem)}")


def _environment(budget: Budget) -> Any:
    """Return the sandbox for immutable values, with a budget, and with what chat templates expect to be there."""
    from jinja2 import ext, nodes  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            is_padding = isinstance(obj, str) and attr in _PADDING
            return not is_padding and super().is_safe_attribute(obj, attr, value)

        def wrap_str_format(self, value: Any) -> None:
            """Let a text's `format` be an attribute like others, so that it is refused."""

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget.check_operands(operator, left, right)
            return budget.made(super().call_binop(context, operator, left, right))

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - others may be in kwargs
            name, owner = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", None)
            if isinstance(owner, str) and name in ("replace", "join"):
                values = budget.made([*args[0]]) if name == "join" else owner
                budget.check_growth(values, (owner, *args))
            return budget.made(super().call(__context, __obj, *args, **kwargs))

    class Generation(ext.Extension):
        """`{% generation %}` marks what an assistant says, for training. Here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 has it so

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    extensions = [ext.loopcontrols, Generation]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=budget.made)
    filters = {name: _counted(name, environment.filters[name], budget) for name in _FILTERS}
    environment.filters.clear()
    environment.filters.update(filters, tojson=lambda value, **options: _to_json(budget.made(value), **options))
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
    environment.globals.update(raise_exception=_refuse, strftime_now=_now)
    return environment


def _counted(name: str, function: Any, budget: Budget) -> Any:
    """Return a filter whose result is measured."""

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if name in ("replace", "join"):  # their first argument is jinja2's own
            values = budget.made([*args[1]] if name == "join" else str(args[1]))
            args = (args[0], values, *args[2:])
            budget.check_growth(values, (*args[2:], *kwargs.values()))
        return budget.made(function(*args, **kwargs))

    return counted


def _counting(tree: Any, budget: Budget) -> tuple[Any, dict[str, Any]]:
    """Return a template in which everything that can repeat or grow is counted, and the functions that count.

    The functions have names that nobody can guess, so a template cannot replace them.
    """
    from jinja2 import nodes  # noqa: PLC0415

    secret = secrets.token_hex(16)
    helpers = {f"{name}_{secret}": getattr(budget, name) for name in ("turn", "concat", "made")}

    def call(name: str, arguments: list[Any]) -> Any:
        return nodes.Call(nodes.Name(f"{name}_{secret}", "load"), arguments, [], None, None)

    def changed(node: Any) -> Any:
        for field, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, field, [changed(one) if isinstance(one, nodes.Node) else one for one in value])
            elif isinstance(value, nodes.Node):
                setattr(node, field, changed(value))
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            node.body.insert(0, nodes.Output([call("turn", [])]))
        if isinstance(node, nodes.Concat):
            return call("concat", node.nodes)
        if isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return call("made", [node])
        return node

    tree = changed(tree)
    tree.set_environment(tree.environment)
    return tree, helpers


def _refuse(message: object) -> NoReturn:
    raise _RefusalError(f"it says {message}")


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=None if indent is None else min(int(indent), 16))


def _now(pattern: str) -> str:
    return datetime.datetime.now().strftime(str(pattern)[:100])
