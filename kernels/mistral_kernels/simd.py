"""Vectors as Numba values, so that a kernel above reads like its mathematics.

A vector is LANES float32 numbers. Numba is taught the type and a few operations, each of a line or two of LLVM's
language, which LLVM turns into whatever the machine has: AVX-512, AVX2, NEON, or plain SSE. Kernels name no machine.

    LANES       floats of a vector: 16 with AVX-512, 8 with AVX2, else 4; MISTRAL_KERNELS_LANES=4, 8 or 16 overrides
    KINDS       how numbers may be stored: f32, f16, bf16 (the upper half of a float32), fp8 (e4m3)

Offsets count elements; nothing is checked. Multiplications and additions round once where the machine can.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic, models, register_model

KINDS = {"f32": 4, "f16": 2, "bf16": 2, "fp8": 1}  # bytes of a number

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
STORED = {"f32": F32, "f16": I16, "bf16": I16, "fp8": I8}


def target_features() -> frozenset[str]:
    """Return the names of the instruction sets that Numba compiles for: {"avx2", "fma", ...}."""
    if config.CPU_FEATURES is not None:
        return frozenset(name[1:] for name in config.CPU_FEATURES.split(",") if name.startswith("+"))
    return frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)


def _lanes(features: frozenset[str]) -> int:
    asked = os.environ.get("MISTRAL_KERNELS_LANES")
    if asked:
        if asked not in ("4", "8", "16"):
            raise ValueError(f"MISTRAL_KERNELS_LANES is {asked!r}; expected 4, 8 or 16")
        return int(asked)
    return 16 if "avx512f" in features and "avx512bw" in features else 8 if "avx2" in features else 4


FEATURES = target_features()
LANES = _lanes(FEATURES)
# Without an instruction for it, LLVM would call a function that is not there when Numba links.
_HAS_F16 = "f16c" in FEATURES or platform.machine().lower() in ("aarch64", "arm64")


class VectorType(types.Type):
    """LANES float32 numbers."""

    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: VectorType) -> None:
        super().__init__(manager, frontend_type, VECTOR)


VECTOR = ir.VectorType(F32, LANES)
vector = VectorType()


# What the intrinsics are built of: functions that write LLVM instructions.


def constant(vector_type: ir.VectorType, value: float) -> ir.Constant:
    """Return a vector with `value` in every lane."""
    return ir.Constant(vector_type, [value] * vector_type.count)


def pointer(context: Any, builder: Any, array_type: Any, array: Any, offset: Any) -> Any:
    """Return the address of an array's element at a flat `offset`."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [offset])


def load_vector(builder: Any, address: Any, element: ir.Type, n: int) -> Any:
    """Return n elements from an address of any alignment."""
    return builder.load(builder.bitcast(address, ir.VectorType(element, n).as_pointer()), align=1)


def load_first(builder: Any, address: Any, element: ir.Type, n: int, count: Any) -> Any:
    """Return n elements of which only the first `count` are read; the others are 0."""
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


def prefetch_line(builder: Any, address: Any, ahead: int) -> None:
    """Ask for the cache line that is `ahead` bytes after an address, which need not exist, for the second-level cache."""
    byte_pointer = I8.as_pointer()
    function_type = ir.FunctionType(ir.VoidType(), [byte_pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0")
    place = builder.gep(builder.bitcast(address, byte_pointer), [ir.Constant(I64, ahead)])
    read, second_level, data = (ir.Constant(I32, value) for value in (0, 2, 1))
    builder.call(function, [place, read, second_level, data])


def call(builder: Any, name: str, result: ir.Type, arguments: Sequence[Any]) -> Any:
    """Call one of LLVM's own functions for a vector: llvm.NAME.v8f32, for example."""
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    full_name = f"llvm.{name}.v{arguments[0].type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, full_name), arguments)


def fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a b + c, rounded once where that is fast."""
    return call(builder, "fmuladd", a.type, [a, b, c])


def splat_of(builder: Any, scalar: Any, n: int) -> Any:
    """Return a vector of n times the same number."""
    undefined = ir.Constant(ir.VectorType(scalar.type, n), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(I32, n), [0] * n))


def widened(builder: Any, stored: Any, kind: str) -> Any:
    """Return stored numbers of a kind as float32."""
    if kind == "f32":
        return stored
    n = stored.type.count
    wide, floats = ir.VectorType(I32, n), ir.VectorType(F32, n)
    if kind == "f16" and _HAS_F16:
        return builder.fpext(builder.bitcast(stored, ir.VectorType(F16, n)), floats)
    if kind == "fp8" and _HAS_F16:
        # As f16, whose exponent has one bit more: sign to the left end, the rest one to the right of it. The exponents'
        # bias makes it 2^8 too small.
        half = ir.VectorType(I16, n)
        shifted = builder.ashr(builder.shl(builder.zext(stored, half), constant(half, 8)), constant(half, 1))
        bits = builder.and_(shifted, constant(half, 0xBFFF))
        is_nan = builder.icmp_unsigned("==", builder.and_(stored, constant(stored.type, 0x7F)), constant(stored.type, 0x7F))
        bits = builder.select(is_nan, constant(half, 0x7E00), bits)
        return builder.fmul(builder.fpext(builder.bitcast(bits, ir.VectorType(F16, n)), floats), constant(floats, 256.0))
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
    """Return e^x: 2^n e^r with n whole and |r| <= ln(2)/2, e^r by a polynomial (Cephes' coefficients), 1e-7 off at most.

    Below -87 it stays at e^-87.3 and above 88 at e^88.3; NaN stays NaN.
    """
    wide = ir.VectorType(I32, x.type.count)

    def of(value: float) -> ir.Constant:
        return constant(x.type, value)

    x = builder.select(builder.fcmp_ordered("<", x, of(-87.3)), of(-87.3), x)
    x = builder.select(builder.fcmp_ordered(">", x, of(88.3)), of(88.3), x)
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


def _halves(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
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


# The operations that kernels use.


@intrinsic
def zeros(typing: Any) -> Any:
    """A vector of zeros."""
    return vector(), lambda context, builder, signature, arguments: constant(VECTOR, 0.0)


@intrinsic
def splat(typing: Any, x: Any) -> Any:
    """A vector with x in every lane."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return splat_of(builder, context.cast(builder, arguments[0], signature.args[0], types.float32), LANES)

    return vector(x), generate


@intrinsic
def load(typing: Any, array: Any, offset: Any) -> Any:
    """The LANES float32 of an array that start at a flat offset."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return load_vector(builder, pointer(context, builder, array, *arguments), F32, LANES)

    return vector(array, types.intp), generate


@intrinsic
def load_part(typing: Any, array: Any, offset: Any, count: Any) -> Any:
    """The first `count` float32 of an array from an offset on, then zeros; nothing beyond them is read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = pointer(context, builder, array, *arguments[:2])
        return load_first(builder, address, F32, LANES, arguments[2])

    return vector(array, types.intp, types.intp), generate


@intrinsic
def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Put a vector into a float32 array at a flat offset."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = pointer(context, builder, array, *arguments[:2])
        builder.store(arguments[2], builder.bitcast(address, VECTOR.as_pointer()), align=1)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), generate


def _of_vectors(n_arguments: int, write: Callable[..., Any]) -> Callable[..., Any]:
    """Return the intrinsic of vectors that `write(builder, ...)` writes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return write(builder, *arguments)

    if n_arguments == 1:
        return intrinsic(lambda typing, a: (vector(a), generate))
    if n_arguments == 2:
        return intrinsic(lambda typing, a, b: (vector(a, b), generate))
    return intrinsic(lambda typing, a, b, c: (vector(a, b, c), generate))


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


add = _of_vectors(2, lambda builder, a, b: builder.fadd(a, b))
subtract = _of_vectors(2, lambda builder, a, b: builder.fsub(a, b))
multiply = _of_vectors(2, lambda builder, a, b: builder.fmul(a, b))
divide = _of_vectors(2, lambda builder, a, b: builder.fdiv(a, b))
larger = _of_vectors(2, _larger)
multiply_add = _of_vectors(3, fused)
exp = _of_vectors(1, exp_of)


@intrinsic
def within(typing: Any, a: Any, low: Any, high: Any, other: Any) -> Any:
    """The lanes low, ..., high - 1 of a, and the number `other` in all lanes before and after them."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value, low, high, other = arguments
        lanes = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
        from_low = builder.icmp_signed(">=", lanes, splat_of(builder, low, LANES))
        below_high = builder.icmp_signed("<", lanes, splat_of(builder, high, LANES))
        return builder.select(builder.and_(from_low, below_high), value, splat_of(builder, other, LANES))

    return vector(vector, types.intp, types.intp, types.float32), generate


@intrinsic
def sum_of(typing: Any, a: Any) -> Any:
    """The sum of a vector's lanes, in pairs."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _halves(builder, arguments[0], builder.fadd)

    return types.float32(a), generate


@intrinsic
def largest_of(typing: Any, a: Any) -> Any:
    """The largest of a vector's lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _halves(builder, arguments[0], lambda low, high: _larger(builder, low, high))

    return types.float32(a), generate


def loaders(kind: str) -> tuple[Any, Any]:
    """Return (load, load_part) for numbers of a kind in an array of bytes; offsets count numbers."""
    element, size = STORED[kind], KINDS[kind]

    def address_of(context: Any, builder: Any, array: Any, arguments: Any) -> Any:
        return pointer(context, builder, array, arguments[0], builder.mul(arguments[1], ir.Constant(I64, size)))

    @intrinsic
    def load_kind(typing: Any, array: Any, offset: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = address_of(context, builder, array, arguments)
            return widened(builder, load_vector(builder, address, element, LANES), kind)

        return vector(array, types.intp), generate

    @intrinsic
    def load_kind_part(typing: Any, array: Any, offset: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address = address_of(context, builder, array, arguments)
            return widened(builder, load_first(builder, address, element, LANES, arguments[2]), kind)

        return vector(array, types.intp, types.intp), generate

    return load_kind, load_kind_part


# Several rows of a matrix at once: a tuple with one vector of sums for each.

ROWS_TYPE = types.UniTuple(types.intp, 3)


def row_addresses(context: Any, builder: Any, array: Any, rows: Any, column: Any, size: int, numbers: range) -> list[Any]:
    """Return the addresses of a column in the rows of these numbers, of a matrix that is given as an array of bytes.

    `array` is its Numba type and value, `size` the bytes of a number. `rows` is a tuple: the offset of row 0, the length
    of a row, and the offset of the last row that exists; rows beyond it are that one again.
    """
    start, length, last = (builder.extract_value(rows, index) for index in range(3))
    addresses = []
    for number in numbers:
        offset = builder.add(start, builder.mul(length, ir.Constant(I64, number)))
        offset = builder.select(builder.icmp_signed("<", offset, last), offset, last)
        offset = builder.mul(builder.add(offset, column), ir.Constant(I64, size))
        addresses.append(pointer(context, builder, *array, offset))
    return addresses


def row_sums(kind: str, n_rows: int) -> tuple[Any, Any, Any, Any, Any]:
    """Return the operations on the sums of n rows of a matrix of a kind, given as bytes.

    no_sums()                               a tuple of n zero vectors
    add_products(sums, W, rows, i, x)       each sum plus W[row, i : i + LANES] * x
    add_products_part(..., count)           of the first `count` columns alone
    prefetch(W, rows, i)                    asks for the columns i, ..., i + 2 LANES - 1 of the n rows after these
    totals(sums)                            a tuple of n float32

    `rows` is as in `row_addresses`.
    """
    element, size = STORED[kind], KINDS[kind]
    sums_type = types.UniTuple(vector, n_rows)

    @intrinsic
    def no_sums(typing: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return context.make_tuple(builder, sums_type, [constant(VECTOR, 0.0)] * n_rows)

        return sums_type(), generate

    def accumulate(context: Any, builder: Any, signature: Any, arguments: Any, read: Callable[[Any], Any]) -> Any:
        sums, W, rows, i, x = arguments[:5]
        new = []
        for row, address in enumerate(row_addresses(context, builder, (signature.args[1], W), rows, i, size, range(n_rows))):
            weights = widened(builder, read(address), kind)
            new.append(fused(builder, weights, x, builder.extract_value(sums, row)))
        return context.make_tuple(builder, sums_type, new)

    @intrinsic
    def add_products(typing: Any, sums: Any, W: Any, rows: Any, i: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def read(address: Any) -> Any:
                return load_vector(builder, address, element, LANES)

            return accumulate(context, builder, signature, arguments, read)

        return sums_type(sums_type, W, ROWS_TYPE, types.intp, vector), generate

    @intrinsic
    def add_products_part(typing: Any, sums: Any, W: Any, rows: Any, i: Any, x: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            def read(address: Any) -> Any:
                return load_first(builder, address, element, LANES, arguments[5])

            return accumulate(context, builder, signature, arguments, read)

        return sums_type(sums_type, W, ROWS_TYPE, types.intp, vector, types.intp), generate

    @intrinsic
    def prefetch(typing: Any, W: Any, rows: Any, i: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            W, rows, i = arguments
            following = range(n_rows, 2 * n_rows)
            for address in row_addresses(context, builder, (signature.args[0], W), rows, i, size, following):
                for line in range(0, 2 * LANES * size, 64):
                    prefetch_line(builder, address, line)
            return context.get_dummy_value()

        return types.void(W, ROWS_TYPE, types.intp), generate

    @intrinsic
    def totals(typing: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            each = [_halves(builder, builder.extract_value(arguments[0], row), builder.fadd) for row in range(n_rows)]
            return context.make_tuple(builder, signature.return_type, each)

        return types.UniTuple(types.float32, n_rows)(sums_type), generate

    return no_sums, add_products, add_products_part, prefetch, totals
