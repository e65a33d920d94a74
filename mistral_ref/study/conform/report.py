"""Verdicts as text, as JSON and as a page."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.resources import files
from math import isfinite
from typing import Any

from mistral_ref.study.broken import BUGS
from mistral_ref.study.conform.check import Verdict
from mistral_ref.study.conform.departure import Departure

_COUNTED = {  # one model, several models
    "agrees": ("agrees", "agree"),
    "agrees in 16 bits": ("agrees in 16 bits", "agree in 16 bits"),
    "departs": ("departs", "depart"),
    "no dump": ("has no dump", "have no dump"),
}


_AGREEING = 1e-4  # of a step's size; 2,000 ulps are about as much


def as_text(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as lines: what is known of each model, and then what is known of each bug that is named."""
    width = max(len(verdict.model) for verdict in verdicts) + 2
    blocks = [(verdict.model, list(_lines(verdict))) for verdict in verdicts]
    about = [(bug, list(_about(bug))) for bug in _named(verdicts)]
    sections = (
        "\n".join(_indented(name, lines, width) for name, lines in blocks),
        summary(verdicts),
        *(f"{name}\n" + _indented("", lines, 2) for name, lines in about),
    )
    return "\n\n".join(sections)


def summary(verdicts: Sequence[Verdict]) -> str:
    """Return how many models have which outcome, in one line."""
    counts = {words: sum(verdict.outcome == outcome for verdict in verdicts) for outcome, words in _COUNTED.items()}
    named = ", ".join(f"{n} {words[n > 1]}" for words, n in counts.items() if n)
    return f"{len(verdicts)} model{'s' if len(verdicts) > 1 else ''}: {named}"


def as_json(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as JSON, with the sentence, the cure and the history of each bug that is named."""
    about = {
        name: {
            "sentence": BUGS[name].sentence,
            "cure": BUGS[name].cure,
            "seen_in": BUGS[name].seen_in.split(", ") if BUGS[name].seen_in else [],
        }
        for name in _named(verdicts)
    }
    return json.dumps({"models": _finite([asdict(verdict) for verdict in verdicts]), "bugs": about}, indent=2)


def as_page(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts as one HTML page, which loads nothing."""
    css = (files("mistral_ref.study") / "page" / "page.css").read_text(encoding="utf-8")

    def section(kind: str, heading: str, lines: Sequence[str]) -> str:
        body = "".join(f"<p>{html.escape(line)}</p>" for line in lines)
        return f'<section class="verdict {kind}"><h2>{html.escape(heading)}</h2>{body}</section>'

    sections = [section(verdict.outcome.split()[0], verdict.model, list(_lines(verdict))) for verdict in verdicts]
    sections += [section("bug", bug, list(_about(bug))) for bug in _named(verdicts)]
    return _PAGE.format(css=css, summary=html.escape(summary(verdicts)), sections="\n".join(sections))


def _named(verdicts: Sequence[Verdict]) -> list[str]:
    """Return the bugs that the verdicts name."""
    return list(dict.fromkeys(bug for verdict in verdicts for cause in verdict.causes for bug in cause))


def _about(bug: str) -> Iterator[str]:
    about = BUGS[bug]
    yield about.sentence
    yield f"Cure: {about.cure}"
    if about.seen_in:
        yield f"Seen in {about.seen_in}"


def _indented(name: str, lines: Sequence[str], width: int) -> str:
    """Return a name with lines beside it, all of which begin in the same column."""
    return "\n".join(f"{name if number == 0 else '':<{width}}{line}" for number, line in enumerate(lines))


def _lines(verdict: Verdict) -> Iterator[str]:
    """Yield a line for each thing that is known of a model."""
    if verdict.outcome == "no dump":
        yield "no dump"
        return
    texts = ", ".join(verdict.texts)
    distance = f"; the last step is off by {verdict.distance:.2g} of its size" if isfinite(verdict.distance) else ""
    if verdict.outcome == "agrees":
        yield f"agrees in {texts}{distance}"
    elif verdict.outcome == "agrees in 16 bits":
        yield f"agrees within the rounding of 16 bits ({verdict.precision}) in {texts}{distance}"
        yield "(too far off for an engine that computes in float32: --float32 checks one)"
    else:
        yield f"departs; checked were {texts}{distance}"
        yield from _departed_lines(verdict)


def _departed_lines(verdict: Verdict) -> Iterator[str]:
    first, later = verdict.departure, verdict.departure_in_16_bits
    if first is not None:
        yield f"first at {_place(first)}"
    if first is not None and first.step != "logits" and verdict.distance < _AGREEING:
        yield "but the last step agrees: the dump may hold another value under the name of this step"
    if later is not None and (first is None or (later.text, later.step) != (first.text, first.step)):
        yield f"beyond the rounding of bf16 first at {_place(later)}"
    if not verdict.causes:
        yield "looks like none of the known bugs, nor like two of them"
        return
    precision = "" if verdict.precision == "float32" else f", with the rounding of {verdict.precision}"
    yield f"looks like {' or like '.join(' and '.join(cause) for cause in verdict.causes)}{precision}"
    if len(verdict.causes) > 1:
        yield (
            f"(a dump of {verdict.separating} would tell them apart)"
            if verdict.separating
            else "(they are alike in every text of this model)"
        )


def _place(departure: Departure) -> str:
    where = f", {departure.where}" if departure.where else ""
    values = f": {departure.found:.6g} where {departure.expected:.6g} was expected"
    return f"{departure.text}, {departure.step}{where}{'' if departure.found != departure.found else values}"


def _finite(value: Any) -> Any:
    """Return a value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>Conformance</title>
<style>{css}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
.verdict {{ border-left: 0.3rem solid var(--line); padding-left: 1rem; margin: 1.5rem 0; }}
.agrees {{ border-color: var(--blue); }}
.departs {{ border-color: var(--accent); }}
</style>
</head>
<body>
<h1>Conformance</h1>
<p>{summary}</p>
{sections}
</body>
</html>
"""
