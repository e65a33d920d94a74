"""How every kernel here is compiled: once for this machine, before it is first called, and kept on disk.

Numba keeps compiled functions on disk, with three gaps. It does not notice a change in another file that a function
calls. The variants that one factory makes share a file. Inner functions get the same symbol in different processes, so
code loaded from two processes mixes. Therefore names here carry all that kernels differ in: the variant, and a
fingerprint of this package's sources, the width of vectors, the caches and the processor.
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
from numba.core.registry import cpu_target

from mistral_kernels import KernelWarning
from mistral_kernels.caches import data_caches
from mistral_kernels.instructions import LANES

# No `fastmath`: NaN and infinities keep their meaning, and sums keep their order, so a kernel gives the same bits on
# any number of threads. Not even "contract": with it LLVM chooses which of two products a sum is fused with. Copies of
# one function in two kernels would then differ, and a process calls one or the other by whether it compiled or read
# them.
_OPTIONS: dict[str, Any] = {"error_model": "numpy"}


def _fingerprint() -> str:
    """Return a short hash of everything that compiled code depends on and Numba does not check itself."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    content = b"".join(file.name.encode() + file.read_bytes() for file in files)
    machine = repr((LANES, data_caches(), cpu_target.target_context.codegen().magic_tuple())).encode()
    return hashlib.sha256(content + machine).hexdigest()[:12]


_FINGERPRINT = _fingerprint()


def _named(function: Callable[..., Any], variant: tuple[object, ...]) -> Callable[..., Any]:
    """Put variant and fingerprint into the name that a function's symbol and its file on disk are made of."""
    function.__qualname__ = "_".join([function.__name__, *map(str, variant), _FINGERPRINT])
    return function


def made_once(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory of kernels that makes each kernel once, also when two threads ask at the same time."""
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
def _warn_once(message: str) -> None:
    warnings.warn(message, KernelWarning, stacklevel=2)


class _KernelCache(FunctionCache):
    """Numba's cache of compiled functions. Where it fails, kernels are compiled."""

    def _index_key(self, signature: object, codegen: Any) -> object:
        # Numba's key has a hash of what a function's closure holds, which differs from one process to the next.
        return signature, codegen.magic_tuple(), _FINGERPRINT

    def load_overload(self, signature: object, target_context: object) -> object:
        try:
            found = super().load_overload(signature, target_context)
        except Exception:
            found = None
            self._try(self.flush)  # an index that cannot be read cannot be added to either
        if found is None:
            _warn_once("compiling kernels not used on this machine before: up to a minute, and once")
        return found

    def save_overload(self, signature: object, data: object) -> None:
        self._try(lambda: super(_KernelCache, self).save_overload(signature, data))

    @staticmethod
    def _try(write: Callable[[], object]) -> None:
        try:
            write()
        except OSError as error:
            _warn_once(f"compiled kernels cannot be kept for the next start: {error}")


def part(*variant: object, borrows: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator for a part: a function that is compiled into each kernel that calls it.

    variant     what the part depends on beside its own text: all arguments of the factory around it
    borrows     the part makes no arrays, returns none, and calls nothing that does. It then counts no references to its
                caller's arrays; counting takes longer than the arithmetic of a few dozen numbers
    """
    options = _OPTIONS | {"_nrt": False} if borrows else _OPTIONS

    def compiled(function: Callable[..., Any]) -> Any:
        return numba.njit(nogil=True, **options)(_named(function, variant))

    return compiled


def kernel(signature: object, *variant: object, parallel: bool = True) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator that compiles a function for one signature, now, or takes it from the cache.

    `variant` is as in `part`. With an explicit signature a call with other types is an error instead of a second
    compilation.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(parallel=parallel, nogil=True, **_OPTIONS)(_named(function, variant))
        try:
            dispatcher._cache = _KernelCache(function)
        except RuntimeError as error:  # no folder to write in
            _warn_once(f"compiled kernels cannot be kept for the next start: {error}")
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return compiled
