"""What the page of a pass shows, as data for JSON: report.py puts it into a file, and the live page sends it."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from statistics import median
from typing import Any

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.display import statistics
from mistral_ref.heat_map import heat_map
from mistral_ref.measure.cost_table import CostTable
from mistral_ref.model import Model
from mistral_ref.rope import inverse_frequencies
from mistral_ref.steps import Step, catalogue_of, step_names
from mistral_ref.study import lens
from mistral_ref.trace import Trace
from mistral_ref.walk import source_lines

_MAX_ROWS, _MAX_COLUMNS, _LEVELS = 64, 96, 126  # size of a picture; levels of a cell above 0, and as many below
_BINS = 48  # of a histogram
_N_CHOICES = 5  # how many next tokens the logit lens shows
Entry = dict[str, Any]


def pass_entry(model: Model, title: str, ids: Sequence[int], start: int) -> Entry:
    """Return what the page says of a pass before any of its steps: the model, and the tokens from position `start`."""
    return {
        "title": title or f"a model of {model.config.n_parameters:,} parameters",
        "madeBy": f"mistral_ref {version('mistral-ref')}, {model.ops.dtype} by {model.ops.name}",
        "start": start,
        "tokens": [{"id": token, "piece": model.piece(token)} for token in ids],
        "config": _config_entry(model.config),
        "kinds": _kind_entries(model.config),
    }


def step_entry(step: Step) -> Entry:
    """Return what is known of a step without its values."""
    return {
        "name": step.name,
        "kind": step.name.rpartition(".")[2],
        "shape": step.value.shape,
        "dtype": str(step.value.dtype),
        "source": step.source,
        "code": "".join(text.strip() for _, text in source_lines(step.source)),
        "firstKey": None if step.key_positions is None else step.key_positions.start,
    }


def values_entry(step: Step, config: ModelConfig, *, is_whole: bool) -> Entry:
    """Return the values of a step: all of them, or a picture; with their statistics and their histogram."""
    value, visible = step.value, _visible_values(step, config)
    finite = visible[np.isfinite(visible)].astype(np.float64)
    return {
        "statistics": {name: number(found) for name, found in statistics(visible)._asdict().items()},
        "histogram": np.histogram(finite, _BINS)[0].tolist() if finite.size else [],
        "whole": packed(value) if is_whole else None,
        "picture": None if is_whole or step.key_positions is not None else _picture(value),
    }


def rms(step: Step, config: ModelConfig) -> float | None:
    """Return the root mean square of the values of a step, as `values_entry` has it; None if there is none."""
    return number(statistics(_visible_values(step, config)).rms)


def _visible_values(step: Step, config: ModelConfig) -> np.ndarray:
    """Return the values for statistics and histogram: of scores and weights only those of keys that a query sees."""
    if step.key_positions is None:
        return step.value
    return step.value[lens.visible_keys(step, config) | ~np.isin(step.value, (0.0, -np.inf))]  # shows a wrong window


def packed(values: np.ndarray) -> Entry:
    """Return numbers in a small form: as float16, scaled by a power of 2 into its range, compressed, in base 64.

    The lower bytes of all numbers come first, and then the upper bytes. The upper bytes are much alike, so this order
    compresses better.

    >>> packed(np.array([1e-30, -np.inf]))["exponent"]  # the largest becomes 2^14 at least: 2^14 * 2^exponent <= 1e-30
    -114
    """
    values = values.astype(np.float64)
    largest = float(np.abs(values, where=np.isfinite(values), out=np.zeros_like(values)).max(initial=0.0))
    exponent = math.frexp(largest)[1] - 15
    halves = np.ldexp(values, -exponent).astype("<f2")
    planes = halves.reshape(-1).view(np.uint8).reshape(-1, 2).T
    return {"exponent": exponent, "data": _deflated(planes.tobytes())}


def _picture(value: np.ndarray) -> Entry:
    """Return a value as a small heat map, one byte per cell: a row is a token, and heads are side by side."""
    heat = heat_map(value.reshape(len(value), -1), _MAX_ROWS, _MAX_COLUMNS)
    levels = np.rint(np.where(np.isfinite(heat.cells), heat.cells, 0) * _LEVELS)
    levels[np.isnan(heat.cells)] = -_LEVELS - 2
    levels[np.isinf(heat.cells)] = _LEVELS + 1
    return {"scale": heat.scale, "shape": heat.cells.shape, "data": _deflated(levels.astype(np.int8).tobytes())}


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _config_entry(config: ModelConfig) -> Entry:
    return {
        "dim": config.dim,
        "layers": config.n_layers,
        "heads": config.n_heads,
        "kvHeads": config.n_kv_heads,
        "headDim": config.head_dim,
        "hidden": config.hidden_dim,
        "vocabulary": config.vocab_size,
        "theta": config.rope_theta,
        "yarn": config.yarn is not None,
        "windows": config.sliding_window,
        "experts": None if config.moe is None else [config.moe.num_experts, config.moe.num_experts_per_tok],
        "parameters": config.n_parameters,
    }


def _kind_entries(config: ModelConfig) -> Entry:
    """Return the catalogue's entry for each kind of step, in the order of the pass."""
    catalogue = catalogue_of(config)
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in step_names(config))
    return {kind: catalogue[kind]._asdict() for kind in kinds}


def rope_entry(config: ModelConfig, q_K: np.ndarray, k_K: np.ndarray) -> Entry:
    """Return one query and one key before RoPE turns them, and everything that their rotation depends on."""
    temperature = config.query_temperature
    return {
        "q": _finite(q_K),
        "k": _finite(k_K),
        "frequencies": inverse_frequencies(config.rope_theta, config.head_dim, config.yarn).tolist(),
        "factor": 1.0 if config.yarn is None else config.yarn.attention_factor,
        "temperature": temperature
        and {"beta": temperature.beta, "positions": temperature.original_max_position_embeddings},
    }


def lens_entry(model: Model, trace: Trace) -> Entry:
    """Return the likeliest next tokens after every layer, of a trace that holds the residual stream."""
    predictions = lens.logit_lens(model, trace, top=min(_N_CHOICES, model.config.vocab_size))
    return {
        "names": predictions.names,
        "ids": predictions.ids_RTN.tolist(),
        "probabilities": [[_finite(np.exp(p_N)) for p_N in p_TN] for p_TN in predictions.logprobs_RTN],
        "pieces": {str(token): piece for token, piece in predictions.pieces.items()},
    }


def cost_entry(table: CostTable) -> Entry:
    """Return what each step costs, and the limits of the machine."""

    def rows(*, by_kind: bool) -> Iterator[Entry]:
        for row in table.rows(by_kind=by_kind):
            yield {
                "name": row.cost.name,
                "flops": row.cost.flops,
                "bytes": row.cost.bytes,
                "bound": row.bound,
                "predicted": row.predicted,
                "seconds": median(row.seconds),
                "range": [min(row.seconds), max(row.seconds)],
            }

    return {
        "bandwidth": table.limits.bandwidth,
        "peak": table.limits.peak,
        "repeats": len(table.runs),
        "kinds": list(rows(by_kind=True)),
        "steps": {row["name"]: row for row in rows(by_kind=False)},
    }


def number(value: float) -> float | int | None:
    """Return a number for JSON: None in place of NaN and infinity, which JSON does not have."""
    return value if isinstance(value, int) or math.isfinite(value) else None


def _finite(values: np.ndarray) -> list[float | None]:
    return [number(round(float(value), 6)) for value in values]
