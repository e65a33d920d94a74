"""The processor that kernels are compiled for: its instruction sets, and the width of its vectors.

    LANES       float32 numbers of a vector: 16 with AVX-512, 8 with AVX2, else 4; MISTRAL_KERNELS_LANES=4, 8 or 16
                overrides

Only this file, pairs.py, neon.py and the sizes of a tile depend on the processor.
"""

from __future__ import annotations

import os
import platform

import llvmlite.binding as llvm
from numba.core import config

LINE = 64  # bytes of a cache line
IS_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86")
IS_ARM = platform.machine().lower() in ("aarch64", "arm64")

# Sums of products of bytes: unsigned ones, and unsigned with signed ones.
_SUMS_OF_BYTES = """
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
define {i32, i32} @sums(<16 x i8> %a, <16 x i8> %b) {
    %a_wide = zext <16 x i8> %a to <16 x i32>
    %b_wide = zext <16 x i8> %b to <16 x i32>
    %b_signed = sext <16 x i8> %b to <16 x i32>
    %products = mul <16 x i32> %a_wide, %b_wide
    %mixed = mul <16 x i32> %a_wide, %b_signed
    %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
    %sum_of_mixed = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %mixed)
    %one = insertvalue {i32, i32} undef, i32 %sum, 0
    %both = insertvalue {i32, i32} %one, i32 %sum_of_mixed, 1
    ret {i32, i32} %both
}
"""


def target_cpu() -> str:
    """Return LLVM's name of the processor that Numba compiles for: "znver4", "sapphirerapids", ..."""
    return config.CPU_NAME or llvm.get_host_cpu_name()


def target_features() -> frozenset[str]:
    """Return the names of the instruction sets that Numba compiles for: {"avx2", "fma", ...}."""
    features = config.CPU_FEATURES
    if features is None:
        features = llvm.get_host_cpu_features().flatten()
    names = {name[1:] for name in features.split(",") if name.startswith("+")}
    if IS_ARM:  # LLVM knows some by the processor's name, and does not list them
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        target = llvm.Target.from_default_triple()
        names |= sums_of_bytes(target.create_target_machine(cpu=target_cpu(), features=features))
    return frozenset(names)


def sums_of_bytes(machine: llvm.TargetMachine) -> set[str]:
    """Return which of "dotprod" and "i8mm" an ARM processor has: LLVM uses them where it may."""
    instructions = machine.emit_assembly(llvm.parse_assembly(_SUMS_OF_BYTES))
    return {name for name, word in (("dotprod", "udot"), ("i8mm", "usdot")) if word in instructions}


def _lanes(features: frozenset[str]) -> int:
    asked = os.environ.get("MISTRAL_KERNELS_LANES")
    if asked:
        if asked not in ("4", "8", "16"):
            raise ValueError(f"MISTRAL_KERNELS_LANES is {asked!r}; expected 4, 8 or 16")
        return int(asked)
    return 16 if "avx512f" in features and "avx512bw" in features else 8 if "avx2" in features else 4


FEATURES = target_features()
LANES = _lanes(FEATURES)
TAKES_HALVES = LANES == 16 and target_cpu() == "znver4"  # of a vector, one after the other
# Without an instruction for it, LLVM would call a function that is not there when Numba links.
HAS_F16 = "f16c" in FEATURES or IS_ARM
