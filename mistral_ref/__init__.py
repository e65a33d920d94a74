"""mistral_ref: the Mistral transformer, written to be read and stepped through.

import mistral_ref

model = mistral_ref.load("path/to/dir")
for token in model.generate("Once upon a time", max_tokens=64):
    print(token.text, end="", flush=True)
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from types import ModuleType
from typing import TYPE_CHECKING

from mistral_ref.cache import KVCache
from mistral_ref.config import ModelConfig
from mistral_ref.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    InputError,
    MistralRefError,
    MistralRefWarning,
    TokenizerError,
)
from mistral_ref.files.quantization import quantize
from mistral_ref.generation import Token
from mistral_ref.loading import load
from mistral_ref.model import Model
from mistral_ref.steps import Step
from mistral_ref.trace import Trace
from mistral_ref.walk import Walk

if TYPE_CHECKING:  # so that editors find these names
    from mistral_ref.measure import benchmark, cost, cost_table, machine, perplexity, shapes, speed, synthetic  # noqa: F401
    from mistral_ref.study import broken, diagrams, drawing, lens, plots, report, stepper  # noqa: F401

__version__ = version("mistral-ref")

__all__ = [
    "CacheError",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "KVCache",
    "MistralRefError",
    "MistralRefWarning",
    "Model",
    "ModelConfig",
    "Step",
    "Token",
    "TokenizerError",
    "Trace",
    "Walk",
    "load",
    "quantize",
]

_MODULES = {
    "measure": ("benchmark", "cost", "cost_table", "machine", "perplexity", "shapes", "speed", "synthetic"),
    "study": ("broken", "diagrams", "drawing", "lens", "plots", "report", "stepper"),
}


def __getattr__(name: str) -> ModuleType:
    """Return a module of measure/ or study/, imported on first use, for example `from mistral_ref import lens`."""
    for room, modules in _MODULES.items():
        if name in modules:
            return importlib.import_module(f"mistral_ref.{room}.{name}")
    raise AttributeError(f"module 'mistral_ref' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *(name for modules in _MODULES.values() for name in modules)])
