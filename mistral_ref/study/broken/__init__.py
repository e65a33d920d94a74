"""Broken models: each is wrong on purpose. Real engines have shipped bugs of these kinds.

Walk through a broken model and the right one side by side. The bug is at the first step whose value differs:

    wrong = broken(model, "tiled-heads")
    for right_step, wrong_step in zip(model.steps(tokens), wrong.steps(tokens)):
        ...

A bug is made by the smallest change that is possible: another configuration, other weights, one overridden operation,
or another cache. No right model uses this room.
"""

from __future__ import annotations

from mistral_ref.study.broken.bugs import BUGS, Bug, possible_bugs
from mistral_ref.study.broken.model import BrokenModel, broken

__all__ = ["BUGS", "BrokenModel", "Bug", "broken", "possible_bugs"]
