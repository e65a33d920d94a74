"""Trace: values of a forward pass kept by name, to be looked at, saved, loaded and compared.

A trace is also how values of another engine come in: a safetensors file with any of the catalogue's steps under their
names (`Trace.load` has the rules), compared step by step with ours.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ref.compare import DEFAULT_BOUND, Comparison, step_difference
from mistral_ref.config import RowOrder
from mistral_ref.display import html_table, size_text
from mistral_ref.errors import CheckpointError, InputError, checked_whole, printable, shown, warn
from mistral_ref.json_file import parse_json
from mistral_ref.steps import CATALOGUE, EXPERT_CATALOGUE, Step
from mistral_ref.tensor_file import Tensor, open_tensor_file, read_metadata, write_tensor_file
from mistral_ref.weights import Matrix

_FORMAT = "mistral_ref.trace.v1"
_NAME = re.compile(r"(?:layers\.(0|[1-9][0-9]{0,3})\.)?([a-z_]+)")
_ENDS = ("embedding", "norm", "logits")  # the steps that belong to no layer
_TURNED = ("q", "k", "q_rotated", "k_rotated")  # whose pairs lie side by side, or half a head apart
_MOST_POSITIONS = 2**40
_ID_DTYPES = {"I64": "<i8", "I32": "<i4", "U32": "<u4"}
_ROUNDINGS = {"F16": 2.0**-11, "BF16": 2.0**-8}  # half an ulp, as a part of the value
_MASKED = -3e4  # engines that mask by adding use -1e9, -3.4e38, or in f16 -65504


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
                f"this trace does not hold {shown(name)}; it holds {held}; model.trace(keep=...) chooses"
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
        return len(self.tokens) or max(map(_tokens_of, self.steps.values()), default=0)

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
            unmatched=tuple(sorted(self.keys() ^ reference.keys(), key=_order)),
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
        write_tensor_file(path, tensors, {_FORMAT: json.dumps(about)})

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
            raise InputError(f"rope_row_order is {shown(rope_row_order)}; expected 'interleaved' or 'halves'")
        path = Path(path)
        tensors = {tensor.name: tensor for tensor in open_tensor_file(path)}
        about = _about(path)
        tokens, pieces = _tokens(path, tensors), _pieces(path, tensors)
        names = sorted((name for name in tensors if _is_step(name)), key=_order)
        if not names:
            raise CheckpointError(f"{path}: holds no step; expected tensors called 'embedding', 'layers.0.q' and so on")
        if others := sorted(tensors.keys() - {"tokens", "pieces", *names}):
            warn(f"{path}: left aside {len(others)} tensors that are no steps: {_with_likely_names(others[:8])}")
        about["has_experts"] |= any(name.endswith((".router_logits", ".expert_weights")) for name in names)
        steps = [_step(tensors[name], about, about["rope_row_order"] or rope_row_order) for name in names]
        _check_counts(path, steps, tokens)
        return cls(steps, tokens, pieces, start=about["start"], made_by=about["made_by"])

    def __repr__(self) -> str:
        made_by = f", {self.made_by}" if self.made_by else ""
        return (
            f"<Trace of {self.n_tokens} tokens from position {self.start}: {len(self)} steps, {self.nbytes:,} bytes"
            f"{made_by}>"
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: a table of the steps."""
        rows = [
            [name, size_text(step.axes, step.value.shape), str(step.value.dtype), step.formula, step.sentence]
            for name, step in self.steps.items()
        ]
        return html_table(["step", "axes", "dtype", "formula", "meaning"], rows, caption=repr(self))


def _with_likely_names(names: Sequence[str]) -> str:
    """Return names of tensors, each with the name of a step that it is much like.

    >>> _with_likely_names(["layers.0.q_rotate", "Logits", "x"])
    "'layers.0.q_rotate' (layers.N.q_rotated?), 'Logits' (logits?), 'x'"
    """
    texts = []
    for name in names:
        likely = difflib.get_close_matches(name.rpartition(".")[2].lower(), CATALOGUE, n=1)
        full = [kind if kind in _ENDS else f"layers.N.{kind}" for kind in likely]
        texts.append(shown(name) + "".join(f" ({kind}?)" for kind in full))
    return ", ".join(texts)


def _check_counts(path: Path, steps: Sequence[Step], tokens: Sequence[int]) -> None:
    """Raise CheckpointError unless all steps are of as many tokens, and of those that the file names."""
    counts = {step.name: _tokens_of(step) for step in steps if _tokens_of(step)}
    for name in {"norm", "logits"} & counts.keys():
        if counts[name] == 1:  # the last token's alone
            del counts[name]
    usual = max(counts.values(), key=list(counts.values()).count, default=len(tokens))
    for step in steps:
        if counts.get(step.name, usual) != usual:
            hint = ", or are its axes in another order?" if usual in step.value.shape else ""
            raise CheckpointError(
                f"{path}: {step.name} has shape {shown(step.value.shape)}, by its axes ({', '.join(step.axes)}) of "
                f"{counts[step.name]} tokens; expected {usual}, as most steps{hint}"
            )
    if tokens and counts and len(tokens) != usual:
        raise CheckpointError(f"{path}: tokens holds {len(tokens)} ids; expected {usual}, as the steps have")


def _is_step(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match[2] in CATALOGUE and (match[1] is None) == (match[2] in _ENDS)


def _order(name: str) -> tuple[int, int, int]:
    """Return a key that sorts names of steps as a pass yields them."""
    layer, _, kind = name.removeprefix("layers.").rpartition(".")
    rank = list(CATALOGUE).index(kind)
    return (1, int(layer), rank) if layer else (0 if kind == "embedding" else 2, 0, rank)


def _tokens_of(step: Step) -> int:
    """Return how many tokens a step's value is of; 0 where its axes do not tell, as with pairs of token and expert."""
    axis = next((axis for axis, name in enumerate(step.axes) if name in ("token", "query")), None)
    return 0 if axis is None else step.value.shape[axis]


def _texts_as_json(texts: Sequence[str]) -> str:
    r"""Return texts as a JSON list with no bracket in them: `parse_json` counts brackets, to bound what it will cost.

    >>> print(_texts_as_json(["[7]", "{"]))
    ["\u005b7]", "\u007b"]
    """
    quoted = (json.dumps(text).replace("[", r"\u005b").replace("{", r"\u007b") for text in texts)
    return f"[{', '.join(quoted)}]"


def _about(path: Path) -> dict[str, Any]:
    """Return what a trace's metadata say, or what the absence of a field means."""
    about: dict[str, Any] = {"start": 0, "made_by": "", "has_experts": False, "sources": {}, "rope_row_order": None}
    text = (read_metadata(path) or {}).get(_FORMAT, "{}")  # null is as good as none
    try:
        about |= _checked("it", parse_json(text), dict)
        start = checked_whole("start", about["start"], 0, _MOST_POSITIONS)
        made_by = printable(_checked("made_by", about["made_by"], str))
        has_experts = _checked("has_experts", about["has_experts"], bool)
        sources = {kind: printable(str(source)) for kind, source in _checked("sources", about["sources"], dict).items()}
        if about["rope_row_order"] not in (None, "interleaved", "halves"):
            raise InputError(f"rope_row_order is {shown(about['rope_row_order'])}; expected 'interleaved' or 'halves'")
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata {_FORMAT} cannot be read: {printable(str(error))}") from None
    fields = {"start": start, "made_by": made_by, "has_experts": has_experts, "sources": sources}
    return fields | {"rope_row_order": about["rope_row_order"]}


def _checked(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{name} is {shown(value)}; expected {kind.__name__}")
    return value


def _tokens(path: Path, tensors: Mapping[str, Tensor]) -> list[int]:
    if "tokens" not in tensors:
        return []
    tensor = tensors["tokens"]
    if tensor.dtype not in _ID_DTYPES or not (len(tensor.shape) == 1 or tensor.shape[:-1] == (1,)):
        found = f"{tensor.dtype} {shown(tensor.shape)}"
        raise CheckpointError(f"{path}: tokens is {found}; expected {', '.join(_ID_DTYPES)} of one axis")
    ids: list[int] = tensor.raw.view(_ID_DTYPES[tensor.dtype]).tolist()
    return ids


def _pieces(path: Path, tensors: Mapping[str, Tensor]) -> list[str]:
    if "pieces" not in tensors:
        return [str(token) for token in _tokens(path, tensors)]
    try:
        pieces = parse_json(tensors["pieces"].raw.tobytes().decode())
    except ValueError as error:
        raise CheckpointError(f"{path}: pieces cannot be read: {printable(str(error))}") from None
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise CheckpointError(f"{path}: pieces is {shown(pieces)}; expected a list of texts")
    return pieces


def _step(tensor: Tensor, about: Mapping[str, Any], row_order: RowOrder | None) -> Step:
    """Return the step that a tensor of a file holds."""
    kind = tensor.name.rpartition(".")[2]
    entry = (EXPERT_CATALOGUE if about["has_experts"] else CATALOGUE)[kind]
    shape = tensor.shape
    if len(shape) == len(entry.axes) + 1 and shape[0] == 1:
        shape = shape[1:]
    if kind in ("norm", "logits") and len(shape) == 1:
        shape = (1, *shape)  # the last token's alone
    is_turned = row_order == "halves" and kind in _TURNED
    problem = f"{tensor.path}: {tensor.name} has shape {shown(tensor.shape)}; expected"
    if not _fits(shape, entry.axes):
        raise CheckpointError(f"{problem} the axes {', '.join(entry.axes)}")
    if is_turned and shape[2] % 2:
        raise CheckpointError(f"{problem} heads of an even width, whose halves make pairs")
    keys = None
    if entry.axes[-1] == "key":  # the last query's own key is the last one
        end = about["start"] + shape[1]
        keys = range(end - shape[2], end)
        if not shape[1] <= len(keys) <= end:
            raise CheckpointError(
                f"{problem} {shape[1]} to {end} keys (axes {', '.join(entry.axes)}), since its queries begin at "
                f"{about['start']}"
            )
    value = _floats(tensor).reshape(shape)
    if is_turned:
        value = value.reshape(*shape[:2], 2, -1).swapaxes(2, 3).reshape(shape)
    is_ours = bool(about["made_by"])  # holds -inf, and need not be looked through
    if kind == "scores" and not is_ours and (value <= _MASKED).any():
        value = np.where(value <= _MASKED, value.dtype.type(-np.inf), value)
    value.flags.writeable = False
    step = Step(tensor.name, entry, value, keys)
    step.source, step.is_past = about["sources"].get(kind, ""), True
    step.rounding = _ROUNDINGS.get(tensor.dtype, 0.0)
    return step


def _fits(shape: Sequence[int], axes: Sequence[str]) -> bool:
    """Return whether a step can have this shape. Only pairs may be none: where no expert has a share of any token."""
    if len(shape) != len(axes):
        return False
    return all(0 < n < _MOST_POSITIONS or (n, axis) == (0, "pair") for n, axis in zip(shape, axes, strict=True))


def _floats(tensor: Tensor) -> np.ndarray:
    """Return a tensor as float64 or float32, mapped where it is stored so."""
    if tensor.dtype == "F64":
        return np.require(tensor.raw.view("<f8").reshape(tensor.shape), requirements="A")
    if tensor.dtype not in ("F32", "F16", "BF16"):
        raise CheckpointError(f"{tensor.path}: {tensor.name} is {tensor.dtype}; expected F64, F32, F16 or BF16")
    kind, stored = tensor.mapped()
    return Matrix(tensor.name, kind, stored.reshape(1, -1)).rows(slice(None), np.float32).reshape(tensor.shape)
