"""Patching: which head, which token or which part of a model carries something? Change each by itself, and measure.

she, he = (model.token_ids(f"and {word}")[-1] for word in ("she", "he"))
tom, lily = (f"{name} went to the park. Then" for name in ("Tom", "Lily"))
print(patch(model, tom, lily, by="head", metric=(she, he)))
"""

from __future__ import annotations

from mistral_ref.study.patching.result import Sweep
from mistral_ref.study.patching.steering import steered, steering_vector
from mistral_ref.study.patching.sweep import ablate, patch

__all__ = ["Sweep", "ablate", "patch", "steered", "steering_vector"]
