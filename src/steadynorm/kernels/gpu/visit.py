"""Both stages of a direction in one launch, where a channel fits into a program's registers.

One tile holds all of a channel (or, channels-last, of TILE_COLUMNS channels): x is read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activated, through
from .backward import before_activation
from .forward import move_running
from .lanes import counted, merge
from .policies import (
    CENTER,
    NEXT_MEAN,
    NEXT_VAR,
    SCALE,
    SEEN,
    SHIFT,
    affine,
    batches_seen,
    decide,
    finish_gradient,
    gradient_facts,
    row,
    running_before,
)
from .tiles import (
    bits_at,
    channels_of,
    columns_of,
    comes_last,
    pack_bits,
    tile_at,
    to_channels,
    valid_at,
)


@triton.jit(do_not_specialize_on_alignment=["signs"])
def normalize(x, residual, mask, y, signs, tickets, rows, weight, bias, running_mean, running_var,
              batches, eps, pace, prior, known, N, C, vectors, TILE_ROWS: tl.constexpr,
              TILE_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr,
              LAST: tl.constexpr, BIG: tl.constexpr, FOUR: tl.constexpr, ACT: tl.constexpr,
              POLICY: tl.constexpr, FIRST: tl.constexpr = False, COUNTS: tl.constexpr = False,
              R_MAX: tl.constexpr = 1.0, D_MAX: tl.constexpr = 0.0, WARMUP: tl.constexpr = 0,
              R_RAMP: tl.constexpr = 1, D_RAMP: tl.constexpr = 1):  # fmt: skip
    """`moments` and `apply`, and the running statistics move.

    Each program moves those of its channels, unless others may need to read them or their count
    (COUNTS, FIRST): then the last program of all moves them.
    """
    block = tl.program_id(0)
    AXIS: tl.constexpr = 0 if LAST else None
    c = channels_of(block, WIDTH)
    inside = c < C
    columns = columns_of(block, 0, 1, TILE_COLUMNS, LAST)
    group_rows = tl.arange(0, TILE_ROWS)
    offsets, all_rows, in_bounds = tile_at(
        0, N, group_rows, columns, block, C, vectors, VEC, LAST, BIG
    )
    values = tl.load(x + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    old_mean, old_var, seen = running_before(
        running_mean, running_var, batches, c, inside, WIDTH, POLICY, COUNTS or FIRST
    )
    gamma, beta = affine(weight, bias, c, inside, WIDTH)
    nothing = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    number = tl.zeros((WIDTH,), tl.float32)
    if mask is not None:
        valid = valid_at(mask, all_rows, columns, in_bounds, group_rows < N, vectors, VEC, LAST)
        count = valid.to(tl.float32)
        found, many = counted(count, AXIS)
        number, many = number + found, tl.zeros((WIDTH,), tl.float32) + many
    else:
        count = in_bounds.to(tl.float32)
        number += N * (1 if LAST else vectors * VEC)
        many = number
    pivot, middle, total = merge(count, number, many, values, nothing, nothing, AXIS)
    if running_mean is not None:
        seen = batches_seen(seen, running_mean, running_var, C, COUNTS)
    seen_before = seen
    old_mean, old_var, seen, center, scale, shift = decide(
        number, to_channels(pivot, LAST), to_channels(middle, LAST), to_channels(total, LAST), rows,
        0, 1, c, inside, C, gamma, beta, old_mean, old_var, seen, eps, pace, prior, known, POLICY,
        FIRST, running_mean is not None, R_MAX, D_MAX, WARMUP, R_RAMP, D_RAMP,
    )  # fmt: skip
    z = tl.fma(values - center[None, :], scale[None, :], shift[None, :])
    if residual is not None:
        z += tl.load(residual + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    z = activated(z, ACT)
    tl.store(y + offsets, z.to(y.dtype.element_ty), mask=in_bounds)
    if signs is not None:
        gate = through(tl.full((TILE_ROWS, TILE_COLUMNS), 1.0, tl.float32), z, ACT) != 0.0
        sign_places = bits_at(
            signs, block * 0, block, tl.num_programs(0), 0, 0, 1, 1, TILE_ROWS, TILE_COLUMNS, FOUR
        )
        tl.store(sign_places, pack_bits(gate, TILE_ROWS, TILE_COLUMNS, FOUR))
    if running_mean is not None:
        if COUNTS or FIRST:
            tl.store(row(rows, SEEN, 0, 1, c, C), seen_before, mask=inside)
            tl.store(row(rows, NEXT_MEAN, 0, 1, c, C), old_mean, mask=inside)
            tl.store(row(rows, NEXT_VAR, 0, 1, c, C), old_var, mask=inside)
            if comes_last(tickets, tl.num_programs(0) - 1):
                for k in tl.range(0, C, 1024):
                    every = k + tl.arange(0, 1024)
                    move_running(
                        rows, running_mean, running_var, batches, k == 0, 1, every, every < C, C
                    )
        else:
            tl.store(running_mean + c, old_mean, mask=inside)
            tl.store(running_var + c, old_var, mask=inside)
            if batches is not None:
                if block == 0:
                    tl.store(batches, tl.load(batches) + (tl.max(number, 0) > 0.0).to(tl.int64))


@triton.jit(do_not_specialize_on_alignment=["signs"])
def normalize_grad(grad, x, extra, signs, mask, dx, dresidual, rows, dweight, dbias, before, state,
                   rate, N, C, vectors, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
                   WIDTH: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr, BIG: tl.constexpr,
                   FOUR: tl.constexpr, ACT: tl.constexpr, KEPT: tl.constexpr,
                   FIRST: tl.constexpr = True):  # fmt: skip
    """`reduce_grad` and `apply_grad`."""
    block = tl.program_id(0)
    AXIS: tl.constexpr = 0 if LAST else None
    c = channels_of(block, WIDTH)
    inside = c < C
    center = tl.load(row(rows, CENTER, 0, 1, c, C), mask=inside, other=0.0)
    scale = tl.load(row(rows, SCALE, 0, 1, c, C), mask=inside, other=0.0)
    shift = tl.load(row(rows, SHIFT, 0, 1, c, C), mask=inside, other=0.0)
    columns = columns_of(block, 0, 1, TILE_COLUMNS, LAST)
    group_rows = tl.arange(0, TILE_ROWS)
    offsets, all_rows, in_bounds = tile_at(
        0, N, group_rows, columns, block, C, vectors, VEC, LAST, BIG
    )
    g, centered = before_activation(
        grad, x, extra, signs, mask, offsets, all_rows, columns, in_bounds, group_rows < N, center,
        scale, shift, block * 0, block, 0, 0, vectors, 1, 1, TILE_ROWS, TILE_COLUMNS, VEC, LAST,
        FOUR, ACT, KEPT, "evict_first",
    )  # fmt: skip
    facts = gradient_facts(rows, 0, 1, c, inside, C)
    sum_grad = to_channels(tl.sum(g, AXIS), LAST)
    sum_grad_x = to_channels(tl.sum(g * centered, AXIS), LAST)
    by_weight, by_bias, slope, constant = finish_gradient(
        sum_grad, sum_grad_x, facts, None, before, state, rate, 0, 1, c, inside, C, FIRST
    )
    if dweight is not None:
        tl.store(dweight + c, by_weight.to(dweight.dtype.element_ty), mask=inside)
    if dbias is not None:
        tl.store(dbias + c, by_bias.to(dbias.dtype.element_ty), mask=inside)
    if dresidual is not None:
        tl.store(dresidual + offsets, g.to(dresidual.dtype.element_ty), mask=in_bounds)
    flowing = tl.fma(centered, slope[None, :], constant[None, :])
    if mask is not None:
        valid = valid_at(mask, all_rows, columns, in_bounds, group_rows < N, vectors, VEC, LAST)
        flowing = tl.where(valid, flowing, 0.0)
    g = tl.fma(scale[None, :], g, flowing)
    tl.store(dx + offsets, g.to(dx.dtype.element_ty), mask=in_bounds)
