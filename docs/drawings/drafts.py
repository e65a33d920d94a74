"""The picture of chapter 13 of the course: passes that read a draft, and what they accept of it."""

from __future__ import annotations

from matplotlib.figure import Figure

import mistral_ref
from mistral_ref.drafts import Lookup
from mistral_ref.study.drawing import BLUE, GREY, PALE_BLUE, UNSEEN, Axes, Patch, Rectangle, literal, styled, title

PROMPT = "Once upon a time there was a little girl named Lily. Once upon a time"
N_DRAFTED, N_PASSES = 4, 6


def figures(model: mistral_ref.Model) -> dict[str, Axes]:
    """Return the picture by the name of its file."""
    return {"course_13_drafts": drafts(model)}


@styled
def drafts(model: mistral_ref.Model) -> Axes:
    """Draw the passes after a prompt, a row each: the newest token, and the draft that is read with it."""
    prompt = model.token_ids(PROMPT)
    text = prompt + [token.id for token in model.generate(prompt, max_tokens=24)]
    lookup, length = Lookup(), len(prompt) + 1
    ax = Figure((9.4, 3.1), layout="constrained").add_subplot()
    for row in range(N_PASSES):
        guesses = [guess.token for guess in lookup.guesses(text[:length], N_DRAFTED)]
        right = [guess == token for guess, token in zip(guesses, text[length:], strict=False)]
        n_accepted = (*right, False).index(False)
        looks = [{"facecolor": BLUE}, *[{"facecolor": PALE_BLUE}] * n_accepted, *[UNSEEN] * (len(guesses) - n_accepted)]
        for place, (token, look) in enumerate(zip([text[length - 1], *guesses], looks, strict=True)):
            x = length - len(prompt) - 1 + place
            ax.add_patch(Rectangle((x + 0.04, row + 0.12), 0.92, 0.76, **look))
            color = "white" if place == 0 else GREY if place > n_accepted else "black"
            ax.text(x + 0.5, row + 0.5, literal(model.piece(token)), ha="center", va="center", fontsize=8, color=color)
        said = " ".join(literal(model.piece(token)) for token in text[length : length + n_accepted + 1])
        ax.text(12.4, row + 0.5, f"gives  {said}", va="center", fontsize=9)
        ax.text(-0.2, row + 0.5, f"pass {row + 1}", ha="right", va="center", fontsize=9)
        length += n_accepted + 1
    kinds = {"the newest token": {"facecolor": BLUE}, "drafted, accepted": {"facecolor": PALE_BLUE}, "refused": UNSEEN}
    ax.set(xlim=(-1.1, 17.4), ylim=(N_PASSES + 0.1, -0.1))
    ax.set_axis_off()
    handles = [Patch(label=name, **look) for name, look in kinds.items()]
    title(ax, f"“{PROMPT}”: what each pass after it reads", handles)
    return ax
