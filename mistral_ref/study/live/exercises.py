"""The course's exercises with the demonstration model, as plain data: each asks for changes that reach something.

checking.py says whether a reader's changes do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from mistral_ref.study.changes import Change, Patch, PlantedBug, Scale, StepChange, Theta, Window, Zero

TOM, LILY = (f"{name} went to the park. Then" for name in ("Tom", "Lily"))
ONCE = "Once upon a"


@dataclass(frozen=True)
class Asked:
    """The changes that an exercise asks for, and no others.

    kind    what each of them is
    n       how many they are
    steps   names of steps, or globs: each changes a step that matches one of them
    given   fields that are given, such as "head"
    whole   fields that are not given: all heads, all tokens
    most    the largest window
    """

    kind: type[Change]
    n: int = 1
    steps: tuple[str, ...] = ()
    given: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    most: int | None = None

    def fits(self, changes: Sequence[Change]) -> bool:
        """Return whether these are such changes."""
        return len(changes) == self.n and all(map(self._fits, changes))

    def begun(self, changes: Sequence[Change]) -> bool:
        """Return whether these are some of such changes, and others are missing."""
        return len(changes) < self.n and all(map(self._fits, changes))

    def _fits(self, change: Change) -> bool:
        if not isinstance(change, self.kind):
            return False
        if isinstance(change, StepChange) and not any(fnmatchcase(change.step, step) for step in self.steps):
            return False
        if isinstance(change, Window) and self.most is not None and (change.window or self.most + 1) > self.most:
            return False
        is_given = all(getattr(change, name) is not None for name in self.given)
        return is_given and all(getattr(change, name) is None for name in self.whole)


@dataclass(frozen=True)
class Goal:
    """What the changes have to reach. What is not given does not matter.

    token           the token, a piece, whose probability after the text counts
    above, below    its bounds: a probability, or a token, whose probability after the text is the bound
    departs         the first step that the changes move by more than rounding
    """

    token: str = ""
    above: float | str | None = None
    below: float | str | None = None
    departs: str | None = None


@dataclass(frozen=True)
class Exercise:
    """One exercise of the course.

    chapter     the chapter that it belongs to
    task, hint  what is asked for, and what helps
    asked       the changes that it asks for
    goal        what they have to reach
    done        what is said when they have reached it
    solution    changes that reach it; nobody is shown them
    text        the text that it is about
    watched     the tokens whose probabilities are said while it is not done
    """

    chapter: int
    task: str
    hint: str
    asked: Asked
    goal: Goal
    done: str
    solution: tuple[Change, ...]
    text: str = TOM
    watched: tuple[str, ...] = ("▁he", "▁she")


_A_HEAD = ("layers.[0-9].heads",)
_RESIDUAL_STREAM = ("layers.[0-9].residual_after_attention", "layers.[0-9].residual_after_ffn")

EXERCISES = {
    "one-head": Exercise(
        5,
        task="One head in layer 4 carries “Tom” to the last token, and so to “he”. Switch it off: set its output to 0,"
        " so that “he” falls below 60 %.",
        hint="In the view Attention, choose the last token, and look for the head that looks at “Tom” the most.",
        asked=Asked(Zero, steps=("layers.4.heads",), given=("head",)),
        goal=Goal("▁he", below=0.6),
        done="This head looks at “Tom” by 0.95. Without it “she” is seventeen times as likely as before.",
        solution=(Zero("layers.4.heads", head=3),),
    ),
    "two-heads": Exercise(
        5,
        task="Switch off two heads, so that “she” becomes likelier than “he”.",
        hint="Layer 3 has a head that looks at “Tom”, too.",
        asked=Asked(Zero, 2, steps=_A_HEAD, given=("head",)),
        goal=Goal("▁she", above="▁he"),
        done="With both heads off, the last token no longer learns who went to the park.",
        solution=(Zero("layers.4.heads", head=3), Zero("layers.3.heads", head=3)),
    ),
    "window": Exercise(
        6,
        task="Move the window. What is the narrowest window with which “he” keeps more than 70 %?",
        hint="“Tom” is token 1, and the last token is 7. A token sees itself and those before it: a window of 2 is "
        "itself and one more.",
        asked=Asked(Window, most=7),
        goal=Goal("▁he", above=0.7),
        done="With 7 keys the last token still sees “Tom” itself. What it could learn by way of the tokens between is "
        "not enough.",
        solution=(Window(7),),
    ),
    "bug": Exercise(
        12,
        task="Plant a bug whose first wrong step is “k” of layer 0.",
        hint="Look at the difference in the view Block: the steps that differ are marked. Which bug turns the keys, "
        "and not the queries?",
        asked=Asked(PlantedBug),
        goal=Goal(departs="layers.0.k"),
        done="The rows of wk were reordered as if it had as many heads as wq. Queries and values are right, and "
        "everything after the scores is wrong.",
        solution=(PlantedBug("keys-permuted-as-queries"),),
    ),
    "one-vector": Exercise(
        14,
        task=f"Take one token's vector after a layer, a residual stream, from the pass of “{LILY}”, so that “she” has "
        "more than half.",
        hint="After the first layers the fact stands where the name stands, and nowhere else. After the last one it "
        "stands at the last token.",
        asked=Asked(Patch, steps=_RESIDUAL_STREAM, given=("token",)),
        goal=Goal("▁she", above=0.5),
        done="One vector of eight turns the answer around.",
        solution=(Patch("layers.2.residual_after_ffn", LILY, token=1),),
    ),
    "louder": Exercise(
        14,
        task="Make the model surer: multiply the output of one head by a number, so that “he” has more than 92 %.",
        hint="You have switched a head off. What happens if it speaks twice as loudly?",
        asked=Asked(Scale, steps=_A_HEAD, given=("head",)),
        goal=Goal("▁he", above=0.92),
        done="What a head adds to the residual stream can be turned up as well as off.",
        solution=(Scale("layers.4.heads", 2, head=3),),
    ),
    "norm": Exercise(
        3,
        task="Multiply one whole step at the end of the pass, the residual stream after layer 4 or “norm”, so that "
        "“he” has more than 98 %.",
        hint="A norm takes the size of its input away. Which of the two has a norm behind it?",
        asked=Asked(Scale, steps=("norm", "layers.4.residual_after_ffn"), whole=("token", "neuron")),
        goal=Goal("▁he", above=0.98),
        done="Behind the last norm a multiplier is 1 / temperature. In front of it, it does nothing: the norm takes it"
        " away again.",
        solution=(Scale("norm", 2),),
    ),
    "theta": Exercise(
        4,
        task="Change theta, and nothing else, so that “he” falls below 25 %.",
        hint="The model was trained with theta 10,000. A smaller one turns the slow pairs faster. Watch “he” while you"
        " go down, to 10 and below.",
        asked=Asked(Theta),
        goal=Goal("▁he", below=0.25),
        done="The slow pairs turn fast now, and the weights were trained with others: where a token stands is no "
        "longer understood.",
        solution=(Theta(10),),
    ),
    "token-before": Exercise(
        5,
        task="One head of forty tells the last token which one stands before it. Switch it off, so that “time” falls "
        "below 20 %.",
        hint="It is in layer 0. In the view Attention, choose the last token, and look for the head that looks at "
        "“upon” by 0.91. Or let a sweep find it.",
        asked=Asked(Zero, steps=_A_HEAD, given=("head",)),
        goal=Goal("▁time", below=0.2),
        done="This head looks at the token before. Without any other one of the forty, “time” stays the likeliest.",
        solution=(Zero("layers.0.heads", head=7),),
        text=ONCE,
        watched=("▁time",),
    ),
    "neuron": Exercise(
        8,
        task="Set a single neuron of 512 in a feed-forward, in the step ffn_hidden of a layer, to 0, so that “time” "
        "falls below 10 %.",
        hint="In layer 0, look at ffn_hidden of the last token. One number is nearly six times as large as the next.",
        asked=Asked(Zero, steps=("layers.[0-9].ffn_hidden",), given=("neuron",)),
        goal=Goal("▁time", below=0.1),
        done="Neuron 23 of layer 0 is large at this “a”. Without it the model says “a” once more, by 92 %.",
        solution=(Zero("layers.0.ffn_hidden", neuron=23),),
        text=ONCE,
        watched=("▁time", "▁a"),
    ),
}
