"""Changes of a pass as plain data: what a reader does to a step or to the model, for a page, a notebook or a file.

    changes = [Zero("layers.2.heads", head=3), Patch("embedding", "Tom went home", token=1), Window(32)]
    model, edits = apply(model, prompt, changes)
    logits = model.forward(prompt, edits=edits)

A change has a description, `str(change)`, and a dict that JSON can hold, `change.to_dict()`; `from_dict` reads it.
`python_source` writes a program that does the same without this package's help.
"""

from __future__ import annotations

from mistral_ref.study.changes.applying import Applied, ChangeError, apply
from mistral_ref.study.changes.data import KINDS, from_dict, from_dicts
from mistral_ref.study.changes.of_models import PlantedBug, Theta, Window, with_config
from mistral_ref.study.changes.of_passes import Freeze, Mean, Patch
from mistral_ref.study.changes.of_steps import Add, Change, Scale, Set, StepChange, Swap, Zero
from mistral_ref.study.changes.source import python_source

__all__ = [
    "KINDS", "Add", "Applied", "Change", "ChangeError", "Freeze", "Mean", "Patch", "PlantedBug", "Scale", "Set",
    "StepChange", "Swap", "Theta", "Window", "Zero", "apply", "from_dict", "from_dicts", "python_source", "with_config",
]  # fmt: skip
