"""The same weights in two layouts: are they the same, and are the rows of wq and wk in the order of each layout?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.measure.doctor.finding import Finding
from mistral_ref.measure.doctor.patient import Opened, Patient
from mistral_ref.weights import Matrix, matrices

_ROWS = 8  # of each matrix that are compared; of wq and wk those of the first head, within which rows move
# How far rows lie apart, in their own size. Rounding to 4 bits moves them by 0.1, and other rows by about 1.4.
_FAR = 0.5
_FLOATS = ("f32", "f16", "bf16")


def check_layouts(patient: Patient) -> Iterator[Finding]:
    """Compare the weights of each layout with those that are loaded."""
    for first, other in ((patient.opened[0], other) for other in patient.opened[1:]):
        patient.examined.append(f"{_file(first)} and {_file(other)}: the first rows of every matrix, compared")
        yield from _compared(first, other, first.config)


def _file(opened: Opened) -> str:
    return opened.checkpoint.files[0].path.name


def _compared(first: Opened, other: Opened, config: ModelConfig) -> Iterator[Finding]:
    theirs = {matrix.name: matrix for matrix in matrices(other.weights)}
    differing: list[str] = []
    orders: dict[str, list[str]] = {}
    for ours in matrices(first.weights):
        if (their := theirs.get(ours.name)) is None or ours.shape != their.shape:
            continue
        a = _first_rows(ours, config, first)
        if _same(ours, their, a, _first_rows(their, config, other)):
            continue
        if _is_turned(ours) and (order := _order(ours, their, a, config, _file(first))):
            orders.setdefault(order, []).append(ours.name)
        else:
            differing.append(ours.name)
    path = other.checkpoint.files[0].path
    for order, names in orders.items():
        yield Finding(
            "wrong",
            path,
            f"the rows of {_listed(names)} {order}",
            "With the wrong order RoPE turns the wrong pairs of numbers, and the model writes gibberish.",
            f"Convert again, or use {_file(first)} alone.",
        )
    if differing:
        yield Finding(
            "wrong",
            path,
            f"not the same as in {_file(first)}: {_listed(differing)}",
            "The two layouts hold two models. This program loads the first; another may load this one.",
            "Delete the layout that is not meant, with its configuration.",
        )


def _listed(names: list[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if names[1:] else names[0]


def _is_turned(matrix: Matrix) -> bool:
    """Return whether RoPE turns the rows of a matrix, so that their order differs between the layouts."""
    return matrix.name.endswith((".wq", ".wk"))


def _first_rows(matrix: Matrix, config: ModelConfig, opened: Opened) -> np.ndarray:
    """Return the first rows of a matrix, in Mistral's own order."""
    if not _is_turned(matrix):
        return matrix.rows(slice(_ROWS), np.float32)
    rows = np.arange(config.head_dim)
    if opened.checkpoint.row_order == "halves":
        rows = rows.reshape(2, -1).T.reshape(-1)
    return matrix.rows(rows, np.float32)


def _order(ours: Matrix, theirs: Matrix, a: np.ndarray, config: ModelConfig, name: str) -> str:
    """Return what is wrong with the order of their rows, in words; "" if no order makes them the same.

    a       our rows of the first head, in Mistral's own order
    name    the name of our file
    """
    head = np.arange(config.head_dim)
    one_in_halves = f"are in another order than in {name}: one file has halves; both should be interleaved"
    orders = [
        (head, f"were not moved: they are as in {name}; expected one file interleaved, and the other in halves"),
        (head.reshape(2, -1).T.reshape(-1), one_in_halves),
        (head.reshape(-1, 2).T.reshape(-1), one_in_halves),
    ]
    narrow, rest = divmod(config.head_dim * config.n_kv_heads, config.n_heads)
    if not rest and narrow % 2 == 0:
        rows = head.reshape(-1, 2, narrow // 2).swapaxes(1, 2).reshape(-1)
        moved = f"were moved as rows of {config.n_heads} heads of {narrow}"
        orders.append((rows, f"{moved}; expected {config.n_kv_heads} heads of {config.head_dim}"))
    return next((text for rows, text in orders if _same(ours, theirs, a, theirs.rows(rows, np.float32))), "")


def _same(ours: Matrix, theirs: Matrix, a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether rows are the same: equal if both files store the same floats, and else near each other."""
    if ours.kind == theirs.kind and ours.kind in _FLOATS:
        return np.array_equal(a, b, equal_nan=True)
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is another check's
        return not np.linalg.norm(a - b) > _FAR * np.linalg.norm(a)
