"""Draw the documentation's figures: what plots.py shows of the demonstration model, and the course's pictures.

python docs/make_figures.py [FOLDER]        # docs/figures, by default

The roofs and dots of roofline_*.svg are measured: let the machine do nothing else meanwhile. All other files come out
the same every time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
from drawings import attention, drafts, numbers, patching, text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from story import N_STORY, STORY

import mistral_ref
from mistral_ref.measure.cost_table import cost_table
from mistral_ref.study import lens, plots

SENTENCE = "Once upon a time there was a little girl. She"


def figures(model: mistral_ref.Model) -> dict[str, Axes]:
    """Return every figure by the name of its file."""
    trace = model.trace(SENTENCE)
    story = model.token_ids(STORY)[:N_STORY]
    long_trace = model.trace(story, keep="layers.2.attention_weights")
    cache = model.new_cache()
    model.forward(story, cache)
    predictions = lens.logit_lens(model, trace)
    prompt = cost_table(model, story)
    token = cost_table(model, story[-1:], cache, limits=prompt.limits)
    return {
        "attention": plots.attention(trace, 2, 3),
        "attention_window": plots.attention(long_trace, 2, 3),
        "ring": plots.ring(window=4, n_tokens=12),
        "ring_chunks": plots.ring(window=4, chunk=2, n_tokens=12),
        "rope": rope(model.config),
        "logit_lens": plots.logit_lens(predictions),
        "logit_lens_token": plots.logit_lens(predictions, token=-1),
        "residual_norms": plots.residual_norms(trace),
        "attribution": plots.attribution(lens.attribution(model, trace)),
        "roofline_prompt": plots.roofline(prompt),
        "roofline_token": plots.roofline(token),
    }


def rope(config: mistral_ref.ModelConfig) -> Axes:
    """Return both figures of RoPE as one."""
    upper, lower = Figure((8.7, 7.2), layout="constrained").subplots(2, 1, height_ratios=(4, 3))
    plots.rope_scores(config, ax=lower)
    return plots.rope(config, ax=upper)


def main(arguments: list[str]) -> None:
    """Write every figure as an SVG file."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "mistral_ref"}):
        model = mistral_ref.load()
        drawn = figures(model)
        for chapters in (text, attention, numbers, drafts, patching):
            drawn |= chapters.figures(model)
        for name, ax in drawn.items():
            ax.figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(sys.argv[1:])
