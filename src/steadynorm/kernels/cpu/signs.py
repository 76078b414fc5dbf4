"""Signs: one bit for each output, which tell a backward where the activation was open.

A ReLU's gradient needs of its output only whether it is above 0. Where z cannot be rebuilt from x,
for a residual was added, the forward writes these bits and the backward reads them instead of the
output: 1 of 32 bits. The values of a strip or plane (see cpu_loops.py) begin with a new word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import types
from numba.core.extending import intrinsic
from torch import Tensor

from .activations import CODES, RELU, RELU6, by_activation
from .loops import called
from .pointers import LANES, apart, like, widen
from .slabs import Groups, slabs

GATES = frozenset({RELU, RELU6})
"""Those that let a gradient through or not: one bit of each output says all."""


def signs_for(
    x: Tensor, residual: Tensor | None, activation: str | None, groups: Groups = None
) -> Tensor | None:
    """Where a forward may leave one bit for each output, if the backward can do with these.

    So it can if the activation lets a gradient through or not, and z cannot be rebuilt from x. It
    then reads these bits, and not the output, which is 32 times as much.
    """
    if residual is None or CODES[activation] not in GATES:
        return None
    return torch.empty(sum(slab.words for slab in slabs(x, groups)), dtype=torch.int16)


def outputs_for(signs: Tensor, x: Tensor, groups: Groups = None) -> Tensor:
    """1 where the signs let a gradient through, else 0: as good as y to the activation's gradient.

    For the rare case that plain PyTorch operations need it; laid out as x is.
    """
    flat = torch.empty(x.numel(), dtype=x.dtype)
    bits = np.unpackbits(signs.numpy().view(np.uint8), bitorder="little").reshape(-1, LANES)
    done = 0
    for slab in slabs(x, groups):
        block, blocks, together, *_ = slab.plan
        width = together * block * slab.length
        strips = -(-slab.rows // together)
        mine, bits = bits[: slab.words], bits[slab.words :]
        values = mine.reshape(strips, blocks, -1)[..., :width].reshape(strips * together, -1)
        values = values[: slab.rows, : slab.channels * slab.length]
        flat[done : done + values.size] = torch.from_numpy(values.reshape(-1).copy())
        done += values.size
    return torch.empty_like(x).set_(flat.untyped_storage(), 0, x.shape, x.stride())


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def signs(typing: Any, values: Any, place: Any, below: Any) -> Any:
    """A word that tells of LANES values from `place` on which lie above 0, and below 6 if asked to.

    NaN counts as such: whatever is not surely closed is open.
    """
    stored = values.dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.VectorType(context.get_data_type(stored), LANES)
        v = _load(builder, arguments[0], arguments[1], kind)
        if stored == types.uint16:  # bfloat16
            wide = ir.VectorType(ir.IntType(32), LANES)
            sixteen = ir.Constant(wide, [16] * LANES)
            real = ir.VectorType(ir.FloatType(), LANES)
            v = builder.bitcast(builder.shl(builder.zext(v, wide), sixteen), real)
        bound = {edge: ir.Constant(v.type, [edge] * LANES) for edge in (0.0, 6.0)}
        open_ = builder.fcmp_unordered("ugt", v, bound[0.0])
        if below.literal_value:
            open_ = builder.and_(open_, builder.fcmp_unordered("ult", v, bound[6.0]))
        return builder.bitcast(open_, ir.IntType(LANES))

    return types.uint16(values, types.int64, below), generate


@intrinsic  # type: ignore[untyped-decorator]
def gate(typing: Any, word: Any, source: Any, target: Any, place: Any) -> Any:
    """Copy LANES values from `place` on, or 0 where the word's bit is 0."""
    stored = source.dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = ir.IntType({types.float32: 32, types.float64: 64, types.uint16: 16}[stored])
        kind = ir.VectorType(bits, LANES)
        word, source, target, place = arguments
        v = _load(builder, source, place, kind)
        # By shifts: of a selection the compiler would make a load of some values (see `widen`).
        word = word if bits.width == LANES else builder.zext(word, bits)
        none = ir.Constant(kind, ir.Undefined)
        first = builder.insert_element(none, word, ir.IntType(32)(0))
        everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        words = builder.shuffle_vector(first, none, everywhere)
        up = ir.Constant(kind, [bits.width - 1 - k for k in range(LANES)])
        down = ir.Constant(kind, [bits.width - 1] * LANES)
        v = builder.and_(v, builder.ashr(builder.shl(words, up), down))
        where = builder.bitcast(builder.gep(target, [place]), kind.as_pointer())
        builder.store(v, where, align=bits.width // 8)
        return context.get_dummy_value()

    return types.void(types.uint16, source, target, types.int64), generate


def _load(builder: Any, values: Any, place: Any, kind: Any) -> Any:
    """LANES values, wherever they begin."""
    where = builder.bitcast(builder.gep(values, [place]), kind.as_pointer())
    size = 8 if kind.element == ir.DoubleType() else getattr(kind.element, "width", 32) // 8
    return builder.load(where, align=size)


@by_activation(forceinline=True, error_model="numpy")
def write_signs(ACT: int) -> Any:
    """Write one bit for each of `count` outputs: whether gradient flows there."""
    below = ACT == RELU6

    def write(y: Any, count: Any, open_: Any, code: Any) -> None:
        words = count // LANES
        for k in range(words):
            open_[k] = signs(y, k * LANES, below)
        word = 0
        for i in range(words * LANES, count):
            v = widen(y[i])
            closed = v <= like(0.0, v) or (below and v >= like(6.0, v))
            word |= (0 if closed else 1) << (i - words * LANES)
        if count > words * LANES:
            open_[words] = word

    return write


@called  # type: ignore[untyped-decorator]
def through_gates(grad: Any, count: Any, open_: Any, target: Any) -> None:
    """Copy `count` gradients, 0 for those that do not flow."""
    apart()
    words = count // LANES
    for k in range(words):
        gate(open_[k], grad, target, k * LANES)
    word = open_[words] if count > words * LANES else 0
    for i in range(words * LANES, count):
        flows = (word >> (i - words * LANES)) & 1
        g = grad[i]
        target[i] = g if flows else like(0, g)
