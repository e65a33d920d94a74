"""mistral_ref: the Mistral transformer, written to be read and stepped through.

import mistral_ref

model = mistral_ref.load("path/to/dir")
for token in model.generate("Once upon a time", max_tokens=64):
    print(token.text, end="", flush=True)
"""

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

__version__ = "0.1.0"

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
