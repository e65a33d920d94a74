"""Neighbours that one instruction multiplies and adds: two bf16, two int16, or four bytes.

Not every processor has an instruction for each of these. Without it, several instructions give the same result.
"""

from __future__ import annotations

from mistral_kernels import neon
from mistral_kernels.processor import FEATURES, IS_ARM, LANES, target_cpu
from mistral_kernels.value import BF16, F32, I16, I32, U16, U32, Value, call, constant, fma


def _by_lanes(feature: str) -> dict[int, bool]:
    """Return whether the processor has a feature of AVX-512 for vectors of 16, 8 and 4 lanes of 32 bits."""
    has_short = {feature, "avx512vl"} <= FEATURES
    return {16: feature in FEATURES, 8: has_short, 4: has_short}


def _has_quads() -> dict[int, bool]:
    """Return for which vectors four bytes are multiplied and added up at once: AVX-512's VNNI, or AVX2's."""
    return {lanes: has or (lanes <= 8 and "avxvnni" in FEATURES) for lanes, has in _by_lanes("avx512vnni").items()}


def _named(names: dict[str, str]) -> dict[int, str]:
    """Return which instructions the processor has for vectors of 16, 8 and 4 lanes of 32 bits."""
    return {n: name for n, (feature, name) in zip((16, 8, 4), names.items(), strict=True) if feature in FEATURES}


# Whether pairs of bf16, or four bytes, are multiplied and added up at once.
_HAS_BF16_PAIRS, _HAS_QUADS = _by_lanes("avx512bf16"), _has_quads()
# What multiplies bytes into pairs, and what multiplies and adds pairs of int16.
_PAIRS_OF_BYTES = _named(
    {
        "avx512bw": "llvm.x86.avx512.pmaddubs.w.512",
        "avx2": "llvm.x86.avx2.pmadd.ub.sw",
        "ssse3": "llvm.x86.ssse3.pmadd.ub.sw.128",
    }
)
_PAIRS = _named(
    {
        "avx512bw": "llvm.x86.avx512.pmaddw.d.512",
        "avx2": "llvm.x86.avx2.pmadd.wd",
        "sse2": "llvm.x86.sse2.pmadd.wd",
    }
)
# Zen starts as many pairs of bf16 in a cycle as multiply-adds of float32, Intel's Emerald Rapids a quarter as many.
PAIRS_ARE_FASTER = _HAS_BF16_PAIRS[LANES] and target_cpu().startswith("znver")


def pair_products(a: Value, b: Value, sums: Value) -> Value:
    """Return (sums + a[2j+1] b[2j+1]) + a[2j] b[2j] for n float32 and 2n bf16, which lie in the bits of n float32.

    A product is exact and each sum is rounded once, in that order, by one instruction of processors that have it
    (AVX512_BF16), whose subnormal numbers are 0, and by two multiply-adds of others.
    """
    if _HAS_BF16_PAIRS.get(sums.lanes):
        name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * sums.lanes}"
        return call(name, sums, sums, a.bits_as(BF16), b.bits_as(BF16))
    a, b = a.bits_as(U32), b.bits_as(U32)
    after_odd = fma((a & 0xFFFF0000).bits_as(F32), (b & 0xFFFF0000).bits_as(F32), sums)
    return fma((a << 16).bits_as(F32), (b << 16).bits_as(F32), after_odd)


def products(a: Value, b: Value, sums: Value, kind: str) -> Value:
    """Return sums + a b for float32, or for the pairs in them."""
    return (pair_products if kind == "pairs" else fma)(a, b, sums)


def pair_dots(sums: Value, a: Value, b: Value) -> Value:
    """Return sums + a[2j] b[2j] + a[2j+1] b[2j+1] for n int32 and 2n int16: x86's multiply-and-add of pairs."""
    if sums.lanes in _PAIRS:
        return sums + call(_PAIRS[sums.lanes], sums, a, b)
    products = a.to(I32) * b.to(I32)
    return sums + (products.chosen(range(0, a.lanes, 2)) + products.chosen(range(1, a.lanes, 2)))


def no_dots(lanes: int, n_words: int) -> Value:
    """Return the sums that `add_dots` begins with, for inputs of which four are n words of 32 bits."""
    return neon.no_dots(lanes, n_words) if IS_ARM else constant(I32, 0, lanes)


def total_of(sums: Value, lanes: int) -> Value:
    """Return what `add_dots` has summed, as so many int32."""
    return neon.total_of(sums, lanes) if IS_ARM else sums


def add_dots(sums: Value, codes: Value, x: list[Value], largest: int) -> Value:
    """Return sums plus the products of codes of up to `largest`, four in each lane, with inputs.

    x   int16 even and odd, or int8 together
    """
    if IS_ARM:
        return neon.add_dots(sums, codes, x, largest)
    if len(x) == 1:
        return quad_dots(sums, codes, x[0], largest)
    words = codes.bits_as(U16)
    even, odd = words & 0xFF, words >> 8
    return pair_dots(pair_dots(sums, even.bits_as(I16), x[0]), odd.bits_as(I16), x[1])


def multiplies_bytes_in_pairs(lanes: int) -> bool:
    """Return whether the processor multiplies two bytes at once in vectors of so many int32, but not four."""
    return lanes in _PAIRS_OF_BYTES and not _HAS_QUADS[lanes]


def quad_dots(sums: Value, codes: Value, x: Value, largest: int) -> Value:
    """Return sums + codes[4j] x[4j] + ... + codes[4j+3] x[4j+3] for n int32, 4n codes of up to `largest`, and 4n int8.

    One instruction of processors that have it for n bytes (VNNI). Others multiply bytes into int16 pairs, which would
    overflow with codes beyond 64, or widen them.
    """
    n = sums.lanes
    if _HAS_QUADS.get(n):
        return call(f"llvm.x86.avx512.vpdpbusd.{32 * n}", sums, sums, codes, x)
    if largest <= 64 and n in _PAIRS_OF_BYTES:
        return widened_sums(sums, pairs_of_bytes(codes, x))
    codes, x = codes.bits_as(U16), x.bits_as(I16)
    even = (codes & 0xFF).bits_as(I16), (x << 8) >> 8
    odd = (codes >> 8).bits_as(I16), x >> 8
    return pair_dots(pair_dots(sums, *even), *odd)


def pairs_of_bytes(codes: Value, x: Value) -> Value:
    """Return codes[2j] x[2j] + codes[2j+1] x[2j+1] as int16, for 4n codes and 4n int8."""
    return call(_PAIRS_OF_BYTES[codes.lanes // 4], constant(I16, 0, codes.lanes // 2), codes, x)


def widened_sums(sums: Value, pairs: Value) -> Value:
    """Return n int32 plus the sums of two int16 each."""
    return pair_dots(sums, pairs, constant(I16, 1, pairs.lanes))
