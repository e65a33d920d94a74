"""How every kernel here is compiled: once for this machine, before it is first called, and kept on disk (kept.py).

Numba gives inner functions the same symbol in different processes, so code that two processes have compiled would be
mixed up when a third one loads it. Therefore the name of each function here says all that kernels differ in: the
variant, and a fingerprint, that is, a hash of this package's sources, the versions of Numba and Python, the width of
vectors, the caches and the processor. The name of the file on disk is made of it.
"""

from __future__ import annotations

import functools
import hashlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.caching import NullCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import cpu_target

from mistral_kernels import KernelWarning, kept
from mistral_kernels.caches import data_caches
from mistral_kernels.forks import open_in_children
from mistral_kernels.processor import LANES

# No `fastmath`: NaN and infinities keep their meaning, and sums keep their order, so a kernel gives the same bits on
# any number of threads. Its part "contract" is off too: with it LLVM chooses which of two products a sum is fused with.
# Copies of one function in two kernels might then differ. Which copy a process calls depends on whether it compiled the
# kernels or read them from the disk, so results would depend on that too.
_OPTIONS: dict[str, Any] = {"error_model": "numpy"}

# The number 0 as an argument of a part. Numba would compile the part a second time for a 0 that is written out.
FIRST = np.int64(0)


def _fingerprint() -> str:
    """Return a short hash of everything that compiled code depends on and Numba does not check itself."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    content = b"".join(file.name.encode() + file.read_bytes() for file in files)
    versions = sys.implementation.cache_tag, numba.__version__, llvmlite.__version__
    machine = repr((versions, LANES, data_caches(), cpu_target.target_context.codegen().magic_tuple())).encode()
    return hashlib.sha256(content + machine).hexdigest()[:12]


_FINGERPRINT = _fingerprint()


def _named(function: Callable[..., Any], variant: tuple[object, ...]) -> Callable[..., Any]:
    """Put variant and fingerprint into a function's name. Numba makes its symbol and its file from this name."""
    function.__qualname__ = "_".join([function.__name__, *map(str, variant), _FINGERPRINT])
    return function


_MAKING = open_in_children(threading.RLock())  # Numba compiles one function at a time, so one lock is enough
_warned: set[str] = set()


def made_once(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory of kernels that makes each kernel once, also when two threads ask at the same time."""
    made: dict[tuple[object, ...], Any] = {}

    @functools.wraps(factory)
    def make(*arguments: object) -> Any:
        try:
            return made[arguments]
        except KeyError:
            with _MAKING:
                if arguments not in made:
                    made[arguments] = factory(*arguments)
                return made[arguments]

    return make


class _NotKeptError(Exception):
    """A kernel is not on the disk, and was not to be compiled. Its argument is the kernel's name."""


_ONE_BY_ONE, _ONLY_KEPT, _ANNOUNCED = range(3)
_mode: ContextVar[int] = ContextVar("what to do about a kernel that is not on the disk", default=_ONE_BY_ONE)


def _call_in(mode: int, kernel: Callable[[], object]) -> None:
    token = _mode.set(mode)
    try:
        kernel()
    finally:
        _mode.reset(token)


def make(kernels: Iterable[Callable[[], object]], on_compile: Callable[[int, int, str], object]) -> int:
    """Make kernels: first read all that are on the disk, then compile the others. Return how many were compiled.

    kernels     factories of kernels with their arguments
    on_compile  called as on_compile(done, total, name) before each kernel of this name is compiled, and at the end
                without a name; `total` is the number of kernels that are compiled
    """
    missing = {}
    for kernel in kernels:
        try:
            _call_in(_ONLY_KEPT, kernel)
        except _NotKeptError as error:
            missing[str(error)] = kernel
    for done, (name, kernel) in enumerate(missing.items()):
        on_compile(done, len(missing), name)
        _call_in(_ANNOUNCED, kernel)
    if missing:
        on_compile(len(missing), len(missing), "")
    return len(missing)


def _warn_once(message: str, detail: str = "") -> None:
    """Warn, unless there was a warning with this message before, of whatever detail."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message + detail, KernelWarning, stacklevel=2)


class _PartLibrary(JITCodeLibrary):
    """The code of a part, which is optimised and made machine code of where it is used: in kernels.

    Numba would do both for each part, with the parts that it calls in it, and then again for the kernel.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._verify_declare_only_symbols()
        self._finalized = True


class _PartCompiler(Compiler):
    """Numba's compiler, but that it makes nothing of a part that could be called from Python."""

    def __init__(
        self, typing: Any, target: Any, library: Any, arguments: Any, returned: Any, flags: Any, variables: Any
    ) -> None:
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        library = _PartLibrary(target.codegen(), "part")
        super().__init__(typing, target, library, arguments, returned, flags, variables)

    def compile_extra(self, function: Callable[..., Any]) -> Any:
        """Compile a part. Numba finds it by its entry point for Python, so that is some function, another for each."""
        entry_point: Any = [].append
        compiled = super().compile_extra(function)._replace(entry_point=entry_point)
        self.state.targetctx.insert_user_function(entry_point, compiled.fndesc, [compiled.library])
        return compiled


class _KernelCache(NullCache):
    """What Numba asks for a compiled kernel before it compiles, and gives one afterwards."""

    def __init__(self, name: str, file: str) -> None:
        self._name, self._file = name, file

    def load_overload(self, signature: object, target_context: object) -> object:
        found = kept.load(self._file, target_context)
        if found is None:
            if _mode.get() == _ONLY_KEPT:
                raise _NotKeptError(self._name)
            if _mode.get() == _ONE_BY_ONE:
                _warn_once(f"compiling the kernel {self._name}, once on this machine: some seconds")
        return found

    def save_overload(self, signature: object, compiled: Any) -> None:
        try:
            kept.save(self._file, compiled)
        except OSError as error:
            _warn_once("compiled kernels cannot be kept for the next start", f": {error}")


def part(*variant: object, borrows: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator for a part: a function that is compiled into each kernel that calls it.

    variant     all arguments of the factory around the part: what the part depends on besides its own source
    borrows     True for a part that makes no arrays, returns none, and calls nothing that does. Such a part counts no
                references to its caller's arrays. Counting would take longer than computing with a few dozen numbers
    """
    options = _OPTIONS | {"_nrt": False} if borrows else _OPTIONS

    def compiled(function: Callable[..., Any]) -> Any:
        return numba.njit(nogil=True, pipeline_class=_PartCompiler, **options)(_named(function, variant))

    return compiled


def kernel(signature: object, *variant: object) -> Callable[[Callable[..., Any]], Any]:
    """Return the decorator that at once compiles a function for one signature, or reads it from the cache.

    `variant` is as in `part`. With an explicit signature a call with other types is an error instead of a second
    compilation.
    """

    def compiled(function: Callable[..., Any]) -> Any:
        dispatcher = numba.njit(nogil=True, **_OPTIONS)(_named(function, variant))
        name = "_".join([function.__name__, *map(str, variant)])
        dispatcher._cache = _KernelCache(name, f"{function.__module__}.{function.__qualname__}.kernel")
        dispatcher.compile(signature)
        dispatcher.disable_compile()
        return dispatcher

    return compiled
