"""Read a trace from a file: one that `Trace.save` wrote, or a dump of another engine. `Trace.load` has the rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mistral_ref.config import RowOrder
from mistral_ref.errors import CheckpointError, InputError, checked_int, printable, short_repr, warn
from mistral_ref.files.json_file import parse_json
from mistral_ref.files.tensor_file import Tensor, open_tensor_file
from mistral_ref.steps import CATALOGUE, EXPERT_CATALOGUE, Step

FORMAT = "mistral_ref.trace.v1"
_NAME = re.compile(r"(?:layers\.(0|[1-9][0-9]{0,3})\.)?([a-z_]+)")
_ENDS = ("embedding", "norm", "logits")  # the steps that belong to no layer
# Steps with RoPE's pairs: neighbours, or half a head apart.
_TURNED = ("q", "k", "q_lora_b", "k_lora_b", "q_rotated", "k_rotated")
_MAX_POSITIONS = 2**40
_ID_DTYPES = {"I64": "<i8", "I32": "<i4", "U32": "<u4"}
_ROUNDINGS = {"F16": 2.0**-11, "BF16": 2.0**-8}  # half an ulp, as a share of the value
_MASKED = -3e4  # some engines add -1e9, -3.4e38 or (in f16) -65504 to a score to mask it; this is above all of them


def checked_row_order(order: object) -> RowOrder | None:
    """Return the order of RoPE's pairs if it is "interleaved", "halves" or None; otherwise raise InputError."""
    if order not in (None, "interleaved", "halves"):
        raise InputError(f"rope_row_order is {short_repr(order)}; expected 'interleaved' or 'halves'")
    return order


class Dump(NamedTuple):
    """The contents of a file: the steps in the order of a pass, and the facts about the pass (see Trace)."""

    steps: list[Step]
    tokens: list[int]
    pieces: list[str]
    start: int
    made_by: str
    windows: list[int | None] | None


def read_dump(path: Path, rope_row_order: RowOrder | None) -> Dump:
    """Return the contents of a file; `Trace.load` describes its form. Raises CheckpointError.

    rope_row_order  the order of RoPE's pairs if the file's metadata do not hold it; None: "interleaved"
    """
    file = open_tensor_file(path)
    tensors = {tensor.name: tensor for tensor in file}
    about = _about(path, file.metadata)
    tokens = _tokens(path, tensors)
    names = sorted((name for name in tensors if _is_step(name)), key=step_order)
    if not names:
        raise CheckpointError(f"{path}: holds no step; expected tensors with names like 'embedding' or 'layers.0.q'")
    if others := sorted(tensors.keys() - {"tokens", "pieces", *names}):
        warn(f"{path}: {len(others)} tensors are not steps and are ignored: {_with_likely_names(others[:8])}")
    about["has_experts"] |= any(name.endswith((".router_logits", ".expert_weights")) for name in names)
    steps = [_step(tensors[name], about, about["rope_row_order"] or rope_row_order) for name in names]
    n_tokens = _checked_count(path, steps, tokens)
    pieces = _pieces(path, tensors, n_tokens) if "pieces" in tensors else [str(token) for token in tokens]
    return Dump(steps, tokens, pieces, about["start"], about["made_by"], about["windows"])


def _checked_count(path: Path, steps: Sequence[Step], tokens: Sequence[int]) -> int:
    """Return the number of tokens in the pass: the ids in the file, or else what the steps have.

    Raises CheckpointError unless all steps have the same number of tokens, and as many as the file has token ids.
    """
    counts = {step.name: tokens_of(step) for step in steps if tokens_of(step)}
    for name in {"norm", "logits"} & counts.keys():
        if counts[name] == 1:  # the step may hold only the last token
            del counts[name]
    usual = max(counts.values(), key=list(counts.values()).count, default=len(tokens))
    for step in steps:
        if counts.get(step.name, usual) != usual:
            hint = ", or are its axes in another order?" if usual in step.value.shape else ""
            raise CheckpointError(
                f"{path}: {step.name} has shape {short_repr(step.value.shape)}, so its axes ({', '.join(step.axes)}) "
                f"give it {counts[step.name]} tokens; expected {usual}, as in most steps{hint}"
            )
    if tokens and counts and len(tokens) != usual:
        raise CheckpointError(f"{path}: tokens holds {len(tokens)} ids; expected {usual}, as in the steps")
    return len(tokens) or max(map(tokens_of, steps))


def _with_likely_names(names: Sequence[str]) -> str:
    """Return names of tensors as one text. If a step has a similar name, it stands in brackets behind the tensor's.

    >>> _with_likely_names(["layers.0.q_rotate", "Logits", "x"])
    "'layers.0.q_rotate' (layers.N.q_rotated?), 'Logits' (logits?), 'x'"
    """
    texts = []
    for name in names:
        likely = difflib.get_close_matches(name.rpartition(".")[2].lower(), CATALOGUE, n=1)
        full = [kind if kind in _ENDS else f"layers.N.{kind}" for kind in likely]
        texts.append(short_repr(name) + "".join(f" ({kind}?)" for kind in full))
    return ", ".join(texts)


def _is_step(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and match[2] in CATALOGUE and (match[1] is None) == (match[2] in _ENDS)


def step_order(name: str) -> tuple[int, int, int]:
    """Return a key that sorts names of steps in the order of a pass."""
    layer, _, kind = name.removeprefix("layers.").rpartition(".")
    rank = list(CATALOGUE).index(kind)
    return (1, int(layer), rank) if layer else (0 if kind == "embedding" else 2, 0, rank)


def tokens_of(step: Step) -> int:
    """Return how many tokens a step's value has; 0 if no axis counts tokens, as in steps of (token, expert) pairs."""
    axis = next((axis for axis, name in enumerate(step.axes) if name in ("token", "query")), None)
    return 0 if axis is None else step.value.shape[axis]


def _about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields in a trace's metadata; an absent field gets its default. Raises CheckpointError."""
    about: dict[str, Any] = {"start": 0, "made_by": "", "has_experts": False, "sources": {}}
    about |= {"rope_row_order": None, "windows": None}
    try:
        about |= _checked("it", parse_json(metadata.get(FORMAT, "{}")), dict)
        start = checked_int("start", about["start"], 0, _MAX_POSITIONS)
        made_by = printable(_checked("made_by", about["made_by"], str))
        has_experts = _checked("has_experts", about["has_experts"], bool)
        sources = {kind: printable(str(source)) for kind, source in _checked("sources", about["sources"], dict).items()}
        row_order = checked_row_order(about["rope_row_order"])
        windows = None if about["windows"] is None else _checked("windows", about["windows"], list)
        for window in windows or []:
            if window is not None:
                checked_int("windows", window, 1, _MAX_POSITIONS)
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata {FORMAT} cannot be read: {printable(str(error))}") from None
    return {
        "start": start,
        "made_by": made_by,
        "has_experts": has_experts,
        "sources": sources,
        "rope_row_order": row_order,
        "windows": windows,
    }


def _checked(name: str, value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise InputError(f"{name} is {short_repr(value)}; expected {kind.__name__}")
    return value


def _tokens(path: Path, tensors: Mapping[str, Tensor]) -> list[int]:
    if "tokens" not in tensors:
        return []
    tensor = tensors["tokens"]
    if tensor.dtype not in _ID_DTYPES or not (len(tensor.shape) == 1 or tensor.shape[:-1] == (1,)):
        found = f"{tensor.dtype} {short_repr(tensor.shape)}"
        raise CheckpointError(f"{path}: tokens is {found}; expected {', '.join(_ID_DTYPES)} of one axis")
    ids: list[int] = tensor.raw.view(_ID_DTYPES[tensor.dtype]).tolist()
    return ids


def _pieces(path: Path, tensors: Mapping[str, Tensor], n_tokens: int) -> list[str]:
    text = tensors["pieces"].raw.tobytes()
    n_pieces = text.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"') // 2  # counted first: parsing takes longer
    if n_pieces > n_tokens:
        raise CheckpointError(f"{path}: pieces holds {n_pieces} texts; expected one for each of {n_tokens} tokens")
    try:
        pieces = parse_json(text.decode())
    except ValueError as error:
        raise CheckpointError(f"{path}: pieces cannot be read: {printable(str(error))}") from None
    if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
        raise CheckpointError(f"{path}: pieces is {short_repr(pieces)}; expected a list of texts")
    return pieces


def _step(tensor: Tensor, about: Mapping[str, Any], row_order: RowOrder | None) -> Step:
    """Return the step that a tensor of a file holds."""
    kind = tensor.name.rpartition(".")[2]
    entry = (EXPERT_CATALOGUE if about["has_experts"] else CATALOGUE)[kind]
    shape = tensor.shape
    if len(shape) == len(entry.axes) + 1 and shape[0] == 1:
        shape = shape[1:]
    if kind in ("norm", "logits") and len(shape) == 1:
        shape = (1, *shape)  # only the last token
    is_turned = row_order == "halves" and kind in _TURNED
    problem = f"{tensor.path}: {tensor.name} has shape {short_repr(tensor.shape)}; expected"
    if not _fits(shape, entry.axes):
        raise CheckpointError(f"{problem} the axes {', '.join(entry.axes)}")
    if is_turned and shape[2] % 2:
        raise CheckpointError(f"{problem} heads of an even width, because RoPE pairs their halves")
    keys = None
    if entry.axes[-1] == "key":  # the last key belongs to the last query's own token
        end = about["start"] + shape[1]
        keys = range(end - shape[2], end)
        if not shape[1] <= len(keys) <= end:
            raise CheckpointError(
                f"{problem} {shape[1]} to {end} keys (axes {', '.join(entry.axes)}), because its queries begin at "
                f"position {about['start']}"
            )
    value = tensor.floats().reshape(shape)
    if is_turned:
        value = value.reshape(*shape[:2], 2, -1).swapaxes(2, 3).reshape(shape)
    is_ours = bool(about["made_by"])  # our own files hold -inf, so their scores need no search for masks
    if kind == "scores" and not is_ours and (value <= _MASKED).any():
        value = np.where(value <= _MASKED, value.dtype.type(-np.inf), value)
    value.flags.writeable = False
    step = Step(tensor.name, entry, value, keys)
    step.source, step.is_past = about["sources"].get(kind, ""), True
    step.rounding = _ROUNDINGS.get(tensor.dtype, 0.0)
    return step


def _fits(shape: Sequence[int], axes: Sequence[str]) -> bool:
    """Return whether a step can have this shape. Only the axis "pair" may be empty: if no token has an expert."""
    if len(shape) != len(axes):
        return False
    return all(0 < n < _MAX_POSITIONS or (n, axis) == (0, "pair") for n, axis in zip(shape, axes, strict=True))
