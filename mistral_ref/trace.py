"""Trace: the values of a forward pass, kept by the names of their steps. A trace can be saved, loaded and compared.

A trace can also hold values of another engine. The engine writes a safetensors file with some steps of the catalogue
under their names (`Trace.load` has the rules). `Trace.compare` then compares them with ours step by step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from mistral_ref.compare import DEFAULT_BOUND, Comparison, step_difference
from mistral_ref.config import RowOrder
from mistral_ref.errors import InputError, first_difference, printable, short_repr
from mistral_ref.files.dump import FORMAT, checked_row_order, read_dump, step_order, tokens_of
from mistral_ref.files.paths import local_path
from mistral_ref.files.tensor_file import write_tensor_file
from mistral_ref.notebook import steps_html
from mistral_ref.steps import CATALOGUE, Step


class MissingStepError(InputError, KeyError):
    """A trace does not hold the step that was asked for."""


class Trace(Mapping[str, np.ndarray]):
    """The values of one pass by the names of their steps. `model.trace(...)` and `Trace.load(path)` make it.

        trace = model.trace("Once upon a time", keep="layers.*.attention_weights")
        trace["layers.0.attention_weights"]             # the array
        trace.steps["layers.0.attention_weights"]       # the Step, with axes, formula and source

    steps       name -> Step, in the order of the pass
    tokens      ids of the pass's tokens; empty if a file does not hold them
    pieces      the tokenizer's piece of each token, safe to print
    start       position of the first token
    made_by     dtype and backend, or the text in a file's metadata
    windows     the window of each layer, None for a layer without one; None if it is not known which windows there are
    """

    def __init__(
        self,
        steps: Iterable[Step],
        tokens: Sequence[int],
        pieces: Sequence[str],
        *,
        start: int = 0,
        made_by: str = "",
        windows: Sequence[int | None] | None = None,
    ) -> None:
        self.steps = {step.name: step for step in steps}
        self.tokens, self.pieces = list(tokens), [printable(piece) for piece in pieces]
        self.start, self.made_by = start, made_by
        self.windows = None if windows is None else tuple(windows)

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.steps[name].value
        except KeyError:
            held = ", ".join([*list(self)[:3], *["..."] * (len(self) > 3)]) or "nothing"
            raise MissingStepError(
                f"this trace does not hold {short_repr(name)}; it holds {held}; model.trace(keep=...) chooses the steps"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    # Two traces are equal only if they are the same object. Mapping's == would ask an array for one truth value, which
    # NumPy refuses. `compare` compares values.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @cached_property
    def n_tokens(self) -> int:
        """Number of tokens in the pass; 0 for an empty trace."""
        return len(self.tokens) or max(map(tokens_of, self.steps.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Number of bytes of all values."""
        return sum(value.nbytes for value in self.values())

    def label(self, position: int) -> str:
        """Return the piece of the token at a position; "@12" for position 12 if the piece is not known."""
        index = position - self.start
        return self.pieces[index] if 0 <= index < len(self.pieces) else f"@{position}"

    def compare(self, reference: Trace, *, bound: float = DEFAULT_BOUND) -> Comparison:
        """Return a Comparison: how far each step of this trace lies from the same step of `reference` (compare.py).

        bound   in float32 ulps: a step that lies further away departs

        `unmatched` names the steps that only one of the two traces holds. A step whose shapes differ departs. Raises
        InputError if the traces have different tokens or first positions, or if they have no step in common.
        """
        if not isinstance(reference, Trace):
            raise InputError(f"reference is {short_repr(reference)}; expected a Trace")
        if self.tokens and reference.tokens and self.tokens != reference.tokens:
            difference = first_difference(self.tokens, reference.tokens, "tokens")
            raise InputError(f"the two traces have different tokens, so their values cannot be compared: {difference}")
        if self.start != reference.start:
            raise InputError(
                f"the two traces begin at positions {self.start} and {reference.start}; expected the same position "
                "(a pass over a cache, or with --last K, begins later; a dump's metadata must hold its start)"
            )
        shared = [name for name in self if name in reference]
        if not shared:
            held = " and ".join(short_repr(list(trace)) for trace in (self, reference))
            raise InputError(f"the two traces have no step in common: they hold {held}")
        pairs = [(self.steps[name], reference.steps[name]) for name in shared]
        return Comparison(
            [step_difference(ours, theirs, bound) for ours, theirs in pairs],
            bound,
            unmatched=tuple(sorted(self.keys() ^ reference.keys(), key=step_order)),
            rounding=max(ours.rounding + theirs.rounding for ours, theirs in pairs),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that `load` reads. The file gets its name only when it is complete.

        Raises CheckpointError if it cannot be written.
        """
        tensors = {name: np.ascontiguousarray(value) for name, value in self.items()}
        tensors["tokens"] = np.array(self.tokens, np.int64)
        tensors["pieces"] = np.frombuffer(_texts_as_json(self.pieces).encode(), np.uint8)
        kinds = {name.rpartition(".")[2]: step for name, step in self.steps.items()}
        about = {
            "start": self.start,
            "made_by": self.made_by,
            "windows": self.windows,
            "rope_row_order": "interleaved",
            "has_experts": any(step.kind != CATALOGUE.get(kind, step.kind) for kind, step in kinds.items()),
            "sources": {kind: step.source for kind, step in kinds.items()},
        }
        write_tensor_file(path, tensors, {FORMAT: json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, rope_row_order: RowOrder | None = None) -> Trace:
        """Return the trace in a safetensors file. Either `save` wrote the file, or it is a dump of another engine.

        A dump holds some steps of the catalogue under their full names ("layers.0.q"). Each tensor has the axes of the
        catalogue, in F64, F32, F16 or BF16. A leading axis of size 1 is dropped. "norm" and "logits" may hold only the
        last token. Scores of -3e4 or less count as -inf: the query does not see the key.

        A dump may also hold "tokens", the ids as I64, I32 or U32. Its metadata may hold the position of the first
        token and the window of each layer: {"mistral_ref.trace.v1": '{"start": 7, "windows": [4096, null]}'}. Without
        a start the pass begins at position 0. Other tensors are ignored, with a warning.

        rope_row_order      "halves" for an engine whose RoPE pairs lie half a head apart, as in Hugging Face's layout:
                            q, k, q_rotated and k_rotated are then reordered, so that pairs are neighbours. If the
                            file's metadata hold the order, as in files of `save`, this argument is ignored. None:
                            "interleaved"

        Values in F64 and F32 are not copied: they stay mapped from the file. Raises CheckpointError; the message
        names the file and the problem.
        """
        found = read_dump(local_path(path), checked_row_order(rope_row_order))
        return cls(
            found.steps, found.tokens, found.pieces, start=found.start, made_by=found.made_by, windows=found.windows
        )

    def __repr__(self) -> str:
        made_by = f", {self.made_by}" if self.made_by else ""
        return (
            f"<Trace of {self.n_tokens} tokens from position {self.start}: {len(self)} steps, {self.nbytes:,} bytes"
            f"{made_by}>"
        )

    def _repr_html_(self) -> str:
        return steps_html(self.steps.values(), caption=repr(self))


def _texts_as_json(texts: Sequence[str]) -> str:
    r"""Return texts as a JSON list. Brackets in the texts are escaped, because `parse_json` counts all brackets.

    >>> print(_texts_as_json(["[7]", "{"]))
    ["\u005b7]", "\u007b"]
    """
    quoted = (json.dumps(text).replace("[", r"\u005b").replace("{", r"\u007b") for text in texts)
    return f"[{', '.join(quoted)}]"
