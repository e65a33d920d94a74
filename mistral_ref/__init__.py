"""mistral_ref: the Mistral transformer, written to be read and stepped through.

import mistral_ref

model = mistral_ref.load("path/to/dir")
for token in model.generate("Once upon a time", max_tokens=64):
    print(token.text, end="", flush=True)
"""

from __future__ import annotations

TYPE_CHECKING = False  # what is imported here is imported when it is first asked for: see __getattr__
if TYPE_CHECKING:
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
    from mistral_ref.files.quantized_copy import quantize
    from mistral_ref.generation import Token
    from mistral_ref.loading import load
    from mistral_ref.measure import (  # noqa: F401
        benchmark,
        busy,
        cost,
        cost_table,
        doctor,
        machine,
        perplexity,
        records,
        shapes,
        speed,
        synthetic,
    )
    from mistral_ref.model import Model
    from mistral_ref.steps import Step
    from mistral_ref.study import (  # noqa: F401
        broken,
        changes,
        conform,
        diagrams,
        drawing,
        edited,
        lens,
        live,
        page_data,
        patching,
        plots,
        report,
        stepper,
    )
    from mistral_ref.trace import Trace
    from mistral_ref.walk import Walk

    __version__: str

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

_HOMES = {
    "cache": ("KVCache",),
    "config": ("ModelConfig",),
    "errors": (*(name for name in __all__ if name.endswith("Error")), "MistralRefWarning"),
    "files.quantized_copy": ("quantize",),
    "generation": ("Token",),
    "loading": ("load",),
    "model": ("Model",),
    "steps": ("Step",),
    "trace": ("Trace",),
    "walk": ("Walk",),
}
_ROOMS = {
    "measure": (
        *("benchmark", "busy", "cost", "cost_table", "doctor", "machine", "perplexity", "records", "shapes"),
        *("speed", "synthetic"),
    ),
    "study": (
        "broken",
        "changes",
        "conform",
        "diagrams",
        "drawing",
        "edited",
        "lens",
        "live",
        "page_data",
        "patching",
        "plots",
        "report",
        "stepper",
    ),
}

if not TYPE_CHECKING:  # a type checker would believe that every name exists

    def __getattr__(name):
        """Import what is asked for: a name of __all__, a module of the ground floor, or one of measure/ or study/.

        So `import mistral_ref` imports nothing else: the command line says first what Ctrl-C does, and then imports
        NumPy.
        """
        from importlib import import_module  # noqa: PLC0415

        for module, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"mistral_ref.{module}"), name)
        if name == "__version__":
            return import_module("importlib.metadata").version("mistral-ref")
        room = next((f"{room}." for room, modules in _ROOMS.items() if name in modules), "")
        module = f"mistral_ref.{room}{name}"
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module 'mistral_ref' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    from importlib.util import find_spec  # noqa: PLC0415

    missing = set() if find_spec("matplotlib") else {"diagrams", "drawing", "plots"}  # help() imports all that is here
    own = {name for name in globals() if name.startswith("__")}
    return sorted({*own, *__all__, *(name for modules in _ROOMS.values() for name in modules)} - missing)
