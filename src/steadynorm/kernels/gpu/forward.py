"""The two forward kernels: `moments`, whose last program decides what normalizes, and `apply`."""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activated, through
from .lanes import counted, gather, lane_moments, lane_step, merge
from .policies import (
    CENTER,
    COUNT,
    NEXT_MEAN,
    NEXT_VAR,
    SCALE,
    SEEN,
    SHIFT,
    affine,
    batches_seen,
    coefficients,
    decide,
    row,
    running_before,
    store_moments,
    store_normalizer,
)
from .tiles import (
    bits_at,
    channels_of,
    columns_of,
    comes_last,
    pack_bits,
    span_of,
    tile_at,
    to_channels,
    turns_of,
    valid_at,
)


@triton.jit
def masked_lanes(x, mask, begin, length, columns, block, part, C, vectors, row_splits,
                 column_splits, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
                 VEC: tl.constexpr, LAST: tl.constexpr, BIG: tl.constexpr,
                 WELFORD: tl.constexpr):  # fmt: skip
    """Count of each lane over the places that the mask leaves valid, as `lanes` returns them."""
    first = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    mean = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    m2 = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    count = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    for i in tl.range(0, turns_of(length, part, row_splits, column_splits, TILE_ROWS)):
        row_block = (part // column_splits) + i * row_splits
        group_rows = row_block * TILE_ROWS + tl.arange(0, TILE_ROWS)
        offsets, all_rows, in_bounds = tile_at(
            begin, length, group_rows, columns, block, C, vectors, VEC, LAST, BIG
        )
        values = tl.load(x + offsets, mask=in_bounds, other=0.0).to(tl.float32)
        valid = valid_at(
            mask, all_rows, columns, in_bounds, group_rows < length, vectors, VEC, LAST
        )
        first = tl.where(valid & (count == 0.0), values, first)
        count += valid.to(tl.float32)
        inverse = tl.div_rn(1.0, tl.maximum(count, 1.0))
        mean, m2 = lane_step(values, valid, first, mean, m2, inverse, True, WELFORD)
    n, many = counted(count, 0 if LAST else None)
    return count, n, many, first, mean, m2


@triton.jit
def lanes(x, begin, length, columns, block, part, C, vectors, row_splits, column_splits,
          TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, VEC: tl.constexpr,
          LAST: tl.constexpr, BIG: tl.constexpr, WELFORD: tl.constexpr,
          UNROLL: tl.constexpr):  # fmt: skip
    """Count of each lane, what `counted` says of all, pivot and sums of each.

    Lanes beyond the tensor see zeros all along and count for nothing; only in the last turn can a
    lane run out of values that had some.
    """
    first = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    mean = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    m2 = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    done = tl.full((), 1.0, tl.float32)  # a tensor: the interpreter's range yields Python's ints
    turns = turns_of(length, part, row_splits, column_splits, TILE_ROWS)
    group_rows = (part // column_splits) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    if turns > 0:
        offsets, all_rows, in_bounds = tile_at(
            begin, length, group_rows, columns, block, C, vectors, VEC, LAST, BIG
        )
        first = tl.load(x + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    for i in tl.range(1, turns - 1, loop_unroll_factor=UNROLL):
        offsets, all_rows, in_bounds = tile_at(
            begin, length, group_rows + i * row_splits * TILE_ROWS, columns, block, C, vectors, VEC,
            LAST, BIG,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=in_bounds, other=0.0).to(tl.float32)
        done += 1.0
        mean, m2 = lane_step(
            values, in_bounds, first, mean, m2, tl.div_rn(1.0, done), False, WELFORD
        )
    if turns > 1:
        offsets, all_rows, in_bounds = tile_at(
            begin, length, group_rows + (turns - 1) * row_splits * TILE_ROWS, columns, block, C,
            vectors, VEC, LAST, BIG,
        )  # fmt: skip
        values = tl.load(x + offsets, mask=in_bounds, other=0.0).to(tl.float32)
        mean, m2 = lane_step(
            values, in_bounds, first, mean, m2, tl.div_rn(1.0, done + 1.0), True, WELFORD
        )
    by_row = tl.maximum(tl.cdiv(length - group_rows, row_splits * TILE_ROWS), 0).to(tl.float32)
    count = by_row[:, None] * (columns < vectors * VEC).to(tl.float32)[None, :]
    left = length - (part // column_splits) * TILE_ROWS
    many = tl.maximum(tl.minimum(left, TILE_ROWS), 0).to(tl.float32)
    n = (
        (turns - 1) * TILE_ROWS + tl.minimum(left - (turns - 1) * row_splits * TILE_ROWS, TILE_ROWS)
    ).to(tl.float32)
    n = tl.where(turns > 0, n, 0.0)
    if not LAST:
        beyond = vectors * VEC - (part % column_splits) * TILE_COLUMNS
        across = tl.minimum(beyond, TILE_COLUMNS).to(tl.float32)
        n, many = n * across, many * across
    return count, n, many, first, mean, m2


@triton.jit
def moments(x, mask, starts, partials, tickets, rows, weight, bias, running_mean, running_var,
            batches, eps, pace, prior, known, N, C, vectors, row_splits, column_splits,
            TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
            VEC: tl.constexpr, LAST: tl.constexpr, BIG: tl.constexpr, WELFORD: tl.constexpr,
            UNROLL: tl.constexpr, PARTS_AT_ONCE: tl.constexpr, ALONE: tl.constexpr,
            POLICY: tl.constexpr = None, FIRST: tl.constexpr = False, COUNTS: tl.constexpr = False,
            R_MAX: tl.constexpr = 1.0, D_MAX: tl.constexpr = 0.0, WARMUP: tl.constexpr = 0,
            R_RAMP: tl.constexpr = 1, D_RAMP: tl.constexpr = 1):  # fmt: skip
    """Moments of every group; the last program of a channel decides what normalizes it.

    POLICY: its lower-case name, or None to measure only. ALONE: no other program to wait for.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    own_group = tl.program_id(2)
    groups = tl.num_programs(2)
    parts = row_splits * column_splits
    AXIS: tl.constexpr = 0 if LAST else None
    begin, length = span_of(starts, N, own_group)
    columns = columns_of(block, part, column_splits, TILE_COLUMNS, LAST)
    c = channels_of(block, WIDTH)
    inside = c < C
    # Loaded before the loop, which hides their latency; only the last program needs them.
    old_mean, old_var, seen = running_before(
        running_mean, running_var, batches, c, inside, WIDTH, POLICY, COUNTS or FIRST
    )
    gamma, beta = affine(weight, bias, c, inside, WIDTH)
    if mask is not None:
        count, n, many, first, mean, m2 = masked_lanes(
            x, mask, begin, length, columns, block, part, C, vectors, row_splits, column_splits,
            TILE_ROWS, TILE_COLUMNS, VEC, LAST, BIG, WELFORD,
        )  # fmt: skip
    else:
        count, n, many, first, mean, m2 = lanes(
            x, begin, length, columns, block, part, C, vectors, row_splits, column_splits,
            TILE_ROWS, TILE_COLUMNS, VEC, LAST, BIG, WELFORD, UNROLL,
        )  # fmt: skip
    mean, m2 = lane_moments(count, mean, m2, WELFORD)
    n, many = n + tl.zeros((WIDTH,), tl.float32), many + tl.zeros((WIDTH,), tl.float32)
    pivot, middle, total = merge(count, n, many, first, mean, m2, AXIS)
    pivot = to_channels(pivot, LAST)
    middle, total = to_channels(middle, LAST), to_channels(total, LAST)
    last = True
    if not ALONE:
        places = partials + (own_group * parts + part) * C + c
        tl.store(places, n, mask=inside)
        tl.store(places + groups * parts * C, pivot, mask=inside)
        tl.store(places + 2 * groups * parts * C, middle, mask=inside)
        tl.store(places + 3 * groups * parts * C, total, mask=inside)
        last = comes_last(tickets + block, parts * groups - 1)
    if last:
        if running_mean is not None and POLICY is not None:
            seen = batches_seen(seen, running_mean, running_var, C, COUNTS)
            tl.store(row(rows, SEEN, 0, groups, c, C), seen, mask=inside)
        for group in tl.range(0, groups):
            if not ALONE:
                n, pivot, middle, total = gather(
                    partials, group, groups, parts, c, C, PARTS_AT_ONCE, WIDTH
                )
            old_mean, old_var, seen, center, scale, shift = decide(
                n, pivot, middle, total, rows, group, groups, c, inside, C, gamma, beta, old_mean,
                old_var, seen, eps, pace, prior, known, POLICY, FIRST, running_mean is not None,
                R_MAX, D_MAX, WARMUP, R_RAMP, D_RAMP,
            )  # fmt: skip
        if running_mean is not None and POLICY is not None:
            tl.store(row(rows, NEXT_MEAN, 0, groups, c, C), old_mean, mask=inside)
            tl.store(row(rows, NEXT_VAR, 0, groups, c, C), old_var, mask=inside)


@triton.jit
def move_running(rows, running_mean, running_var, batches, first, groups, c, inside, C):
    """The running statistics as they were decided, and how many batches they have seen.

    `first`: whether the channels begin with the first, whose program counts. A count of 0 that was
    read as "many" goes on from there. .cg as in `gather`.
    """
    mean = tl.load(row(rows, NEXT_MEAN, 0, groups, c, C), mask=inside, cache_modifier=".cg")
    var = tl.load(row(rows, NEXT_VAR, 0, groups, c, C), mask=inside, cache_modifier=".cg")
    tl.store(running_mean + c, mean, mask=inside)
    tl.store(running_var + c, var, mask=inside)
    if batches is not None:
        if first:
            seen = tl.load(batches)
            if seen == 0:
                before = tl.load(row(rows, SEEN, 0, groups, 0, C), cache_modifier=".cg")
                seen = before.to(tl.int64)
            for group in tl.range(0, groups):
                count = tl.load(row(rows, COUNT, group, groups, 0, C), cache_modifier=".cg")
                seen += (count > 0.0).to(tl.int64)
            tl.store(batches, seen)


@triton.jit
def by_running(rows, weight, bias, running_mean, running_var, eps, group, groups, c, inside, C,
               keep, WIDTH: tl.constexpr):  # fmt: skip
    """center, scale and shift of the running statistics.

    `rows`, where a backward may follow, keeps them: written by the programs that are to `keep`.
    """
    center = tl.load(running_mean + c, mask=inside, other=0.0)
    spread = tl.load(running_var + c, mask=inside, other=1.0)
    gamma, beta = affine(weight, bias, c, inside, WIDTH)
    zero = tl.zeros_like(center)
    one = zero + 1.0
    if rows is not None:
        store_moments(rows, group, groups, c, inside & keep, C, zero, zero, zero, zero)
        scale, shift = store_normalizer(
            rows, group, groups, c, inside & keep, C, gamma, beta, eps, center, zero, spread, one,
            zero, zero,
        )  # fmt: skip
    else:
        scale, shift, rho = coefficients(zero, spread, one, zero, gamma, beta, eps)
    return center, scale, shift


@triton.jit(do_not_specialize_on_alignment=["signs"])  # else bytes are stored in pairs
def apply(x, residual, y, signs, starts, rows, weight, bias, running_mean, running_var, batches,
          eps, N, C, vectors, row_splits, column_splits, row_blocks, TILE_ROWS: tl.constexpr,
          TILE_COLUMNS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr,
          BIG: tl.constexpr, FOUR: tl.constexpr, ACT: tl.constexpr,
          FIXED: tl.constexpr = False):  # fmt: skip
    """`activation((x - center)·scale + shift + residual)`, and the sign bits.

    By `rows` as `moments` left them; then the running statistics, if given, move. FIXED: by the
    running statistics, which stay. Programs and tiles go backwards, to meet what the cache still
    holds of the reduction.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = row_splits * column_splits - 1 - tl.program_id(1)
    groups = tl.num_programs(2)
    group = groups - 1 - tl.program_id(2)
    begin, length = span_of(starts, N, group)
    c = channels_of(block, WIDTH)
    inside = c < C
    if FIXED:
        center, scale, shift = by_running(
            rows, weight, bias, running_mean, running_var, eps, group, groups, c, inside, C,
            part == 0, WIDTH,
        )  # fmt: skip
    else:
        center = tl.load(row(rows, CENTER, group, groups, c, C), mask=inside, other=0.0)
        scale = tl.load(row(rows, SCALE, group, groups, c, C), mask=inside, other=0.0)
        shift = tl.load(row(rows, SHIFT, group, groups, c, C), mask=inside, other=0.0)
        if running_mean is not None:
            if part == 0 and group == 0:
                move_running(
                    rows, running_mean, running_var, batches, block == 0, groups, c, inside, C
                )
    columns = columns_of(block, part, column_splits, TILE_COLUMNS, LAST)
    turns = turns_of(length, part, row_splits, column_splits, TILE_ROWS)
    for i in tl.range(0, turns):
        row_block = (part // column_splits) + (turns - 1 - i) * row_splits
        group_rows = row_block * TILE_ROWS + tl.arange(0, TILE_ROWS)
        offsets, all_rows, in_bounds = tile_at(
            begin, length, group_rows, columns, block, C, vectors, VEC, LAST, BIG
        )
        values = tl.load(x + offsets, mask=in_bounds, other=0.0, eviction_policy="evict_first")
        values = values.to(tl.float32)
        z = tl.fma(values - center[None, :], scale[None, :], shift[None, :])
        if residual is not None:
            extra = tl.load(
                residual + offsets, mask=in_bounds, other=0.0, eviction_policy="evict_first"
            )
            z += extra.to(tl.float32)
        z = activated(z, ACT)
        tl.store(y + offsets, z.to(y.dtype.element_ty), mask=in_bounds)
        if signs is not None:
            open_ = through(tl.full((TILE_ROWS, TILE_COLUMNS), 1.0, tl.float32), z, ACT) != 0.0
            sign_places = bits_at(
                signs, row_block, block, tl.num_programs(0), part, group, row_blocks, column_splits,
                TILE_ROWS, TILE_COLUMNS, FOUR,
            )  # fmt: skip
            tl.store(sign_places, pack_bits(open_, TILE_ROWS, TILE_COLUMNS, FOUR))
