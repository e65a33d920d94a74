"""A forward pass as one HTML page: a reader clicks through all its steps, in any browser and without a network.

    from mistral_ref.study import report

    report.write(model, "Once upon a time", "trace.html")

The files in page/ define how the page looks and moves, and page_data.py what it shows of a pass. This module takes the
pass, and writes the file.

Foreign text, such as a prompt or a tokenizer's pieces, must not become markup or a script. So all data goes into the
page as JSON in which no HTML tag can begin, and the script inserts it as text. The page's content security policy lets
a browser run only the one script and the one style that are in the page, and load nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ref.cache import KVCache
from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError, Progress
from mistral_ref.files.whole_file import whole_file
from mistral_ref.measure.cost_table import cost_table
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.steps import CATALOGUE, count_values, step_names
from mistral_ref.study.page_data import cost_entry, lens_entry, pass_entry, rope_entry, step_entry, values_entry
from mistral_ref.trace import Trace
from mistral_ref.walk import Edits, matching_steps

_FOLDER = Path(__file__).parent / "page"
_SCRIPTS = (
    "dom", "values", "heat", "charts", "diagram", "block", "attention", "ring", "ring_drawing", "field", "rope",
    "heads", "lens", "cost", "main",
)  # fmt: skip
# In page/live/: the live page has these too.
_LIVE_SCRIPTS = (
    "source",
    "text",
    "next",
    "changes",
    "editor",
    "keep",
    "go_on_parts",
    "go_on",
    "sweep_map",
    "sweep",
    "exercises",
    "live",
)
_LIVE_STYLES = ("live", "go_on", "sweep")
_LAST_SCRIPT = "begin"
_MAX_BY_DEFAULT = 2**22  # how many values a page holds by default: about 10 MB
_MAX_EVER = 2**26  # how many values `keep` may choose: about 160 MB; browsers refuse strings of more than 512 MB

# The steps kept by default: the first of these groups whose values are few enough.
_BY_DEFAULT = (("*",), ("*.attention_weights", "embedding", "*.residual_after_*", "norm"), ("*.attention_weights",), ())


def write(
    model: Model, prompt: Prompt, path: str | os.PathLike[str], *,
    keep: str | Iterable[str] | None = None, cache: KVCache | None = None, edits: Edits | None = None,
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
    keep: str | Iterable[str] | None = None, cache: KVCache | None = None, edits: Edits | None = None,
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
    ids = model.token_ids(prompt, cache)
    start = 0 if cache is None else cache.length
    kept = _kept(config, len(ids), start, keep)
    costs = cost_table(model, ids, cache, progress=progress) if with_cost else None
    n_steps, entries, residuals = len(list(step_names(config))), [], []
    to_turn: dict[str, np.ndarray] = {}
    for done, step in enumerate(model.steps(ids, cache, edits=edits), 1):
        entries.append(step_entry(step) | values_entry(step, config, is_whole=step.name in kept))
        if step.name == "embedding" or step.kind is CATALOGUE["residual_after_ffn"]:
            residuals.append(step)
        if step.name in ("layers.0.q", "layers.0.k"):
            to_turn[step.name[-1]] = step.value
        if progress:
            progress(done, n_steps)
    about = pass_entry(model, title, ids, start) | {
        "steps": entries,
        "rope": rope_entry(config, to_turn["q"][-1, 0], to_turn["k"][0, 0]),
        "lens": lens_entry(model, Trace(residuals, ids, [model.piece(token) for token in ids], start=start)),
        "cost": None if costs is None else cost_entry(costs),
    }
    return html(about)


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


def html(about: Mapping[str, Any], live: Mapping[str, Any] | None = None) -> str:
    """Return the page: policy, style, script and data are put into the skeleton.

    about   what the page shows of a pass
    live    what the live page knows of its server; the page of a file has None, and none of the live page's scripts

    Under the policy nothing but this style and this script runs, and nothing is loaded. The live page's script may also
    ask the server that has sent the page.
    """
    is_live = live is not None
    connect = "; connect-src 'self'" if is_live else ""
    style = _joined("css", ("page", *(f"live/{name}" for name in _LIVE_STYLES if is_live), "print"))
    live_scripts = [f"live/{name}" for name in _LIVE_SCRIPTS if is_live]
    script = f'"use strict";\n{_joined("js", (*_SCRIPTS, *live_scripts, _LAST_SCRIPT))}'
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; img-src data:; "
        f"base-uri 'none'; form-action 'none'{connect}"
    )
    data = json.dumps({**about, "live": live} if is_live else about, allow_nan=False, separators=(",", ":"))
    parts = {"policy": policy, "style": style, "script": script, "data": data.replace("<", r"\u003c")}
    skeleton = (_FOLDER / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        before, after = skeleton.split(f"{{{{{name}}}}}")
        skeleton = before + part + after
    return skeleton


def _joined(kind: str, names: Iterable[str]) -> str:
    return "\n".join((_FOLDER / f"{name}.{kind}").read_text(encoding="utf-8") for name in names)


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
