"""Neighbours that one instruction multiplies and adds: two bf16, two int16, or four bytes.

As in instructions.py, each function writes a few instructions. Not every processor has an instruction for each of
these. Without it, several instructions give the same result.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from mistral_kernels.instructions import FEATURES, I16, I32, LANES, constant, fused, target_cpu


def _by_lanes(feature: str) -> dict[int, bool]:
    """Return whether the processor has a feature of AVX-512 for vectors of 16, 8 and 4 lanes of 32 bits."""
    has_short = {feature, "avx512vl"} <= FEATURES
    return {16: feature in FEATURES, 8: has_short, 4: has_short}


class _BFloatType(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for; only the processor's own instruction takes it."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


# Whether pairs of bf16, or four bytes, are multiplied and added up at once, and what multiplies bytes into pairs.
_HAS_BF16_PAIRS, _HAS_QUADS = _by_lanes("avx512bf16"), _by_lanes("avx512vnni")
_PAIRS_OF_BYTES = {
    n: name
    for n, feature, name in (
        (16, "avx512bw", "llvm.x86.avx512.pmaddubs.w.512"),
        (8, "avx2", "llvm.x86.avx2.pmadd.ub.sw"),
        (4, "ssse3", "llvm.x86.ssse3.pmadd.ub.sw.128"),
    )
    if feature in FEATURES
}
# Zen starts as many pairs of bf16 in a cycle as multiply-adds of float32, Intel's Emerald Rapids a quarter as many.
PAIRS_ARE_FASTER = _HAS_BF16_PAIRS[LANES] and target_cpu().startswith("znver")


def rounded_to_bf16(builder: Any, floats: Any) -> Any:
    """Return float32 rounded to the nearest bf16, ties to even, as int16; NaN stays NaN."""
    n = floats.type.count
    bits = builder.bitcast(floats, ir.VectorType(I32, n))

    def of(value: int) -> ir.Constant:
        return constant(bits.type, value)

    is_odd = builder.and_(builder.lshr(bits, of(16)), of(1))
    nearest = builder.add(bits, builder.add(is_odd, of(0x7FFF)))
    nearest = builder.select(builder.fcmp_unordered("uno", floats, floats), builder.or_(bits, of(0x400000)), nearest)
    return builder.trunc(builder.lshr(nearest, of(16)), ir.VectorType(I16, n))


def pair_products(builder: Any, a: Any, b: Any, sums: Any) -> Any:
    """Return (sums + a[2j+1] b[2j+1]) + a[2j] b[2j] for n float32 and 2n bf16, which lie in the bits of n float32.

    A product is exact and each sum is rounded once, in that order, by one instruction of processors that have it
    (AVX512_BF16), whose subnormal numbers are 0, and by two multiply-adds of others.
    """
    n = sums.type.count
    if _HAS_BF16_PAIRS.get(n):
        halves = ir.VectorType(_BFloatType(), 2 * n)
        function_type = ir.FunctionType(sums.type, [sums.type, halves, halves])
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * n}"
        function = cgutils.get_or_insert_function(builder.module, function_type, name)
        return builder.call(function, [sums, builder.bitcast(a, halves), builder.bitcast(b, halves)])
    wide = ir.VectorType(I32, n)
    a, b = builder.bitcast(a, wide), builder.bitcast(b, wide)
    odd, even = constant(wide, 0xFFFF0000), constant(wide, 16)
    a_odd, b_odd = (builder.bitcast(builder.and_(pairs, odd), sums.type) for pairs in (a, b))
    a_even, b_even = (builder.bitcast(builder.shl(pairs, even), sums.type) for pairs in (a, b))
    return fused(builder, a_even, b_even, fused(builder, a_odd, b_odd, sums))


def products(builder: Any, a: Any, b: Any, sums: Any, kind: str) -> Any:
    """Return sums + a b for float32, or for the pairs in them."""
    return (pair_products if kind == "pairs" else fused)(builder, a, b, sums)


def pair_dots(builder: Any, sums: Any, a: Any, b: Any) -> Any:
    """Return sums + a[2j] b[2j] + a[2j+1] b[2j+1] for n int32 and 2n int16: x86's multiply-and-add of pairs."""
    n, wide = sums.type.count, ir.VectorType(I32, a.type.count)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    even, odd = (
        builder.shuffle_vector(products, undefined, ir.Constant(ir.VectorType(I32, n), list(range(start, 2 * n, 2))))
        for start in (0, 1)
    )
    return builder.add(sums, builder.add(even, odd))


def quad_dots(builder: Any, sums: Any, codes: Any, x: Any, largest: int) -> Any:
    """Return sums + codes[4j] x[4j] + ... + codes[4j+3] x[4j+3] for n int32, 4n codes of up to `largest`, and 4n int8.

    One instruction of processors that have it for n bytes (VNNI). Others multiply bytes into int16 pairs, which would
    overflow with codes beyond 64, or widen them.
    """
    n = sums.type.count
    words, halves, bits = ir.VectorType(I16, 2 * n), constant(ir.VectorType(I16, 2 * n), 8), 128 * n // 4
    if _HAS_QUADS.get(n):
        name = f"llvm.x86.avx512.vpdpbusd.{bits}"
        function_type = ir.FunctionType(sums.type, [sums.type, codes.type, x.type])
        return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [sums, codes, x])
    if largest <= 64 and n in _PAIRS_OF_BYTES:
        function_type = ir.FunctionType(words, [codes.type, x.type])
        multiply = cgutils.get_or_insert_function(builder.module, function_type, _PAIRS_OF_BYTES[n])
        pairs = builder.call(multiply, [codes, x])
        return pair_dots(builder, sums, pairs, constant(words, 1))
    codes, x = builder.bitcast(codes, words), builder.bitcast(x, words)
    even = builder.and_(codes, constant(words, 0xFF)), builder.ashr(builder.shl(x, halves), halves)
    odd = builder.lshr(codes, halves), builder.ashr(x, halves)
    return pair_dots(builder, pair_dots(builder, sums, *even), *odd)
