"""The weights themselves: NaN, infinities, rows of zeros, outliers, and scales of fp8. Every weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mistral_ref.errors import Progress
from mistral_ref.host import chosen_threads
from mistral_ref.measure.doctor.finding import Finding
from mistral_ref.measure.doctor.patient import Opened, Patient
from mistral_ref.text.tokenizer import Tokenizer
from mistral_ref.weights import Matrix, matrices, norms

_SLICE = 2**20  # weights that are widened to floats at once
# In trained models the largest weight of a row is between 0.001 and 10, and rows of one matrix differ by less than
# a hundred times.
_LEAST, _MOST, _OUTLIER = 1e-7, 100.0, 1000.0
_AGAIN = "Take the file anew from the model's publisher. If it is the same there, tell them."


def check_values(patient: Patient, progress: Progress | None = None) -> Iterator[Finding]:
    """Check every weight; `progress` is called with (weights done, weights in all)."""
    total = sum(matrix.size for opened in patient.opened for matrix in matrices(opened.weights))
    done = 0
    with ThreadPoolExecutor(chosen_threads(None)) as pool:
        for opened in patient.opened:
            for name, values in norms(opened.weights).items():
                yield from _norm(opened.checkpoint.tensors[name].path, name, values)
            for matrix in matrices(opened.weights):
                opened.weights.check_files()
                path = opened.weights.path_of(matrix) or patient.path
                yield from _scales(path, matrix)
                peaks = np.concatenate(list(_peaks(matrix, pool)))
                yield from _matrix(path, matrix, peaks, patient.tokenizer)
                done += matrix.size
                if progress is not None:
                    progress(done, total)
            patient.examined.append(f"{_name(opened)}: every weight")


def _name(opened: Opened) -> str:
    first, *others = (file.path.name for file in opened.checkpoint.files)
    return f"{first} and {len(others)} more" if others else first


def _peaks(matrix: Matrix, pool: Executor) -> Iterator[np.ndarray]:
    """Return the largest size of a weight in each row, in pieces; NaN or infinite if one is."""

    def of_rows(first: int) -> np.ndarray:
        rows = matrix.rows(slice(first, first + height), np.float32)
        return np.maximum(rows.max(axis=1), -rows.min(axis=1))

    n_out, n_in = matrix.shape
    height = max(1, _SLICE // n_in)
    return pool.map(of_rows, range(0, n_out, height))


def _norm(path: Path, name: str, values: np.ndarray) -> Iterator[Finding]:
    n_broken = int((~np.isfinite(values)).sum())
    if n_broken:
        yield _not_finite(path, f"{name} has NaN or infinite weights: {n_broken} of {values.size}")
    elif not values.any():
        yield Finding("wrong", path, f"{name} is all zeros", "Nothing passes through this norm.", _AGAIN)


def _not_finite(path: Path, what: str) -> Finding:
    why = "NaN and infinities spread to every value that follows, and the logits become NaN."
    return Finding("wrong", path, what, why, _AGAIN)


def _scales(path: Path, matrix: Matrix) -> Iterator[Finding]:
    """Check the scales of an fp8 matrix."""
    if matrix.scale is None:
        return
    wrong = matrix.scale[~(np.isfinite(matrix.scale) & (matrix.scale > 0))]
    if wrong.size:
        yield Finding(
            "wrong",
            path,
            f"{wrong.size} of {matrix.scale.size} scales of {matrix.name} are no scales: {wrong.flat[0]:g}; expected "
            "numbers above 0",
            "Each fp8 weight is multiplied by its scale.",
            _AGAIN,
        )


def _matrix(path: Path, matrix: Matrix, peaks: np.ndarray, tokenizer: Tokenizer | None) -> Iterator[Finding]:
    """Check the largest weights of the rows of a matrix."""
    name, finite = matrix.name, np.isfinite(peaks)
    if not finite.all():
        yield _not_finite(path, f"{name} has NaN or infinite weights in {_of(~finite)}")
    alive = peaks[finite & (peaks > 0)]
    dead = _dead(matrix, peaks == 0, tokenizer)
    if dead.any():
        yield Finding(
            "suspicious",
            path,
            f"{name} has only zeros in {_of(dead)}",
            "Trained rows are never all zero: a part of the file may never have been written, as in a download that "
            "has not ended.",
            _AGAIN,
        )
    if not alive.size:
        return
    usual = float(np.median(alive))
    if not _LEAST <= usual <= _MOST:
        yield Finding(
            "suspicious",
            path,
            f"the largest weight of a row of {name} is {usual:.3g} (median); expected {_LEAST:g} to {_MOST:g}",
            "A scale is lost, or is the inverse of what it should be: weight = code * scale, although Hugging Face's "
            "files call it weight_scale_inv."
            if matrix.kind == "fp8"
            else "Weights of this size come from a wrong conversion.",
            _AGAIN,
        )
    elif (far := finite & (peaks > _OUTLIER * usual)).any():
        worst = int(np.argmax(np.where(finite, peaks, 0)))
        yield Finding(
            "suspicious",
            path,
            f"{name} has outliers in {_of(far)}: row {worst} has {peaks[worst]:.3g}, and the largest weight of a row "
            f"is {usual:.3g} (median)",
            "A damaged bit makes such a weight, and it drowns all others.",
            _AGAIN,
        )


def _dead(matrix: Matrix, zero: np.ndarray, tokenizer: Tokenizer | None) -> np.ndarray:
    """Return which rows of zeros should not be zero: of an embedding or a head, those of tokens that have a text.

    Models are published with more rows than tokens, and with tokens that are never used.
    """
    if tokenizer is None or matrix.name not in ("tok_embeddings", "output"):
        return zero
    dead = np.zeros_like(zero)
    for token in np.flatnonzero(zero[: tokenizer.n_pieces]).tolist():
        dead[token] = tokenizer.decode([token]) != ""
    return dead


def _of(which: np.ndarray) -> str:
    """Return in words which rows are meant."""
    n = int(which.sum())
    first = int(np.argmax(which))
    return f"row {first}" if n == 1 else f"{n} of {which.size} rows, the first of them {first}"
