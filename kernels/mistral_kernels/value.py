"""Numbers, vectors and addresses that write their own instructions: the arithmetic of the innermost loops.

Numba cannot keep an array of vectors in registers, so the innermost loops are unrolled by Python: a function computes
with Values as with NumPy's numbers, and each operator writes one instruction of LLVM. LLVM translates these for the
processor. A vector is a fixed number of lanes; a plain number that meets a vector stands in every lane.

    @operation(vector, vector, types.float32)
    def gate(x: Value, scale: Value) -> Value:
        return x / (1.0 + exp(-x)) * scale

`operation` makes an instruction of Numba of such a function: kernels call `gate(x, scale)`. Nothing is checked, and an
integer that grows beyond its bits loses the highest ones, as in NumPy.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, Union

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

_BUILDER: ContextVar[Any] = ContextVar("builder")  # what the operation that is being written appends instructions to


@contextmanager
def _writing_to(builder: Any) -> Iterator[None]:
    token = _BUILDER.set(builder)
    try:
        yield
    finally:
        _BUILDER.reset(token)


class _BFloatType(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for; only the processor's own instruction takes it."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


class Dtype(NamedTuple):
    """What a number is, as NumPy's dtypes: its LLVM type, its bits, and how it is divided, shifted and compared."""

    llvm: ir.Type
    bits: int
    is_float: bool = False
    is_signed: bool = True


BOOL = Dtype(ir.IntType(1), 1, is_signed=False)
I8, I16, I32, I64 = (Dtype(ir.IntType(bits), bits) for bits in (8, 16, 32, 64))
U8, U16, U32 = (Dtype(ir.IntType(bits), bits, is_signed=False) for bits in (8, 16, 32))
F16, F32 = Dtype(ir.HalfType(), 16, is_float=True), Dtype(ir.FloatType(), 32, is_float=True)
BF16 = Dtype(_BFloatType(), 16, is_float=True)

Number = Union["Value", int, float]


@dataclass(frozen=True, eq=False)
class Value:
    """A number (lanes = 0) or a vector of numbers."""

    llvm: Any
    dtype: Dtype
    lanes: int = 0

    def _meet(self, other: Number) -> tuple[Any, Any, int]:
        """Return both operands with as many lanes, and this number."""
        if not isinstance(other, Value):
            return self.llvm, constant(self.dtype, other, self.lanes).llvm, self.lanes
        lanes = max(self.lanes, other.lanes)
        return self.spread(lanes).llvm, other.spread(lanes).llvm, lanes

    def _computed(self, name_of_floats: str, name_of_integers: str, other: Number, *, swapped: bool = False) -> Value:
        a, b, lanes = self._meet(other)
        if swapped:
            a, b = b, a
        name = name_of_floats if self.dtype.is_float else name_of_integers
        return Value(getattr(_BUILDER.get(), name)(a, b), self.dtype, lanes)

    def _compared(self, sign: str, other: Number) -> Value:
        a, b, lanes = self._meet(other)
        builder = _BUILDER.get()
        if self.dtype.is_float:
            compare = builder.fcmp_ordered
        else:
            compare = builder.icmp_signed if self.dtype.is_signed else builder.icmp_unsigned
        return Value(compare(sign, a, b), BOOL, lanes)

    def __add__(self, other: Number) -> Value:
        return self._computed("fadd", "add", other)

    def __sub__(self, other: Number) -> Value:
        return self._computed("fsub", "sub", other)

    def __rsub__(self, other: Number) -> Value:
        return self._computed("fsub", "sub", other, swapped=True)

    def __mul__(self, other: Number) -> Value:
        return self._computed("fmul", "mul", other)

    def __truediv__(self, other: Number) -> Value:
        return self._computed("fdiv", "", other)

    def __rtruediv__(self, other: Number) -> Value:
        return self._computed("fdiv", "", other, swapped=True)

    def __floordiv__(self, other: Number) -> Value:
        return self._computed("", "sdiv" if self.dtype.is_signed else "udiv", other)

    def __mod__(self, other: Number) -> Value:
        return self._computed("", "srem" if self.dtype.is_signed else "urem", other)

    def __lshift__(self, other: Number) -> Value:
        return self._computed("", "shl", other)

    def __rshift__(self, other: Number) -> Value:
        return self._computed("", "ashr" if self.dtype.is_signed else "lshr", other)

    def __and__(self, other: Number) -> Value:
        return self._computed("", "and_", other)

    def __or__(self, other: Number) -> Value:
        return self._computed("", "or_", other)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Value:
        builder = _BUILDER.get()
        return Value((builder.fneg if self.dtype.is_float else builder.neg)(self.llvm), self.dtype, self.lanes)

    def __lt__(self, other: Number) -> Value:
        return self._compared("<", other)

    def __gt__(self, other: Number) -> Value:
        return self._compared(">", other)

    def __ge__(self, other: Number) -> Value:
        return self._compared(">=", other)

    def equals(self, other: Number) -> Value:
        """Whether both are the same number, lane by lane."""
        return self._compared("==", other)

    def is_nan(self) -> Value:
        """Whether a float is NaN, lane by lane."""
        return Value(_BUILDER.get().fcmp_unordered("uno", self.llvm, self.llvm), BOOL, self.lanes)

    def spread(self, lanes: int) -> Value:
        """A vector with this number in every lane; a vector of that many lanes as it is."""
        if self.lanes == lanes:
            return self
        builder = _BUILDER.get()
        nothing = ir.Constant(ir.VectorType(self.dtype.llvm, lanes), ir.Undefined)
        first = builder.insert_element(nothing, self.llvm, ir.Constant(I32.llvm, 0))
        return Value(first, self.dtype, lanes).chosen([0] * lanes)

    def to(self, dtype: Dtype) -> Value:
        """The same numbers as another dtype: what does not fit loses its highest bits, and floats are not rounded."""
        builder, have = _BUILDER.get(), self.dtype
        if have.is_float:
            convert = builder.fpext
        elif dtype.is_float:
            convert = builder.sitofp if have.is_signed else builder.uitofp
        elif dtype.bits < have.bits:
            convert = builder.trunc
        else:
            convert = builder.sext if have.is_signed else builder.zext
        return Value(convert(self.llvm, _llvm_type(dtype, self.lanes)), dtype, self.lanes)

    def bits_as(self, dtype: Dtype) -> Value:
        """The same bits, read as numbers of another dtype: fewer and wider ones, or more and narrower ones."""
        lanes = self.lanes * self.dtype.bits // dtype.bits
        return Value(_BUILDER.get().bitcast(self.llvm, _llvm_type(dtype, lanes)), dtype, lanes)

    def chosen(self, order: Sequence[int], other: Value | None = None) -> Value:
        """The lanes of these numbers; those of `other`, if there is one, are counted after this vector's own."""
        second = ir.Constant(self.llvm.type, ir.Undefined) if other is None else other.llvm
        mask = ir.Constant(ir.VectorType(I32.llvm, len(order)), list(order))
        return Value(_BUILDER.get().shuffle_vector(self.llvm, second, mask), self.dtype, len(order))

    def beside(self, other: Value) -> Value:
        """The lanes of this vector, then those of another one of the same length."""
        return self.chosen(range(2 * self.lanes), other)

    def address(self, dtype: Dtype = I64) -> Address:
        """The place in memory that an int64 stands for."""
        return Address(_BUILDER.get().inttoptr(self.llvm, dtype.llvm.as_pointer()), dtype)

    def lane(self, number: int) -> Value:
        """One number of a vector."""
        return Value(_BUILDER.get().extract_element(self.llvm, ir.Constant(I32.llvm, number)), self.dtype)

    def combined(self, combine: Callable[[Value, Value], Value]) -> Value:
        """Combine the lower half of a vector with the upper one until one number is left."""
        value = self
        while value.lanes > 1:
            half = value.lanes // 2
            value = combine(value.chosen(range(half)), value.chosen(range(half, 2 * half)))
        return value.lane(0)


@dataclass(frozen=True, eq=False)
class Address:
    """Where numbers lie in memory. `address + n` is n numbers of its dtype further on."""

    llvm: Any
    dtype: Dtype

    def __add__(self, n: Value | int) -> Address:
        offset = n.llvm if isinstance(n, Value) else ir.Constant(I64.llvm, n)
        return Address(_BUILDER.get().gep(self.llvm, [offset]), self.dtype)

    def of(self, dtype: Dtype) -> Address:
        """The same place, where `+` counts other numbers."""
        return Address(_BUILDER.get().bitcast(self.llvm, dtype.llvm.as_pointer()), dtype)

    def _of_vector(self, dtype: Dtype, lanes: int) -> Any:
        return _BUILDER.get().bitcast(self.llvm, _llvm_type(dtype, lanes).as_pointer())

    def load(self, dtype: Dtype, lanes: int = 0) -> Value:
        """The numbers that lie here, whatever the address."""
        return Value(_BUILDER.get().load(self._of_vector(dtype, lanes), align=1), dtype, lanes)

    def load_first(self, dtype: Dtype, lanes: int, count: Value) -> Value:
        """The first `count` numbers that lie here, then zeros; nothing beyond them is read."""
        nothing = ir.Constant(_llvm_type(dtype, lanes), None)
        mask = constant(I64, range(lanes), lanes) < count
        name = f"llvm.masked.load.v{lanes}{'f' if dtype.is_float else 'i'}{dtype.bits}.p0"
        arguments = [self._of_vector(dtype, lanes), ir.Constant(I32.llvm, 1), mask.llvm, nothing]
        return Value(_called(name, nothing.type, arguments), dtype, lanes)

    def store_first(self, value: Value, count: Value) -> None:
        """Put the first `count` numbers of a vector here; nothing beyond them is written."""
        mask = constant(I64, range(value.lanes), value.lanes) < count
        name = f"llvm.masked.store.v{value.lanes}{'f' if value.dtype.is_float else 'i'}{value.dtype.bits}.p0"
        place = self._of_vector(value.dtype, value.lanes)
        _called(name, ir.VoidType(), [value.llvm, place, ir.Constant(I32.llvm, 1), mask.llvm])

    def store(self, value: Value) -> None:
        """Put a number or a vector here."""
        _BUILDER.get().store(value.llvm, self._of_vector(value.dtype, value.lanes), align=1)

    def load_atomic(self) -> Value:
        """The int64 here, and whatever other threads had written before they put it here."""
        return Value(_BUILDER.get().load_atomic(self.llvm, "acquire", 8), I64)

    def store_atomic(self, value: Value) -> None:
        """Put an int64 here for other threads, which also see what this thread has written before."""
        _BUILDER.get().store_atomic(value.llvm, self.llvm, "release", 8)

    def add_atomic(self, n: int) -> None:
        """Add to the int64 here, while other threads add to it as well."""
        _BUILDER.get().atomic_rmw("add", self.llvm, ir.Constant(I64.llvm, n), "acq_rel")

    def replace_atomic(self, expected: Value, new: Value) -> Value:
        """Replace the int64 here if it is as expected; return whether it was."""
        builder = _BUILDER.get()
        both = builder.cmpxchg(self.llvm, expected.llvm, new.llvm, "acq_rel", "acquire")
        return Value(builder.extract_value(both, 1), BOOL)

    def prefetch(self, ahead: int = 0, *, level: int = 2) -> None:
        """Ask for the cache line `ahead` bytes further on, which need not exist, for the cache of a level."""
        read, locality, data = (ir.Constant(I32.llvm, value) for value in (0, 4 - level, 1))
        place = (self.of(U8) + ahead).llvm
        _called("llvm.prefetch.p0", ir.VoidType(), [place, read, locality, data])


def _llvm_type(dtype: Dtype, lanes: int) -> ir.Type:
    return ir.VectorType(dtype.llvm, lanes) if lanes else dtype.llvm


def _called(name: str, result: ir.Type, arguments: Sequence[Any]) -> Any:
    builder = _BUILDER.get()
    function_type = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def constant(dtype: Dtype, value: float | Sequence[float], lanes: int = 0) -> Value:
    """Return a number, a vector with it in every lane, or a vector of these numbers."""
    numbers: Any = value
    if lanes:
        numbers = [value] * lanes if isinstance(value, (int, float)) else list(value)
    return Value(ir.Constant(_llvm_type(dtype, lanes), numbers), dtype, lanes)


def run(name: str, *numbers: int) -> None:
    """Write an instruction of the processor that gives nothing, with some int32."""
    _called(name, ir.VoidType(), [ir.Constant(I32.llvm, number) for number in numbers])


def call_at(function: Value, *arguments: Value) -> Value:
    """Return the int32 that the function at an address returns."""
    builder, arguments_types = _BUILDER.get(), [argument.llvm.type for argument in arguments]
    function_type = ir.FunctionType(I32.llvm, arguments_types)
    place = builder.inttoptr(function.llvm, function_type.as_pointer())
    return Value(builder.call(place, [argument.llvm for argument in arguments]), I32)


def call(name: str, like: Value, *arguments: Value) -> Value:
    """Return what an instruction of LLVM, or of the processor, gives; the result is as `like`."""
    result = _called(name, like.llvm.type, [argument.llvm for argument in arguments])
    return Value(result, like.dtype, like.lanes)


def fma(a: Number, b: Number, c: Number) -> Value:
    """Return a b + c for float32, rounded once where the processor has an instruction for it."""
    like = max((value for value in (a, b, c) if isinstance(value, Value)), key=lambda value: value.lanes)
    a, b, c = (x.spread(like.lanes) if isinstance(x, Value) else constant(F32, x, like.lanes) for x in (a, b, c))
    return call(f"llvm.fmuladd.v{like.lanes}f32", like, a, b, c)


def fenced(value: Value) -> Value:
    """Return a vector of float32 that stays rounded: it does not become one instruction with what is added to it."""
    return call(f"llvm.arithmetic.fence.v{value.lanes}f32", value, value)


def where(condition: Value, a: Number, b: Number) -> Value:
    """Return a where the condition is true, and b elsewhere."""
    like = a if isinstance(a, Value) else b
    assert isinstance(like, Value)
    first, second, lanes = like._meet(b if like is a else a)
    if like is not a:
        first, second = second, first
    return Value(_BUILDER.get().select(condition.llvm, first, second), like.dtype, lanes)


def larger(a: Value, b: Number) -> Value:
    """Return the larger of each pair of numbers; b where either is NaN."""
    return where(a > b, a, b)


def loop(
    start: Number,
    stop: Value,
    stride: int,
    sums: list[Value],
    one_round: Callable[[Value, list[Value]], list[Value]],
    *,
    stays: bool = False,
) -> list[Value]:
    """Return sums that stay in registers: one_round(k, sums) gives the next, for k in range(start, stop, stride).

    If the loop `stays`, LLVM does not write its rounds out one after the other. It would add up the rounds' sums
    first, in an order for which registers do not suffice.
    """
    builder = _BUILDER.get()
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    k = Value(builder.phi(I64.llvm), I64)
    k.llvm.add_incoming(start.llvm if isinstance(start, Value) else ir.Constant(I64.llvm, start), before)
    phis = [Value(builder.phi(value.llvm.type), value.dtype, value.lanes) for value in sums]
    for phi, value in zip(phis, sums, strict=True):
        phi.llvm.add_incoming(value.llvm, before)
    builder.cbranch((k < stop).llvm, body, after)
    builder.position_at_end(body)
    new = one_round(k, phis)
    k.llvm.add_incoming((k + stride).llvm, builder.block)
    for phi, value in zip(phis, new, strict=True):
        phi.llvm.add_incoming(value.llvm, builder.block)
    again = builder.branch(head)
    if stays:
        again.set_metadata("llvm.loop", _not_unrolled(builder.module))
    builder.position_at_end(after)
    return phis


def _not_unrolled(module: ir.Module) -> Any:
    """Return LLVM's mark for a loop that is not unrolled: a node that begins with itself."""
    node = ir.values.MDValue(module, [], name=str(len(module.metadata)))
    mark = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    node.operands = (node, mark)
    return node


class FloatVectorType(types.Type):
    """Numba's type of n float32 numbers in one register, or in a few."""

    def __init__(self, n: int) -> None:
        self.n = n
        super().__init__(name=f"float32x{n}")


@register_model(FloatVectorType)
class _FloatVectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, frontend_type: FloatVectorType) -> None:
        super().__init__(manager, frontend_type, ir.VectorType(F32.llvm, frontend_type.n))


ARRAY = None  # as the type of a parameter: any array
_DTYPES = {types.boolean: BOOL, types.intp: I64, types.float32: F32}
_DTYPES |= {types.uint8: U8, types.int8: I8, types.uint16: U16, types.int16: I16, types.uint32: U32, types.int32: I32}


def operation(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make an operation that kernels can call of a function that computes with Values and Addresses.

    result      the Numba type of what the function returns: of a Value, or of a list of Values for a tuple;
                types.void if it returns None
    parameters  the Numba types of its arguments. A number or a vector arrives as a Value, a tuple of them as a tuple of
                Values, of the same class if it is a named tuple, and an ARRAY as the Address of its first element
    """

    def make(write: Callable[..., Any]) -> Any:
        def typed(typing: Any, *given: Any) -> Any:
            wanted = [have if want is ARRAY else want for have, want in zip(given, parameters, strict=True)]

            def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                with _writing_to(builder):
                    written = write(*(_as_value(context, *one) for one in zip(wanted, values, strict=True)))
                if written is None:
                    return context.get_dummy_value()
                if isinstance(written, list):
                    return context.make_tuple(builder, result, [value.llvm for value in written])
                return written.llvm

            return result(*wanted), generate

        functools.update_wrapper(typed, write)
        # Numba takes the names of all arguments but the first from here.
        names = ["typing", *inspect.signature(write).parameters]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        typed.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
        return intrinsic(typed)

    return make


@intrinsic
def bound(typing: Any, work: Any, arguments: Any) -> Any:
    """Return two int64: the address of a function, and that of its data.

    function(data, first, last) calls work(first, last, *arguments), and returns 0 unless that has failed. The data lie
    on the stack of the function that calls `bound`.
    """
    parameters = (types.intp, types.intp, *arguments.types)
    signature = typing.resolve_function_type(work, parameters, {})

    def generate(context: Any, builder: Any, own: Any, values: Any) -> Any:
        compiled = work.dispatcher.get_compile_result(signature)
        context.add_linking_libs([compiled.library])
        packed, i64 = values[1], I64.llvm
        function_type = ir.FunctionType(I32.llvm, [i64, i64, i64])
        function = ir.Function(builder.module, function_type, builder.module.get_unique_name("share"))
        function.linkage = "internal"
        inner = ir.IRBuilder(function.append_basic_block())
        data, first, last = function.args
        found = inner.load(inner.inttoptr(data, packed.type.as_pointer()))
        given = [first, last, *(inner.extract_value(found, n) for n in range(len(arguments)))]
        given = [context.cast(inner, *one) for one in zip(given, parameters, signature.args, strict=True)]
        status, _ = context.call_internal_no_propagate(inner, compiled.fndesc, signature, given)
        inner.ret(inner.zext(status.is_error, I32.llvm))
        place = cgutils.alloca_once_value(builder, packed)
        return context.make_tuple(builder, own.return_type, [builder.ptrtoint(one, i64) for one in (function, place)])

    return types.UniTuple(types.intp, 2)(work, arguments), generate


@intrinsic
def kept_until_here(typing: Any, arguments: Any) -> Any:
    """Do nothing, with arguments that Numba would give back after their last use: `bound` hides where that is."""
    return types.void(arguments), lambda context, builder, own, values: context.get_dummy_value()


def _as_value(context: Any, of_type: Any, llvm: Any) -> Any:
    """Return an argument as an operation takes it."""
    builder = _BUILDER.get()
    if isinstance(of_type, types.Array):
        data = context.make_array(of_type)(context, builder, llvm).data
        return Address(data, _DTYPES[of_type.dtype])
    if isinstance(of_type, types.BaseTuple):
        parts = [_as_value(context, one, builder.extract_value(llvm, n)) for n, one in enumerate(of_type)]
        return of_type.instance_class(*parts) if isinstance(of_type, types.BaseNamedTuple) else tuple(parts)
    if isinstance(of_type, FloatVectorType):
        return Value(llvm, F32, of_type.n)
    return Value(llvm, _DTYPES[of_type])


def operator_of_vectors(sign: Callable[..., Any], vector: FloatVectorType) -> None:
    """Let kernels write an operator of Values between vectors, or between a vector and a number."""

    @type_callable(sign)
    def find_type(context: Any) -> Any:
        def result_of(a: Any, b: Any) -> Any:
            is_ours = vector in (a, b) and all(one == vector or isinstance(one, types.Number) for one in (a, b))
            return vector if is_ours else None

        return result_of

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        def as_float(of_type: Any, llvm: Any) -> Value:
            if of_type == vector:
                return Value(llvm, F32, vector.n)
            return Value(context.cast(builder, llvm, of_type, types.float32), F32)

        with _writing_to(builder):
            return sign(*map(as_float, signature.args, values)).llvm

    for pair in ((vector, vector), (vector, types.Number), (types.Number, vector)):
        lower_builtin(sign, *pair)(generate)


def negation_of_vectors(vector: FloatVectorType) -> None:
    """Let kernels write -a for a vector a."""

    @type_callable(operator.neg)
    def find_type(context: Any) -> Any:
        return lambda a: vector if a == vector else None

    @lower_builtin(operator.neg, vector)
    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        with _writing_to(builder):
            return (-Value(values[0], F32, vector.n)).llvm
