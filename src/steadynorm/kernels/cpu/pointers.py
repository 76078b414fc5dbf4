"""Raw memory for the compiled CPU kernels: typed pointers, scratch on the stack, an atomic counter.

Kernels get addresses, not arrays: a call then costs a few microseconds instead of the tens that
unboxing a dozen arrays takes, and indexing has no wrap-around check in the way of the vectorizer.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from llvmlite.ir.instructions import Instruction
from numba.core import cgutils, types
from numba.core.extending import intrinsic

WIDTH = 1024
"""Elements of a strip, over which an inner loop runs: six float32 arrays of this length (24 KiB)
fit into a first-level cache of 32 KiB."""

MAX_WIDTH = 2 * WIDTH
"""A channels-last row of up to this many elements is one strip; longer rows are cut at `WIDTH`."""

STAGE = 256
"""Staging buffer for non-temporal stores, in values; with 1,024, loads wait for the stores."""

LANES = 16
"""Values whose sign bits make one 16-bit word."""

LINE = 64
"""Bytes of a cache line."""

SCRATCH_GAP = 32
"""Elements between two scratch arrays: at a distance of 4,096 bytes they would share cache sets."""


@intrinsic  # type: ignore[untyped-decorator]
def pointer(typing: Any, address: Any, scalar: Any) -> Any:
    """The address, an integer, as a pointer to `scalar` (a NumPy scalar class)."""
    kind = types.CPointer(scalar.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(kind))

    return kind(address, scalar), generate


@intrinsic  # type: ignore[untyped-decorator]
def shifted(typing: Any, values: Any, count: Any) -> Any:
    """The pointer to what lies `count` values beyond."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return values(values, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def pointer_like(typing: Any, address: Any, model: Any) -> Any:
    """The address, an integer, as a pointer of the type of the pointer `model`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(model))

    return model(address, model), generate


@intrinsic  # type: ignore[untyped-decorator]
def scratch(typing: Any, scalar: Any) -> Any:
    """`MAX_WIDTH` elements of `scalar` on the stack, aligned to a cache line, uninitialized."""
    kind = types.CPointer(scalar.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = ir.ArrayType(context.get_data_type(scalar.dtype), MAX_WIDTH + SCRATCH_GAP)
        with builder.goto_entry_block():
            allocated = builder.alloca(array)
        allocated.align = LINE
        return builder.bitcast(allocated, context.get_value_type(kind))

    return kind(scalar), generate


@intrinsic  # type: ignore[untyped-decorator]
def noinline(typing: Any) -> Any:
    """Called in a function's body: LLVM compiles that function once and does not inline it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def to_boundary(typing: Any, values: Any) -> Any:
    """How many values come before the first that begins a cache line."""
    itemsize = values.dtype.bitwidth // 8

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        address = builder.ptrtoint(arguments[0], word)
        return builder.udiv(builder.and_(builder.neg(address), word(LINE - 1)), word(itemsize))

    return types.int64(values), generate


@intrinsic  # type: ignore[untyped-decorator]
def stream(typing: Any, source: Any, target: Any, index: Any) -> Any:
    """Copy LANES values from `index` on by a non-temporal store; `target` must be aligned there."""
    width = source.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, index = arguments
        kind = ir.VectorType(ir.IntType(width), LANES).as_pointer()
        v = builder.load(builder.bitcast(builder.gep(source, [index]), kind), align=width // 8)
        where = builder.bitcast(builder.gep(target, [index]), kind)
        sent = builder.store(v, where, align=min(width // 8 * LANES, LINE))
        sent.set_metadata("nontemporal", builder.module.add_metadata([ir.IntType(32)(1)]))
        return context.get_dummy_value()

    return types.void(source, target, index), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typing: Any, args: Any, slot: Any) -> Any:
    """Return the integer in a slot and add one to it, atomically: the index of the next chunk."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = ir.Constant(ir.IntType(64), 1)
        address = builder.gep(arguments[0], [arguments[1]])
        return builder.atomic_rmw("add", address, one, "seq_cst")

    return types.int64(args, slot), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_atomic(typing: Any, args: Any, slot: Any) -> Any:
    """The integer in a slot, loaded atomically: other threads write it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address = builder.gep(arguments[0], [arguments[1]])
        return builder.load_atomic(address, "seq_cst", 8)

    return types.int64(args, slot), generate


@intrinsic  # type: ignore[untyped-decorator]
def pause(typing: Any) -> Any:
    """The processor's hint for a spinning thread; nothing on other processors than x86."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if on_x86:
            kind = ir.FunctionType(ir.VoidType(), [])
            name = "llvm.x86.sse2.pause"
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic  # type: ignore[untyped-decorator]
def call_sched_yield(typing: Any, address: Any) -> Any:
    """Call the system's sched_yield, which lies at `address`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [])
        return context.get_dummy_value()

    return types.void(address), generate


@intrinsic  # type: ignore[untyped-decorator]
def like(typing: Any, value: Any, model: Any) -> Any:
    """`value` in the type of `model`, so that a literal does not widen float32 to float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], value, model)

    return model(value, model), generate


BFLOAT16, FLOAT16 = types.uint16, types.int16
"""The types by which values in half precision are held, as their bits."""


def float32_of(builder: Any, bits: Any, stored: Any) -> Any:
    """LLVM instructions that turn half precision, held by its bits, into float32; also vectors."""
    lanes = getattr(bits.type, "count", None)

    def kind(scalar: Any) -> Any:
        return scalar if lanes is None else ir.VectorType(scalar, lanes)

    if stored == FLOAT16:
        return builder.fpext(builder.bitcast(bits, kind(ir.HalfType())), kind(ir.FloatType()))
    word = kind(ir.IntType(32))
    sixteen = ir.Constant(word, 16 if lanes is None else [16] * lanes)
    return builder.bitcast(builder.shl(builder.zext(bits, word), sixteen), kind(ir.FloatType()))


@intrinsic  # type: ignore[untyped-decorator]
def widen(typing: Any, value: Any) -> Any:
    """A loaded value as one to compute with: half precision, held by its bits, becomes float32.

    `freeze` keeps the load unconditional. Without it the compiler turns a load and a later select
    into a masked load, which does not start the hardware prefetcher on AMD's Zen 5: summing 103 MB
    then costs 1.2 copies in place of 0.7 (benchmarks/memory_traffic.py).
    """
    half = value in (BFLOAT16, FLOAT16)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        v = Instruction(builder.block, arguments[0].type, "freeze", [arguments[0]])
        builder._insert(v)
        return float32_of(builder, v, value) if half else v

    return (types.float32 if half else value)(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def narrow(typing: Any, value: Any, target: Any) -> Any:
    """The computed value as one to store at `target`: half precision's bits, rounded to nearest."""
    stored = target.dtype

    def cast(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, arguments[0], value, stored)

    def to_float16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    def to_bfloat16(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, half = ir.IntType(32), ir.IntType(16)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, word(16)), word(1))
        rounded = builder.add(bits, builder.add(odd, word(0x7FFF)))
        # Rounding up could overflow a NaN's bits into those of an infinity or a zero.
        nan = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        bits = builder.select(nan, word(0x7FC00000), rounded)
        return builder.trunc(builder.lshr(bits, word(16)), half)

    generate = {BFLOAT16: to_bfloat16, FLOAT16: to_float16}.get(stored, cast)
    return stored(value, target), generate


@intrinsic  # type: ignore[untyped-decorator]
def as_float(typing: Any, bits: Any) -> Any:
    """The float64 whose bits the integer holds."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.DoubleType())

    return types.float64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits(typing: Any, value: Any) -> Any:
    """The bits of a float32 as an int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def from_bits(typing: Any, pattern: Any) -> Any:
    """The float32 with these 32 bits; of a longer integer, its lowest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = ir.IntType(32)
        low = arguments[0] if pattern.bitwidth == 32 else builder.trunc(arguments[0], word)
        return builder.bitcast(low, ir.FloatType())

    return types.float32(pattern), generate
