"""Small groups of LLVM's instructions: the intrinsics of simd.py, rows.py and tile.py are built of them.

Each function writes a few instructions and returns their value. They are generic: LLVM translates them for the machine.
Only this file and pairs.py ask which processor this is.

    LANES       floats of a vector: 16 with AVX-512, 8 with AVX2, else 4; MISTRAL_KERNELS_LANES=4, 8 or 16 overrides
    KINDS       how numbers may be stored, and their bytes: f32, f16, bf16 (the upper half of a float32), fp8 (e4m3),
                int8 (the caller knows its scale), pairs (two neighbours of bf16, multiplied and added at once; in
                registers a pair takes the place of a float32)
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, config

LINE = 64  # bytes of a cache line

KINDS = {"f32": 4, "f16": 2, "bf16": 2, "fp8": 1, "int8": 1, "pairs": 4}

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
STORED = {"f32": F32, "f16": I16, "bf16": I16, "fp8": I8, "int8": I8, "pairs": F32}


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


IS_ARM = platform.machine().lower() in ("aarch64", "arm64")
FEATURES = target_features()
LANES = _lanes(FEATURES)
TAKES_HALVES = LANES == 16 and target_cpu() == "znver4"  # of a vector, one after the other
# Without an instruction for it, LLVM would call a function that is not there when Numba links.
_HAS_F16 = "f16c" in FEATURES or IS_ARM


VECTOR = ir.VectorType(F32, LANES)


def constant(vector_type: ir.VectorType, value: float) -> ir.Constant:
    """Return a vector with `value` in every lane."""
    return ir.Constant(vector_type, [value] * vector_type.count)


def load_vector(builder: Any, address: Any, element: ir.Type, n: int) -> Any:
    """Return n elements from an address of any alignment."""
    return builder.load(builder.bitcast(address, ir.VectorType(element, n).as_pointer()), align=1)


def load_first(builder: Any, address: Any, element: ir.Type, n: int, count: Any) -> Any:
    """Return n elements: the first `count` are read, the others are 0."""
    vector_type, mask_type = ir.VectorType(element, n), ir.VectorType(ir.IntType(1), n)
    lanes = ir.Constant(ir.VectorType(I64, n), list(range(n)))
    mask = builder.icmp_signed("<", lanes, splat_of(builder, count, n))
    name = f"llvm.masked.load.v{n}{_suffix(element)}.p0"
    function_type = ir.FunctionType(vector_type, [vector_type.as_pointer(), I32, mask_type, vector_type])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    address = builder.bitcast(address, vector_type.as_pointer())
    return builder.call(function, [address, ir.Constant(I32, 1), mask, ir.Constant(vector_type, None)])


def _suffix(element: ir.Type) -> str:
    return f"i{element.width}" if isinstance(element, ir.IntType) else {F16: "f16", F32: "f32"}[element]


def store_vector(builder: Any, address: Any, value: Any) -> None:
    """Put a vector to an address of any alignment."""
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=1)


def prefetch_line(builder: Any, address: Any, ahead: int, level: int = 2) -> None:
    """Ask for the cache line `ahead` bytes after an address, which need not exist, for the cache of a level."""
    byte_pointer = I8.as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    place = builder.gep(builder.bitcast(address, byte_pointer), [ir.Constant(I64, ahead)])
    read, locality, data = (ir.Constant(I32, value) for value in (0, 4 - level, 1))
    builder.call(function, [place, read, locality, data])


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c, rounded once where that is fast."""
    function_type = ir.FunctionType(a.type, [a.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.fmuladd.v{a.type.count}f32")
    return builder.call(function, [a, b, c])


def fenced(builder: Any, value: Any) -> Any:
    """Return a value that stays rounded: it does not become one instruction with what is added to it."""
    function_type = ir.FunctionType(value.type, [value.type])
    name = f"llvm.arithmetic.fence.v{value.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [value])


def splat_of(builder: Any, scalar: Any, n: int) -> Any:
    """Return a vector of n times the same number."""
    undefined = ir.Constant(ir.VectorType(scalar.type, n), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, n), [0] * n))


def widened(builder: Any, stored: Any, kind: str) -> Any:
    """Return stored numbers of a kind as float32."""
    if kind in ("f32", "pairs"):
        return stored
    n = stored.type.count
    wide, floats = ir.VectorType(I32, n), ir.VectorType(F32, n)
    if kind == "int8":
        return builder.sitofp(builder.sext(stored, wide), floats)
    if kind == "f16" and _HAS_F16:
        return builder.fpext(builder.bitcast(stored, ir.VectorType(F16, n)), floats)
    if kind == "fp8" and _HAS_F16:
        # As f16, whose exponent has one bit more: sign to the left end, the rest one to the right of it. The exponents'
        # bias makes it 2^8 too small.
        half = ir.VectorType(I16, n)
        shifted = builder.ashr(builder.shl(builder.zext(stored, half), constant(half, 8)), constant(half, 1))
        bits = builder.and_(shifted, constant(half, 0xBFFF))
        is_nan = builder.icmp_unsigned(
            "==", builder.and_(stored, constant(stored.type, 0x7F)), constant(stored.type, 0x7F)
        )
        bits = builder.select(is_nan, constant(half, 0x7E00), bits)
        return builder.fmul(
            builder.fpext(builder.bitcast(bits, ir.VectorType(F16, n)), floats), constant(floats, 256.0)
        )
    bits = builder.zext(stored, wide)
    if kind == "bf16":
        return builder.bitcast(builder.shl(bits, constant(wide, 16)), floats)
    # sign, exponent and mantissa move to where float32 has them; the exponents' bias differs by a power of two
    sign_bit, mantissa_bits, bias, special = {"f16": (15, 10, 15, 31), "fp8": (7, 3, 7, None)}[kind]
    sign = builder.shl(builder.lshr(bits, constant(wide, sign_bit)), constant(wide, 31))
    magnitude = builder.and_(bits, constant(wide, (1 << sign_bit) - 1))
    moved = builder.shl(magnitude, constant(wide, 23 - mantissa_bits))
    normal = builder.add(moved, constant(wide, (127 - bias) << 23))
    tiny = builder.fmul(builder.uitofp(magnitude, floats), constant(floats, 2.0 ** (1 - bias - mantissa_bits)))
    is_tiny = builder.icmp_unsigned("<", magnitude, constant(wide, 1 << mantissa_bits))
    value = builder.select(is_tiny, builder.bitcast(tiny, wide), normal)
    if special is None:  # e4m3 has no infinities; all ones is NaN
        is_special = builder.icmp_unsigned("==", magnitude, constant(wide, 0x7F))
    else:
        is_special = builder.icmp_unsigned(">=", magnitude, constant(wide, special << mantissa_bits))
    value = builder.select(is_special, builder.or_(moved, constant(wide, 0x7F800000)), value)
    return builder.bitcast(builder.or_(value, sign), floats)


def exp_of(builder: Any, x: Any) -> Any:
    """Return e^x: 2^n e^r with n whole and |r| <= ln(2)/2, e^r by Cephes' polynomial, 1e-7 off at most.

    Below -87.3 it stays at e^-87.3, above 88.3 it may be infinite, and from 89 on it is; NaN stays NaN.
    """
    wide = ir.VectorType(I32, x.type.count)

    def of(value: float) -> ir.Constant:
        return constant(x.type, value)

    x = builder.select(builder.fcmp_ordered("<", x, of(-87.3)), of(-87.3), x)
    x = builder.select(builder.fcmp_ordered(">", x, of(89.0)), of(89.0), x)
    shift = of(1.5 * 2**23)  # adding it leaves n in the lowest bits
    shifted = fused(builder, x, of(1 / math.log(2)), shift)
    n = builder.fsub(shifted, shift)
    r = fused(builder, n, of(-0.693359375), x)
    r = fused(builder, n, of(2.12194440e-4), r)
    polynomial = of(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        polynomial = fused(builder, polynomial, r, of(coefficient))
    power = builder.fadd(fused(builder, polynomial, builder.fmul(r, r), r), of(1.0))
    exponent = builder.shl(builder.add(builder.bitcast(shifted, wide), constant(wide, 127)), constant(wide, 23))
    return builder.fmul(power, builder.bitcast(exponent, x.type))


def combined(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine the upper half of a vector with the lower one until one number is left."""
    n = value.type.count
    while n > 1:
        n //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(I32, n), list(range(start, start + n))))
            for start in (0, n)
        )
        value = combine(low, high)
    return builder.extract_element(value, ir.Constant(I32, 0))


def row_addresses(builder: Any, array: Any, rows: Any, column: Any, size: int, numbers: range) -> list[Any]:
    """Return the addresses of a column in the rows of these numbers, of a matrix that is given as an array of bytes.

    `size` is the bytes of one of the matrix's numbers. `rows` is a tuple: the offset of row 0, the length of a row, and
    the offset of the last row that exists; rows beyond it are that one again.
    """
    start, length, last = (builder.extract_value(rows, index) for index in range(3))
    addresses = []
    for number in numbers:
        offset = builder.add(start, builder.mul(length, ir.Constant(I64, number)))
        offset = builder.select(builder.icmp_signed("<", offset, last), offset, last)
        addresses.append(builder.gep(array, [builder.mul(builder.add(offset, column), ir.Constant(I64, size))]))
    return addresses
