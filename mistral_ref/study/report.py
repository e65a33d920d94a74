"""A forward pass as one HTML page: a reader clicks through all its steps, in any browser and without a network.

    from mistral_ref.study import report

    report.write(model, "Once upon a time", "trace.html")

The files in page/ define how the page looks and moves. This module collects the data that it shows.

Foreign text, such as a prompt or a tokenizer's pieces, must not become markup or a script. So all data goes into the
page as JSON in which no HTML tag can begin, and the script inserts it as text. The page's content security policy lets
a browser run only the one script and the one style that are in the page, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mistral_ref.cache import KVCache
from mistral_ref.config import ModelConfig
from mistral_ref.display import statistics
from mistral_ref.errors import InputError, Progress
from mistral_ref.files.whole_file import whole_file
from mistral_ref.heat_map import heat_map
from mistral_ref.measure.cost_table import CostTable, cost_table
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.rope import inverse_frequencies
from mistral_ref.steps import CATALOGUE, Step, catalogue_of, count_values, step_names
from mistral_ref.study import lens
from mistral_ref.trace import Trace
from mistral_ref.walk import Edit, matching_steps, source_lines

_FOLDER = Path(__file__).parent / "page"
_SCRIPTS = (
    "dom", "values", "heat", "charts", "diagram", "block", "attention", "ring", "ring_drawing", "field", "rope",
    "heads", "lens", "cost", "main",
)  # fmt: skip
_MAX_BY_DEFAULT = 2**22  # how many values a page holds by default: about 10 MB
_MAX_EVER = 2**26  # how many values `keep` may choose: about 160 MB; browsers refuse strings of more than 512 MB
_MAX_ROWS, _MAX_COLUMNS, _LEVELS = 64, 96, 126  # size of a picture; levels of a cell above 0, and as many below
_BINS = 48  # of a histogram
_N_CHOICES = 5  # how many next tokens the logit lens shows

# The steps kept by default: the first of these groups whose values are few enough.
_BY_DEFAULT = (("*",), ("*.attention_weights", "embedding", "*.residual_after_*", "norm"), ("*.attention_weights",), ())


def write(
    model: Model, prompt: Prompt, path: str | os.PathLike[str], *,
    keep: str | Iterable[str] | None = None, cache: KVCache | None = None, edits: Mapping[str, Edit] | None = None,
    with_cost: bool = True, title: str = "", progress: Progress | None = None,
) -> None:  # fmt: skip
    """Write the page of a pass to a file; `page` explains the arguments. The file appears only when it is complete."""
    with whole_file(path, InputError) as file:
        text = page(
            model, prompt, keep=keep, cache=cache, edits=edits, with_cost=with_cost, title=title, progress=progress
        )
        file.write(text.encode())


def page(
    model: Model, prompt: Prompt, *,
    keep: str | Iterable[str] | None = None, cache: KVCache | None = None, edits: Mapping[str, Edit] | None = None,
    with_cost: bool = True, title: str = "", progress: Progress | None = None,
) -> str:  # fmt: skip
    """Return the page of the forward pass of a prompt.

    keep        names or globs of steps. The page holds all values of these steps, as float16 (11 bits). Of each other
                step it holds a picture of at most 64 by 96 cells; scores and attention weights have no picture.
                None: every step is kept if all steps together have at most 2**22 values. If they have more, the page
                keeps the first of these groups that has at most 2**22 values: attention weights and the residual
                stream; attention weights alone; no step.
    cache       as in `Model.steps`: the pass starts after the tokens in the cache, and adds its own tokens to it
    edits       as in `Model.forward`
    with_cost   whether the page shows the time of every step beside the time that the machine's limits predict; the
                limits are measured, and the pass that is timed has no edits
    title       the name of the model
    progress    called with (done, in all): first it counts the timed passes, then the steps

    Raises InputError if a pattern in `keep` matches no step, or if it chooses more than 2**26 values.
    """
    config = model.config
    ids, edits = model.token_ids(prompt, cache), {} if edits is None else edits
    start = 0 if cache is None else cache.length
    kept = _kept(config, len(ids), start, keep)
    costs = cost_table(model, ids, cache, progress=progress) if with_cost else None
    names, entries, residuals = list(step_names(config)), [], []
    to_turn: dict[str, np.ndarray] = {}
    for done, step in enumerate(model.steps(ids, cache, edits=edits)):
        entries.append(_step_entry(step, step.name in kept, config))
        if step.name == "embedding" or step.kind is CATALOGUE["residual_after_ffn"]:
            residuals.append(step)
        if step.name in ("layers.0.q", "layers.0.k"):
            to_turn[step.name[-1]] = step.value
        if progress:
            progress(done + 1, len(names))
    trace = Trace(residuals, ids, [model.piece(token) for token in ids], start=start)
    about = {
        "title": title or f"a model of {config.n_parameters:,} parameters",
        "madeBy": f"mistral_ref {version('mistral-ref')}, {model.ops.dtype} by {model.ops.name}",
        "start": start,
        "tokens": [{"id": token, "piece": piece} for token, piece in zip(ids, trace.pieces, strict=True)],
        "config": _config_entry(config),
        "kinds": _kind_entries(config),
        "steps": entries,
        "rope": _rope_entry(config, to_turn["q"][-1, 0], to_turn["k"][0, 0]),
        "lens": _lens_entry(lens.logit_lens(model, trace, top=min(_N_CHOICES, config.vocab_size))),
        "cost": None if costs is None else _cost_entry(costs),
    }
    return _html(about)


def _kept(config: ModelConfig, n_tokens: int, start: int, keep: str | Iterable[str] | None) -> set[str]:
    """Return the names of the steps of which the page holds all values."""
    if keep is not None:
        chosen = matching_steps(keep, config)
        n_values = count_values(config, n_tokens, start, chosen)
        if n_values > _MAX_EVER:
            raise InputError(
                f"keep chooses {n_values:,} values; expected at most {_MAX_EVER:,}: browsers cannot open a larger page"
            )
        return set(chosen)
    for patterns in _BY_DEFAULT:
        chosen = matching_steps(patterns, config)
        if count_values(config, n_tokens, start, chosen) <= _MAX_BY_DEFAULT:
            break
    return set(chosen)


def _step_entry(step: Step, is_kept: bool, config: ModelConfig) -> dict[str, Any]:
    """Return the data of one step in the page."""
    value, visible = step.value, _visible_values(step, config)
    finite = visible[np.isfinite(visible)].astype(np.float64)
    counts = np.histogram(finite, _BINS)[0].tolist() if finite.size else []
    return {
        "name": step.name,
        "kind": step.name.rpartition(".")[2],
        "shape": value.shape,
        "dtype": str(value.dtype),
        "source": step.source,
        "code": "".join(text.strip() for _, text in source_lines(step.source)),
        "firstKey": None if step.key_positions is None else step.key_positions.start,
        "statistics": {name: _number(number) for name, number in statistics(visible)._asdict().items()},
        "histogram": counts,
        "whole": packed(value) if is_kept else None,
        "picture": None if is_kept or step.key_positions is not None else _picture(value),
    }


def _visible_values(step: Step, config: ModelConfig) -> np.ndarray:
    """Return the values for statistics and histogram: of scores and weights only those of keys that a query sees."""
    if step.key_positions is None:
        return step.value
    return step.value[lens.visible_keys(step, config) | ~np.isin(step.value, (0.0, -np.inf))]  # shows a wrong window


def packed(values: np.ndarray) -> dict[str, Any]:
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


def _picture(value: np.ndarray) -> dict[str, Any]:
    """Return a value as a small heat map, one byte per cell: a row is a token, and heads are side by side."""
    heat = heat_map(value.reshape(len(value), -1), _MAX_ROWS, _MAX_COLUMNS)
    levels = np.rint(np.where(np.isfinite(heat.cells), heat.cells, 0) * _LEVELS)
    levels[np.isnan(heat.cells)] = -_LEVELS - 2
    levels[np.isinf(heat.cells)] = _LEVELS + 1
    return {"scale": heat.scale, "shape": heat.cells.shape, "data": _deflated(levels.astype(np.int8).tobytes())}


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _config_entry(config: ModelConfig) -> dict[str, Any]:
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


def _kind_entries(config: ModelConfig) -> dict[str, Any]:
    """Return the catalogue's entry for each kind of step, in the order of the pass."""
    catalogue = catalogue_of(config)
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in step_names(config))
    return {kind: catalogue[kind]._asdict() for kind in kinds}


def _rope_entry(config: ModelConfig, q_K: np.ndarray, k_K: np.ndarray) -> dict[str, Any]:
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


def _lens_entry(predictions: lens.LogitLens) -> dict[str, Any]:
    return {
        "names": predictions.names,
        "ids": predictions.ids_RTN.tolist(),
        "probabilities": [[_finite(np.exp(p_N)) for p_N in p_TN] for p_TN in predictions.logprobs_RTN],
        "pieces": {str(token): piece for token, piece in predictions.pieces.items()},
    }


def _cost_entry(table: CostTable) -> dict[str, Any]:
    def rows(*, by_kind: bool) -> Iterator[dict[str, Any]]:
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


def _number(number: float) -> float | int | None:
    """Return a number for JSON: None in place of NaN and infinity, which JSON does not have."""
    return number if isinstance(number, int) or math.isfinite(number) else None


def _finite(values: np.ndarray) -> list[float | None]:
    return [_number(round(float(value), 6)) for value in values]


def _html(about: dict[str, Any]) -> str:
    """Return the page: policy, style, script and data are put into the skeleton.

    Under the policy nothing but this style and this script runs, and nothing is loaded.
    """
    style = "\n".join((_FOLDER / f"{name}.css").read_text(encoding="utf-8") for name in ("page", "print"))
    script = "\n".join((_FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'"use strict";\n{script}'
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(about, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
    skeleton = (_FOLDER / "page.html").read_text(encoding="utf-8")
    for name, part in {"policy": policy, "style": style, "script": script, "data": data}.items():
        before, after = skeleton.split(f"{{{{{name}}}}}")
        skeleton = before + part + after
    return skeleton


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
