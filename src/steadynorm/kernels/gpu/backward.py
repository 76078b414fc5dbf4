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
def before_activation(grad, x, extra, signs, mask, offsets, all_rows, columns, in_bounds, within,
                      center, scale, shift, row_block, block, part, group, vectors, row_blocks,
                      column_splits, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
                      VEC: tl.constexpr, LAST: tl.constexpr, FOUR: tl.constexpr,
                      ACT: tl.constexpr, KEPT: tl.constexpr, EVICT: tl.constexpr):  # fmt: skip
    """The gradient at z, and x - center; 0 at padding that is not finite (reference/padding.py).

    KEPT, what its derivative is taken from: "signs"; "output", which is `extra`; "rebuilt", from x,
    and from the residual `extra` where there is one; None for no activation.
    """
    g = tl.load(grad + offsets, mask=in_bounds, other=0.0, eviction_policy=EVICT).to(tl.float32)
    values = tl.load(x + offsets, mask=in_bounds, other=0.0, eviction_policy=EVICT).to(tl.float32)
    centered = values - center[None, :]
    if mask is not None:
        counts = valid_at(mask, all_rows, columns, in_bounds, within, vectors, VEC, LAST)
        finite = values - values == 0.0
    if KEPT == "signs":
        sign_places = bits_at(
            signs, row_block, block, tl.num_programs(0), part, group, row_blocks, column_splits,
            TILE_ROWS, TILE_COLUMNS, FOUR,
        )  # fmt: skip
        g = tl.where(spread_bits(tl.load(sign_places), TILE_ROWS, TILE_COLUMNS, FOUR), g, 0.0)
    if KEPT == "output":
        y = tl.load(extra + offsets, mask=in_bounds, other=0.0, eviction_policy=EVICT)
        y = y.to(tl.float32)
        if mask is not None:
            finite = finite & (y - y == 0.0)
        g = tl.where(in_bounds, through(g, y, ACT), 0.0)
    if KEPT == "rebuilt":
        z = tl.fma(centered, scale[None, :], shift[None, :])
        if extra is not None:
            added = tl.load(extra + offsets, mask=in_bounds, other=0.0, eviction_policy=EVICT)
            z += added.to(tl.float32)
            if mask is not None:
                finite = finite & (added - added == 0.0)
        g = tl.where(in_bounds, through(g, z, ACT), 0.0)  # z there may be infinite
    if mask is not None:
        g = tl.where(counts | finite, g, 0.0)
        centered = tl.where(counts | finite, centered, 0.0)
    return g, centered


@triton.jit(do_not_specialize_on_alignment=["signs"])
def reduce_grad(grad, x, extra, signs, mask, starts, partials, tickets, rows, sums, maps, dweight,
                dbias, before, state, rate, N, C, vectors, row_splits, column_splits, row_blocks,
                TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
                VEC: tl.constexpr, LAST: tl.constexpr, BIG: tl.constexpr, FOUR: tl.constexpr,
                UNROLL: tl.constexpr, PARTS_AT_ONCE: tl.constexpr, ACT: tl.constexpr,
                KEPT: tl.constexpr, FIRST: tl.constexpr = True):  # fmt: skip
    """Σg and Σg·(x - center) of every group, into `sums` (2, G, C) where given.

    Else the last program of a channel turns them into slope and constant of the map (`maps`, where
    given) and the gradients of weight and bias.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    own_group = tl.program_id(2)
    groups = tl.num_programs(2)
    parts = row_splits * column_splits
    begin, length = span_of(starts, N, own_group)
    c = channels_of(block, WIDTH)
    inside = c < C
    center = tl.load(row(rows, CENTER, own_group, groups, c, C), mask=inside, other=0.0)
    scale = tl.load(row(rows, SCALE, own_group, groups, c, C), mask=inside, other=0.0)
    shift = tl.load(row(rows, SHIFT, own_group, groups, c, C), mask=inside, other=0.0)
    columns = columns_of(block, part, column_splits, TILE_COLUMNS, LAST)
    lane_grad = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    lane_grad_x = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for i in tl.range(
        0, turns_of(length, part, row_splits, column_splits, TILE_ROWS), loop_unroll_factor=UNROLL
    ):
        row_block = (part // column_splits) + i * row_splits
        group_rows = row_block * TILE_ROWS + tl.arange(0, TILE_ROWS)
        offsets, all_rows, in_bounds = tile_at(
            begin, length, group_rows, columns, block, C, vectors, VEC, LAST, BIG
        )
        g, centered = before_activation(
            grad, x, extra, signs, mask, offsets, all_rows, columns, in_bounds, group_rows < length,
            center, scale, shift, row_block, block, part, own_group, vectors, row_blocks,
            column_splits, TILE_ROWS, TILE_COLUMNS, VEC, LAST, FOUR, ACT, KEPT, "",
        )  # fmt: skip
        lane_grad += g
        lane_grad_x = tl.fma(g, centered, lane_grad_x)
    out = partials + (own_group * parts + part) * C + c
    AXIS: tl.constexpr = 0 if LAST else None
    tl.store(out, tl.sum(lane_grad, AXIS) + tl.zeros((WIDTH,), tl.float32), mask=inside)
    tl.store(
        out + groups * parts * C, tl.sum(lane_grad_x, AXIS) + tl.zeros((WIDTH,), tl.float32),
        mask=inside,
    )  # fmt: skip
    if comes_last(tickets + block, parts * groups - 1):
        by_weight = tl.zeros((WIDTH,), tl.float32)
        by_bias = tl.zeros((WIDTH,), tl.float32)
        for group in tl.range(0, groups):
            if sums is None:
                facts = gradient_facts(rows, group, groups, c, inside, C)
            sum_grad, sum_grad_x = gather_sums(
                partials, group, groups, parts, c, C, PARTS_AT_ONCE, WIDTH
            )
            if sums is not None:
                tl.store(sums + group * C + c, sum_grad, mask=inside)
                tl.store(sums + (groups + group) * C + c, sum_grad_x, mask=inside)
            else:
                group_dweight, group_dbias, slope, constant = finish_gradient(
                    sum_grad, sum_grad_x, facts, maps, before, state, rate, group, groups, c,
                    inside, C, FIRST,
                )  # fmt: skip
                by_weight += group_dweight
                by_bias += group_dbias
        if dweight is not None:
            tl.store(dweight + c, by_weight.to(dweight.dtype.element_ty), mask=inside)
        if dbias is not None:
            tl.store(dbias + c, by_bias.to(dbias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["signs"])
def apply_grad(grad, x, extra, signs, mask, dx, dresidual, starts, rows, maps, N, C, vectors,
               row_splits, column_splits, row_blocks, TILE_ROWS: tl.constexpr,
               TILE_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr,
               LAST: tl.constexpr, BIG: tl.constexpr, FOUR: tl.constexpr, ACT: tl.constexpr,
               KEPT: tl.constexpr):  # fmt: skip
    """`dx = scale·g + [valid]·(slope·(x - center) + constant)`, and g itself where wanted.

    Without `maps` no gradient flows through the statistics. Backwards, as `apply` goes.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = row_splits * column_splits - 1 - tl.program_id(1)
    groups = tl.num_programs(2)
    group = groups - 1 - tl.program_id(2)
    begin, length = span_of(starts, N, group)
    c = channels_of(block, WIDTH)
    inside = c < C
    center = tl.load(row(rows, CENTER, group, groups, c, C), mask=inside, other=0.0)
    scale = tl.load(row(rows, SCALE, group, groups, c, C), mask=inside, other=0.0)
    shift = tl.load(row(rows, SHIFT, group, groups, c, C), mask=inside, other=0.0)
    if maps is not None:
        slope = tl.load(maps + group * C + c, mask=inside, other=0.0)[None, :]
        constant = tl.load(maps + (groups + group) * C + c, mask=inside, other=0.0)[None, :]
    columns = columns_of(block, part, column_splits, TILE_COLUMNS, LAST)
    turns = turns_of(length, part, row_splits, column_splits, TILE_ROWS)
    for i in tl.range(0, turns):
        row_block = (part // column_splits) + (turns - 1 - i) * row_splits
        group_rows = row_block * TILE_ROWS + tl.arange(0, TILE_ROWS)
        offsets, all_rows, in_bounds = tile_at(
            begin, length, group_rows, columns, block, C, vectors, VEC, LAST, BIG
        )
        g, centered = before_activation(
            grad, x, extra, signs, mask, offsets, all_rows, columns, in_bounds, group_rows < length,
            center, scale, shift, row_block, block, part, group, vectors, row_blocks,
            column_splits, TILE_ROWS, TILE_COLUMNS, VEC, LAST, FOUR, ACT, KEPT, "evict_first",
        )  # fmt: skip
        if dresidual is not None:
            tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=in_bounds)
        if dx is not None:
            if maps is not None:
                flowing = tl.fma(centered, slope, constant)
                if mask is not None:
                    valid = valid_at(
                        mask, all_rows, columns, in_bounds, group_rows < length, vectors, VEC, LAST
                    )
                    flowing = tl.where(valid, flowing, 0.0)
                g = tl.fma(scale[None, :], g, flowing)
            else:
                g = scale[None, :] * g
            tl.store(dx + offsets, g.to(dx.dtype.element_ty), mask=in_bounds)
