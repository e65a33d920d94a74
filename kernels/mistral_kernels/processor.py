"""The processor that kernels are compiled for: its instruction sets, and the width of its vectors.

    LANES       float32 numbers of a vector: 16 with AVX-512, 8 with AVX2, else 4; MISTRAL_KERNELS_LANES=4, 8 or 16
                overrides

Only this file, pairs.py and the sizes of a tile depend on the processor.
"""

from __future__ import annotations

import os
import platform

import llvmlite.binding as llvm
from numba.core import config

LINE = 64  # bytes of a cache line


def target_features() -> frozenset[str]:
    """Return the names of the instruction sets that Numba compiles for: {"avx2", "fma", ...}."""
    if config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def target_cpu() -> str:
    """Return LLVM's name of the processor that Numba compiles for: "znver4", "sapphirerapids", ..."""
    return config.CPU_NAME or llvm.get_host_cpu_name()


def _lanes(features: frozenset[str]) -> int:
    asked = os.environ.get("MISTRAL_KERNELS_LANES")
    if asked:
        if asked not in ("4", "8", "16"):
            raise ValueError(f"MISTRAL_KERNELS_LANES is {asked!r}; expected 4, 8 or 16")
        return int(asked)
    return 16 if "avx512f" in features and "avx512bw" in features else 8 if "avx2" in features else 4


IS_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86")
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
FEATURES = target_features()
LANES = _lanes(FEATURES)
TAKES_HALVES = LANES == 16 and target_cpu() == "znver4"  # of a vector, one after the other
# Without an instruction for it, LLVM would call a function that is not there when Numba links.
HAS_F16 = "f16c" in FEATURES or IS_ARM
