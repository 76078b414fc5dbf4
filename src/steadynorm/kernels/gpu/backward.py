"""The backward kernels: `reduce_grad`, whose last program finishes the sums, `apply_grad`."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import through
from .lanes import gather_sums
from .policies import CENTER, SCALE, SHIFT, finish_gradient, gradient_facts, row
from .tiles import (
    bits_at,
    channels_of,
    columns_of,
    comes_last,
    span_of,
    spread_bits,
    tile_at,
    turns_of,
    valid_at,
)


@triton.jit
def before_activation(grad, x, extra, signs, at, ok, center, scale, shift, row_block, block, part,
                      g, RB, SQ, A: tl.constexpr, B: tl.constexpr, FOUR: tl.constexpr,
                      ACT: tl.constexpr, KEPT: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """The gradient at z, and x - center.

    KEPT, what its derivative is taken from: "signs"; "output", which is `extra`; "rebuilt", from x,
    and from the residual `extra` where there is one; None for no activation.
    """
    d = tl.load(grad + at, mask=ok, other=0.0, eviction_policy=EVICT).to(tl.float32)
    v = tl.load(x + at, mask=ok, other=0.0, eviction_policy=EVICT).to(tl.float32)
    centered = v - center[None, :]
    if KEPT == "signs":
        to = bits_at(signs, row_block, block, tl.num_programs(0), part, g, RB, SQ, A, B, FOUR)
        d = tl.where(spread_bits(tl.load(to), A, B, FOUR), d, 0.0)
    if KEPT == "output":
        y = tl.load(extra + at, mask=ok, other=0.0, eviction_policy=EVICT).to(tl.float32)
        d = tl.where(ok, through(d, y, ACT), 0.0)
    if KEPT == "rebuilt":
        z = tl.fma(centered, scale[None, :], shift[None, :])
        if extra is not None:
            added = tl.load(extra + at, mask=ok, other=0.0, eviction_policy=EVICT)
            z += added.to(tl.float32)
        d = tl.where(ok, through(d, z, ACT), 0.0)  # z there may be infinite
    return d, centered


@triton.jit(do_not_specialize_on_alignment=["signs"])
def reduce_grad(grad, x, extra, signs, starts, parts, tickets, rows, sums, maps, dweight, dbias,
                before, state, rate, N, C, LV, SR, SQ, RB, A: tl.constexpr, B: tl.constexpr,
                WIDTH: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr, BIG: tl.constexpr,
                FOUR: tl.constexpr, UNROLL: tl.constexpr, SP: tl.constexpr, ACT: tl.constexpr,
                KEPT: tl.constexpr, FIRST: tl.constexpr = True):  # fmt: skip
    """Σg and Σg·(x - center) of every group, into `sums` (2, G, C) where given.

    Else the last program of a channel turns them into slope and constant of the map (`maps`, where
    given) and the gradients of weight and bias.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    group = tl.program_id(2)
    G = tl.num_programs(2)
    S = SR * SQ
    begin, length = span_of(starts, N, group)
    c = channels_of(block, WIDTH)
    inside = c < C
    center = tl.load(row(rows, CENTER, group, G, c, C), mask=inside, other=0.0)
    scale = tl.load(row(rows, SCALE, group, G, c, C), mask=inside, other=0.0)
    shift = tl.load(row(rows, SHIFT, group, G, c, C), mask=inside, other=0.0)
    columns = columns_of(block, part, SQ, B, LAST)
    total = tl.zeros((A, B), tl.float32)
    moved = tl.zeros((A, B), tl.float32)
    for i in tl.range(0, turns_of(length, part, SR, SQ, A), loop_unroll_factor=UNROLL):
        row_block = (part // SQ) + i * SR
        r = row_block * A + tl.arange(0, A)
        at, n, ok = tile_at(begin, length, r, columns, block, C, LV, VEC, LAST, BIG)
        d, centered = before_activation(
            grad, x, extra, signs, at, ok, center, scale, shift, row_block, block, part, group, RB,
            SQ, A, B, FOUR, ACT, KEPT, "",
        )  # fmt: skip
        total += d
        moved = tl.fma(d, centered, moved)
    out = parts + (group * S + part) * C + c
    AXIS: tl.constexpr = 0 if LAST else None
    tl.store(out, tl.sum(total, AXIS) + tl.zeros((WIDTH,), tl.float32), mask=inside)
    tl.store(out + G * S * C, tl.sum(moved, AXIS) + tl.zeros((WIDTH,), tl.float32), mask=inside)
    if comes_last(tickets + block, S * G - 1):
        by_weight = tl.zeros((WIDTH,), tl.float32)
        by_bias = tl.zeros((WIDTH,), tl.float32)
        for g in tl.range(0, G):
            if sums is None:
                facts = gradient_facts(rows, g, G, c, inside, C)
            s1, s2 = gather_sums(parts, g, G, S, c, C, SP, WIDTH)
            if sums is not None:
                tl.store(sums + g * C + c, s1, mask=inside)
                tl.store(sums + (G + g) * C + c, s2, mask=inside)
            else:
                a, b, slope, constant = finish_gradient(
                    s1, s2, facts, maps, before, state, rate, g, G, c, inside, C, FIRST
                )
                by_weight += a
                by_bias += b
        if dweight is not None:
            tl.store(dweight + c, by_weight.to(dweight.dtype.element_ty), mask=inside)
        if dbias is not None:
            tl.store(dbias + c, by_bias.to(dbias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["signs"])
def apply_grad(grad, x, extra, signs, mask, dx, dresidual, starts, rows, maps, N, C, LV, SR, SQ, RB,
               A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr,
               LAST: tl.constexpr, BIG: tl.constexpr, FOUR: tl.constexpr, ACT: tl.constexpr,
               KEPT: tl.constexpr):  # fmt: skip
    """`dx = scale·g + [valid]·(slope·(x - center) + constant)`, and g itself where wanted.

    Without `maps` no gradient flows through the statistics. Backwards, as `apply` goes.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = SR * SQ - 1 - tl.program_id(1)
    G = tl.num_programs(2)
    g = G - 1 - tl.program_id(2)
    begin, length = span_of(starts, N, g)
    c = channels_of(block, WIDTH)
    inside = c < C
    center = tl.load(row(rows, CENTER, g, G, c, C), mask=inside, other=0.0)
    scale = tl.load(row(rows, SCALE, g, G, c, C), mask=inside, other=0.0)
    shift = tl.load(row(rows, SHIFT, g, G, c, C), mask=inside, other=0.0)
    if maps is not None:
        slope = tl.load(maps + g * C + c, mask=inside, other=0.0)[None, :]
        constant = tl.load(maps + (G + g) * C + c, mask=inside, other=0.0)[None, :]
    columns = columns_of(block, part, SQ, B, LAST)
    turns = turns_of(length, part, SR, SQ, A)
    for i in tl.range(0, turns):
        row_block = (part // SQ) + (turns - 1 - i) * SR
        r = row_block * A + tl.arange(0, A)
        at, n, ok = tile_at(begin, length, r, columns, block, C, LV, VEC, LAST, BIG)
        d, centered = before_activation(
            grad, x, extra, signs, at, ok, center, scale, shift, row_block, block, part, g, RB, SQ,
            A, B, FOUR, ACT, KEPT, "evict_first",
        )  # fmt: skip
        if dresidual is not None:
            tl.store(dresidual + at, d.to(dresidual.dtype.element_ty), mask=ok)
        if dx is not None:
            if maps is not None:
                flowing = tl.fma(centered, slope, constant)
                if mask is not None:
                    valid = valid_at(mask, n, columns, ok, r < length, LV, VEC, LAST)
                    flowing = tl.where(valid, flowing, 0.0)
                d = tl.fma(scale[None, :], d, flowing)
            else:
                d = scale[None, :] * d
            tl.store(dx + at, d.to(dx.dtype.element_ty), mask=ok)
