"""Trace: values of a forward pass kept by name, to be looked at, saved, loaded and compared.

A trace is also how values of another engine come in: a safetensors file with any of the catalogue's steps under their
names (`Trace.load` has the rules), compared step by step with ours.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from mistral_ref.compare import DEFAULT_BOUND, Comparison, step_difference
from mistral_ref.config import RowOrder
from mistral_ref.display import steps_html
from mistral_ref.errors import InputError, printable, short_repr
from mistral_ref.files.dump import FORMAT, read_dump, step_order, tokens_of
from mistral_ref.files.tensor_file import write_tensor_file
from mistral_ref.steps import CATALOGUE, Step


class MissingStepError(InputError, KeyError):
    """A step that a trace does not hold."""

    def __str__(self) -> str:
        return str(self.args[0])


class Trace(Mapping[str, np.ndarray]):
    """Values of one pass by the names of their steps. Made by `model.trace(...)`, or `Trace.load(path)`.

        trace = model.trace("Once upon a time", keep="layers.*.attention_weights")
        trace["layers.0.attention_weights"]             # the array
        trace.steps["layers.0.attention_weights"]       # the Step, with axes, formula and source

    steps       name -> Step, in the order of the pass
    tokens      ids of the pass's tokens; empty where a file does not tell
    pieces      what these tokens read as, safe to print
    start       position of the first token
    made_by     backend and dtype, or what a file says of itself
    """

    def __init__(
        self, steps: Iterable[Step], tokens: Sequence[int], pieces: Sequence[str], *, start: int = 0, made_by: str = ""
    ) -> None:
        self.steps = {step.name: step for step in steps}
        self.tokens, self.pieces = list(tokens), [printable(piece) for piece in pieces]
        self.start, self.made_by = start, made_by

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.steps[name].value
        except KeyError:
            held = ", ".join([*list(self)[:3], *["..."] * (len(self) > 3)]) or "nothing"
            raise MissingStepError(
                f"this trace does not hold {short_repr(name)}; it holds {held}; model.trace(keep=...) chooses"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    # Whether two traces are alike is `compare`'s business; Mapping's own == would ask arrays for one truth value.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @cached_property
    def n_tokens(self) -> int:
        """How many tokens the pass had; 0 for a trace of nothing."""
        return len(self.tokens) or max(map(tokens_of, self.steps.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all values kept."""
        return sum(value.nbytes for value in self.values())

    def label(self, position: int) -> str:
        """Return what stands at a position: the token's piece, or "@12" where that is not known."""
        index = position - self.start
        return self.pieces[index] if 0 <= index < len(self.pieces) else f"@{position}"

    def compare(self, reference: Trace, *, bound: float = DEFAULT_BOUND) -> Comparison:
        """Return how far each step of this trace lies from the same step of another; see compare.py.

        Steps that only one of them holds are named in `unmatched`; one whose shape differs departs. Raises InputError
        if the two are of different tokens or positions, or have no step in common.
        """
        if self.tokens and reference.tokens and self.tokens != reference.tokens:
            raise InputError("the two traces are of different tokens, so their values say nothing of each other")
        if self.start != reference.start:
            raise InputError(
                f"the two traces begin at positions {self.start} and {reference.start}; a pass over a cache "
                "(--last K of the whole text) begins later, and a dump says so in its metadata"
            )
        shared = [name for name in self if name in reference]
        if not shared:
            raise InputError("the two traces have no step in common")
        pairs = [(self.steps[name], reference.steps[name]) for name in shared]
        return Comparison(
            [step_difference(ours, theirs, bound) for ours, theirs in pairs],
            bound,
            unmatched=tuple(sorted(self.keys() ^ reference.keys(), key=step_order)),
            rounding=max(ours.rounding + theirs.rounding for ours, theirs in pairs),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that `load` reads; it appears under its name only when it is complete."""
        tensors = {name: np.ascontiguousarray(value) for name, value in self.items()}
        tensors["tokens"] = np.array(self.tokens, np.int64)
        tensors["pieces"] = np.frombuffer(_texts_as_json(self.pieces).encode(), np.uint8)
        kinds = {name.rpartition(".")[2]: step for name, step in self.steps.items()}
        about = {
            "start": self.start,
            "made_by": self.made_by,
            "rope_row_order": "interleaved",
            "has_experts": any(step.kind != CATALOGUE.get(kind, step.kind) for kind, step in kinds.items()),
            "sources": {kind: step.source for kind, step in kinds.items()},
        }
        write_tensor_file(path, tensors, {FORMAT: json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, rope_row_order: RowOrder | None = None) -> Trace:
        """Return the trace in a safetensors file: one that `save` wrote, or a dump of another engine.

        A dump holds any steps of the catalogue under their full names ("layers.0.q"), each with the axes that the
        catalogue gives, as F64, F32, F16 or BF16; a leading axis of size 1 is dropped, and norm and logits may be the
        last token's alone. Scores of -3e4 and below count as -inf, what is out of sight. Optional: "tokens", the ids as
        I64, I32 or U32; and the metadata {"mistral_ref.trace.v1": '{"start": 7}'}, without which the pass begins at
        position 0. Other tensors are left aside with a warning.

        rope_row_order      "halves" for an engine that turns pairs half a head apart, as Hugging Face's layout does:
                            q, k, q_rotated and k_rotated are brought into the order in which pairs are neighbours. A
                            file whose metadata give the order, as ours do, is believed; None: "interleaved"

        Values in F64 and F32 stay mapped. Raises CheckpointError with the file and what is wrong with it.
        """
        if rope_row_order not in (None, "interleaved", "halves"):
            raise InputError(f"rope_row_order is {short_repr(rope_row_order)}; expected 'interleaved' or 'halves'")
        found = read_dump(Path(path), rope_row_order)
        return cls(found.steps, found.tokens, found.pieces, start=found.start, made_by=found.made_by)

    def __repr__(self) -> str:
        made_by = f", {self.made_by}" if self.made_by else ""
        return (
            f"<Trace of {self.n_tokens} tokens from position {self.start}: {len(self)} steps, {self.nbytes:,} bytes"
            f"{made_by}>"
        )

    def _repr_html_(self) -> str:
        return steps_html(self.steps.values(), caption=repr(self))


def _texts_as_json(texts: Sequence[str]) -> str:
    r"""Return texts as a JSON list with no bracket in them: `parse_json` counts brackets, to bound what it will cost.

    >>> print(_texts_as_json(["[7]", "{"]))
    ["\u005b7]", "\u007b"]
    """
    quoted = (json.dumps(text).replace("[", r"\u005b").replace("{", r"\u007b") for text in texts)
    return f"[{', '.join(quoted)}]"
