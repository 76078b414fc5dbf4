"""Sign bits: one for each output, which tell a backward where the activation passes gradient.

A ReLU's gradient needs of its output only whether it is above 0. Where a residual was added, z
cannot be rebuilt from x alone; the forward then writes these bits, and the backward reads them
instead of the output, a 32nd of its size. Each strip or plane (see loops.py) begins a new word.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic
from torch import Tensor

from steadynorm.kernels.activations import ACTIVATIONS
from steadynorm.kernels.reference import Groups

from .activations import CODES, NAMES, by_activation
from .loops import called
from .pointers import BFLOAT16, FLOAT16, LANES, float32_of, like, noinline, widen
from .slabs import slabs

GATES = frozenset(CODES[name] for name, row in ACTIVATIONS.items() if row.gate is not None)
"""Activations whose derivative is 0 or 1, so that one bit for each output is enough."""


def gate_of(code: int) -> tuple[float, float]:
    """Between which outputs the activation of this code lets a gradient through."""
    row = ACTIVATIONS.get(NAMES[code] or "")
    return (-math.inf, math.inf) if row is None or row.gate is None else row.gate


def empty_signs(x: Tensor, groups: Groups = None) -> Tensor:
    """Uninitialized memory for one bit for each output."""
    words = sum(slab.words for slab in slabs(x, groups))
    return torch.empty(words, dtype=torch.int16, device="cpu")


def outputs_for(signs: Tensor, x: Tensor, groups: Groups = None) -> Tensor:
    """1 where the sign bit is set, else 0: from it the activation's gradient is that from y.

    For derivatives of the backward, which run in plain PyTorch operations; laid out as x is.
    """
    flat = torch.empty(x.numel(), dtype=x.dtype, device="cpu")
    bits = np.unpackbits(signs.numpy().view(np.uint8), bitorder="little").reshape(-1, LANES)
    done = 0
    for slab in slabs(x, groups):
        runs, size = slab.runs
        mine, bits = bits[: slab.words], bits[slab.words :]
        rows = -(-slab.rows // slab.cut.rows_per_strip) * slab.cut.rows_per_strip
        values = mine.reshape(runs, -1)[:, :size].reshape(rows, -1)
        values = values[: slab.rows, : slab.channels * slab.length]
        flat[done : done + values.size] = torch.from_numpy(values.reshape(-1).copy())
        done += values.size
    return torch.empty_like(x).set_(flat.untyped_storage(), 0, x.shape, x.stride())


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def sign_word(typing: Any, values: Any, index: Any, code: Any) -> Any:
    """A word that tells which of LANES values from `index` on lie inside the activation's gate.

    NaN counts as inside: its gradient must not become 0.
    """
    stored = values.dtype
    low, high = gate_of(code.literal_value)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(context.get_data_type(stored), LANES)
        v = _load(builder, arguments[0], arguments[1], kind)
        if stored in (BFLOAT16, FLOAT16):
            v = float32_of(builder, v, stored)
        inside = builder.fcmp_unordered("ugt", v, ir.Constant(v.type, [low] * LANES))
        if high < math.inf:
            below = builder.fcmp_unordered("ult", v, ir.Constant(v.type, [high] * LANES))
            inside = builder.and_(inside, below)
        return builder.bitcast(inside, ir.IntType(LANES))

    return types.uint16(values, types.int64, code), generate


@intrinsic  # type: ignore[untyped-decorator]
def gate(typing: Any, word: Any, source: Any, target: Any, index: Any) -> Any:
    """Copy LANES values from `index` on, or 0 where the word's bit is 0."""
    stored = source.dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = ir.IntType(stored.bitwidth)
        kind = ir.VectorType(bits, LANES)
        word, source, target, index = arguments
        v = _load(builder, source, index, kind)
        # By shifts: the compiler would turn a select into a masked load (see `widen`).
        word = word if bits.width == LANES else builder.zext(word, bits)
        none = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(none, word, ir.IntType(32)(0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        words = builder.shuffle_vector(first, none, everywhere)
        up = ir.Constant(kind, [bits.width - 1 - k for k in range(LANES)])
        down = ir.Constant(kind, [bits.width - 1] * LANES)
        v = builder.and_(v, builder.ashr(builder.shl(words, up), down))
        where = builder.bitcast(builder.gep(target, [index]), kind.as_pointer())
        builder.store(v, where, align=bits.width // 8)
        return context.get_dummy_value()

    return types.void(types.uint16, source, target, types.int64), generate


def _load(builder: Any, values: Any, index: Any, kind: Any) -> Any:
    """LANES values from `index` on, at any alignment."""
    where = builder.bitcast(builder.gep(values, [index]), kind.as_pointer())
    size = 8 if kind.element == ir.DoubleType() else getattr(kind.element, "width", 32) // 8
    return builder.load(where, align=size)


@by_activation(forceinline=True, error_model="numpy")
def write_signs(ACT: int) -> Any:
    """Write one bit for each of `count` outputs: whether gradient flows there."""
    low, high = gate_of(ACT)
    bounded = high < math.inf

    def write(y: Any, count: Any, signs: Any, code: Any) -> None:
        words = count // LANES
        for k in range(words):
            signs[k] = sign_word(y, k * LANES, ACT)
        word = 0
        for i in range(words * LANES, count):
            v = widen(y[i])
            closed = v <= like(low, v) or (bounded and v >= like(high, v))
            word |= (0 if closed else 1) << (i - words * LANES)
        if count > words * LANES:
            signs[words] = word

    return write


@called  # type: ignore[untyped-decorator]
def through_gates(grad: Any, count: Any, signs: Any, target: Any) -> None:
    """Copy `count` gradients, 0 where the sign bit is 0."""
    noinline()
    words = count // LANES
    for k in range(words):
        gate(signs[k], grad, target, k * LANES)
    word = signs[words] if count > words * LANES else 0
    for i in range(words * LANES, count):
        flows = (word >> (i - words * LANES)) & 1
        g = grad[i]
        target[i] = g if flows else like(0, g)
