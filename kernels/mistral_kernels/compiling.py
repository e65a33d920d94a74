"""How every kernel here is compiled: once for this machine, before it is first called, and kept on disk.

Numba's own cache notices that the file of a function has changed, but not what that function calls in other files.
Ours is keyed by a hash of all sources of this package, and by the width of vectors.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import FunctionCache

from mistral_kernels import KernelWarning
from mistral_kernels.instructions import LANES

# No `fastmath=True`: NaN and infinities keep their meaning, and sums keep their order, so that a kernel gives the same
# bits on any number of threads. A multiplication and the addition that follows it may become one instruction.
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}

# Part of a kernel that is compiled into each kernel that calls it.
part = numba.njit(nogil=True, **_OPTIONS)


def made_once(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory of kernels that makes each only once, also when two threads ask for it at the same time."""
    made: dict[tuple[object, ...], Any] = {}
    making = threading.Lock()

    @functools.wraps(factory)
    def make(*arguments: object) -> Any:
        try:
            return made[arguments]
        except KeyError:
            with making:
                if arguments not in made:
                    made[arguments] = factory(*arguments)
                return made[arguments]

    return make


@functools.cache
def _sources() -> str:
    """Return a hash of all sources of this package."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()


class _KernelCache(FunctionCache):
    """Numba's cache of compiled functions, with our key, and in no way needed: where it fails, kernels are compiled."""

    def __init__(self, function: Callable[..., Any], variant: object) -> None:
        super().__init__(function)
        self._variant = variant

    def _index_key(self, signature: object, codegen: Any) -> object:
        return (signature, codegen.magic_tuple(), LANES, self._variant, _sources())

    def load_overload(self, signature: object, target_context: object) -> object:
        try:
            found = super().load_overload(signature, target_context)
        except Exception:
            found = None
        if found is None:
            _announce()
        return found

    def save_overload(self, signature: object, data: object) -> None:
        try:
            super().save_overload(signature, data)
        except OSError as error:
            _warn_not_kept(error)


@functools.cache
def _announce() -> None:
    warnings.warn("compiling kernels for this machine: once, up to half a minute", KernelWarning, stacklevel=2)


def _warn_not_kept(error: Exception) -> None:
    warnings.warn(f"compiled kernels cannot be kept for the next start: {error}", KernelWarning, stacklevel=2)


def kernel(signature: object, variant: object = None, *, parallel: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator that compiles a function for one signature, now, or takes it from the cache.

    With an explicit signature a call with other types is an error instead of a second compilation. `variant` tells the
    kernels apart that one factory makes.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(parallel=parallel, nogil=True, **_OPTIONS)(function)
        try:
            dispatcher._cache = _KernelCache(function, variant)
        except RuntimeError as error:  # no folder to write in
            _warn_not_kept(error)
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return compiled
