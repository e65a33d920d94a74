"""The Python that does what changes do, with the public library alone, for a reader to copy and to go on from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from mistral_ref.config import ModelConfig
from mistral_ref.errors import escaped
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt
from mistral_ref.study.changes.applying import Plan, Planned, plan
from mistral_ref.study.changes.of_passes import Patch
from mistral_ref.study.changes.of_steps import Change, Index, StepChange, window_of
from mistral_ref.walk import inside_attention


def python_source(
    model: Model, prompt: Prompt, changes: Sequence[Change], *,
    load: str = "mistral_ref.load()", more: Sequence[int] = (),
) -> str:  # fmt: skip
    """Return a program that makes these changes. At its end `logits` (T, V) are those after `apply`, bit for bit.

    load    the expression that loads the model
    more    ids of tokens that follow the prompt: `logits` are those of both together

    Changes that are off are left out. Raises ChangeError and InputError as `apply`.
    """
    found = plan(model, prompt, changes)
    lines = [*_imports(found), "", f"model = {load}"]
    lines += [f"prompt = {prompt if isinstance(prompt, str) else model.token_ids(prompt)!r}", *_changed_model(found)]
    functions, entries = list[str](), list[str]()
    for number, planned in enumerate(found.steps, 1):
        if planned.other_ids is not None:
            lines.append(f"kept_{number} = model.trace({_other(planned)}, keep={planned.change.step!r})")
        for function, entry in _edits(number, planned, found.model.config):
            functions += ["", "", *function]
            entries.append(f"    {entry},")
    if functions:
        lines += [*functions, "", "", "edits = [", *entries, "]"]
    changed = "changed" if found.configs or found.bugs else "model"
    edits = ", edits=edits" if functions else ""
    tokens = f"[*{changed}.token_ids(prompt), {', '.join(map(str, more))}]" if more else "prompt"
    return "\n".join([*lines, f"logits = {changed}.forward({tokens}{edits})", ""])


def _imports(found: Plan) -> list[str]:
    inside = any(inside_attention(planned.places) for planned in found.steps)
    imports = ["import numpy as np", "", "import mistral_ref"] if inside else ["import mistral_ref"]
    if inside:
        imports.append("from mistral_ref.reference_ops import attends")
    if found.bugs:
        imports.append("from mistral_ref.study.broken import broken")
    if found.configs:
        imports.append("from mistral_ref.study.changes import with_config")
    needs_partial = any(planned.other_ids is not None for planned in found.steps)
    return [*(["from functools import partial", ""] if needs_partial else []), *imports]


def _changed_model(found: Plan) -> Iterator[str]:
    name = "model"
    for config in found.configs:
        yield f"changed = with_config({name}, {config.source})  # {escaped(str(config))}"
        name = "changed"
    if found.bugs:
        yield f"changed = broken({name}, {', '.join(map(repr, found.bugs))})"


def _other(planned: Planned) -> str:
    if not isinstance(planned.change, Patch):
        return "prompt"
    text = planned.change.text
    return repr(text if isinstance(text, str) else list(text))


def _edits(number: int, planned: Planned, config: ModelConfig) -> Iterator[tuple[list[str], str]]:
    """Yield functions, as lines, and for each the entries of the list of edits that name it."""
    change, takes_other = planned.change, planned.other_ids is not None
    names_by_body = defaultdict[tuple[str, ...], list[str]](list)
    for name, index in planned.places.items():
        names_by_body[tuple(_body(change, name, index, config))].append(name)
    for part, (body, names) in enumerate(names_by_body.items(), 1):
        is_whole = len(names_by_body) == 1
        function = f"change_{number}" if is_whole else f"change_{number}_{part}"
        yield (
            [
                f"def {function}(value{', kept' if takes_other else ''}):",
                f"    # {escaped(str(change))}",
                *(f"    {line}" for line in body),
            ],
            _entry(change.step if is_whole else "", names, function, f"kept_{number}" if takes_other else ""),
        )


def _body(change: StepChange, name: str, index: Index, config: ModelConfig) -> list[str]:
    """Return the lines of the function that changes a step."""
    if not inside_attention([name]):
        return ["value = value.copy()", change.statement(index), "return value"]
    return [
        "before, value = value, value.copy()",
        change.statement(index),
        "query, key = np.ogrid[: value.shape[1], : value.shape[2]]",
        *change.seen_statements(index, window_of(config, name)),
        "return np.where(seen, value, before)",
    ]


def _entry(step: str, names: list[str], function: str, kept: str) -> str:
    """Return the entry of the list of edits for some steps.

    step    the name or glob that means these steps and no others; "" if there is none
    kept    the name of the trace from which numbers are taken; "" if none are

    >>> _entry("layers.*.q", ["layers.0.q", "layers.1.q"], "change_1", "")
    "('layers.*.q', change_1)"
    >>> _entry("layers.0.q", ["layers.0.q"], "change_1", "kept_1")
    "('layers.0.q', partial(change_1, kept=kept_1['layers.0.q']))"
    """
    if not kept and step:
        return f"({step!r}, {function})"
    made = f"partial({function}, kept={kept}[{{}}])" if kept else function
    if len(names) == 1:
        return f"({names[0]!r}, {made.format(repr(names[0]))})"
    return f"*((name, {made.format('name')}) for name in {kept if step else repr(names)})"
