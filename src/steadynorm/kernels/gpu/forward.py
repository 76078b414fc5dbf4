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
def masked_lanes(x, mask, begin, length, columns, block, part, C, LV, SR, SQ, A: tl.constexpr,
                 B: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr, BIG: tl.constexpr,
                 WELFORD: tl.constexpr):  # fmt: skip
    """Count of each lane over the places that the mask leaves valid, as `lanes` returns them."""
    first = tl.zeros((A, B), tl.float32)
    s1 = tl.zeros((A, B), tl.float32)
    s2 = tl.zeros((A, B), tl.float32)
    count = tl.zeros((A, B), tl.float32)
    for i in tl.range(0, turns_of(length, part, SR, SQ, A)):
        r = ((part // SQ) + i * SR) * A + tl.arange(0, A)
        at, n, ok = tile_at(begin, length, r, columns, block, C, LV, VEC, LAST, BIG)
        v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        ok = valid_at(mask, n, columns, ok, r < length, LV, VEC, LAST)
        first = tl.where(ok & (count == 0.0), v, first)
        count += ok.to(tl.float32)
        inverse = tl.div_rn(1.0, tl.maximum(count, 1.0))
        s1, s2 = lane_step(v, ok, first, s1, s2, inverse, True, WELFORD)
    n, many = counted(count, 0 if LAST else None)
    return count, n, many, first, s1, s2


@triton.jit
def lanes(x, begin, length, columns, block, part, C, LV, SR, SQ, A: tl.constexpr, B: tl.constexpr,
          VEC: tl.constexpr, LAST: tl.constexpr, BIG: tl.constexpr, WELFORD: tl.constexpr,
          UNROLL: tl.constexpr):  # fmt: skip
    """Count of each lane, what `counted` says of all, pivot and sums of each.

    Lanes beyond the tensor see zeros all along and count for nothing; only in the last turn can a
    lane run out of values that had some.
    """
    first = tl.zeros((A, B), tl.float32)
    s1 = tl.zeros((A, B), tl.float32)
    s2 = tl.zeros((A, B), tl.float32)
    done = tl.full((), 1.0, tl.float32)  # a tensor: the interpreter's range yields Python's ints
    turns = turns_of(length, part, SR, SQ, A)
    r = (part // SQ) * A + tl.arange(0, A)
    if turns > 0:
        at, n, ok = tile_at(begin, length, r, columns, block, C, LV, VEC, LAST, BIG)
        first = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    for i in tl.range(1, turns - 1, loop_unroll_factor=UNROLL):
        at, n, ok = tile_at(begin, length, r + i * SR * A, columns, block, C, LV, VEC, LAST, BIG)
        v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        done += 1.0
        s1, s2 = lane_step(v, ok, first, s1, s2, tl.div_rn(1.0, done), False, WELFORD)
    if turns > 1:
        at, n, ok = tile_at(
            begin, length, r + (turns - 1) * SR * A, columns, block, C, LV, VEC, LAST, BIG
        )
        v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        s1, s2 = lane_step(v, ok, first, s1, s2, tl.div_rn(1.0, done + 1.0), True, WELFORD)
    by_row = tl.maximum(tl.cdiv(length - r, SR * A), 0).to(tl.float32)
    count = by_row[:, None] * (columns < LV * VEC).to(tl.float32)[None, :]
    left = length - (part // SQ) * A
    many = tl.maximum(tl.minimum(left, A), 0).to(tl.float32)
    n = ((turns - 1) * A + tl.minimum(left - (turns - 1) * SR * A, A)).to(tl.float32)
    n = tl.where(turns > 0, n, 0.0)
    if not LAST:
        across = tl.minimum(LV * VEC - (part % SQ) * B, B).to(tl.float32)
        n, many = n * across, many * across
    return count, n, many, first, s1, s2


@triton.jit
def moments(x, mask, starts, parts, tickets, rows, weight, bias, running_mean, running_var, batches,
            eps, pace, prior, known, N, C, LV, SR, SQ, A: tl.constexpr, B: tl.constexpr,
            WIDTH: tl.constexpr, VEC: tl.constexpr, LAST: tl.constexpr, BIG: tl.constexpr,
            WELFORD: tl.constexpr, UNROLL: tl.constexpr, SP: tl.constexpr, ALONE: tl.constexpr,
            POLICY: tl.constexpr = None, FIRST: tl.constexpr = False, COUNTS: tl.constexpr = False,
            R_MAX: tl.constexpr = 1.0, D_MAX: tl.constexpr = 0.0, WARMUP: tl.constexpr = 0,
            R_RAMP: tl.constexpr = 1, D_RAMP: tl.constexpr = 1):  # fmt: skip
    """Moments of every group; the last program of a channel decides what normalizes it.

    POLICY: its lower-case name, or None to measure only. ALONE: no other program to wait for.
    """
    block = tl.program_id(0)
    part = tl.program_id(1)
    group = tl.program_id(2)
    G = tl.num_programs(2)
    S = SR * SQ
    AXIS: tl.constexpr = 0 if LAST else None
    begin, length = span_of(starts, N, group)
    columns = columns_of(block, part, SQ, B, LAST)
    c = channels_of(block, WIDTH)
    ok = c < C
    # Ahead of the loop that hides how long they take; the last program alone needs them.
    old_mean, old_var, t = running_before(
        running_mean, running_var, batches, c, ok, WIDTH, POLICY, COUNTS or FIRST
    )
    gamma, beta = affine(weight, bias, c, ok, WIDTH)
    if mask is not None:
        count, n, many, first, s1, s2 = masked_lanes(
            x, mask, begin, length, columns, block, part, C, LV, SR, SQ, A, B, VEC, LAST, BIG,
            WELFORD,
        )  # fmt: skip
    else:
        count, n, many, first, s1, s2 = lanes(
            x, begin, length, columns, block, part, C, LV, SR, SQ, A, B, VEC, LAST, BIG, WELFORD,
            UNROLL,
        )  # fmt: skip
    mean, m2 = lane_moments(count, s1, s2, WELFORD)
    n, many = n + tl.zeros((WIDTH,), tl.float32), many + tl.zeros((WIDTH,), tl.float32)
    pivot, middle, total = merge(count, n, many, first, mean, m2, AXIS)
    pivot = to_channels(pivot, LAST)
    middle, total = to_channels(middle, LAST), to_channels(total, LAST)
    last = True
    if not ALONE:
        at = parts + (group * S + part) * C + c
        tl.store(at, n, mask=ok)
        tl.store(at + G * S * C, pivot, mask=ok)
        tl.store(at + 2 * G * S * C, middle, mask=ok)
        tl.store(at + 3 * G * S * C, total, mask=ok)
        last = comes_last(tickets + block, S * G - 1)
    if last:
        if running_mean is not None and POLICY is not None:
            t = batches_seen(t, running_mean, running_var, C, COUNTS)
            tl.store(row(rows, SEEN, 0, G, c, C), t, mask=ok)
        for g in tl.range(0, G):
            if not ALONE:
                n, pivot, middle, total = gather(parts, g, G, S, c, C, SP, WIDTH)
            old_mean, old_var, t, center, scale, shift = decide(
                n, pivot, middle, total, rows, g, G, c, ok, C, gamma, beta, old_mean, old_var, t,
                eps, pace, prior, known, POLICY, FIRST, running_mean is not None, R_MAX, D_MAX,
                WARMUP, R_RAMP, D_RAMP,
            )  # fmt: skip
        if running_mean is not None and POLICY is not None:
            tl.store(row(rows, NEXT_MEAN, 0, G, c, C), old_mean, mask=ok)
            tl.store(row(rows, NEXT_VAR, 0, G, c, C), old_var, mask=ok)


@triton.jit
def move_running(rows, running_mean, running_var, batches, first, G, c, ok, C):
    """The running statistics as they were decided, and how many batches they have seen.

    `first`: whether the channels begin with the first, whose program counts. A count of 0 that was
    read as "many" goes on from there. .cg as in `gather`.
    """
    mean = tl.load(row(rows, NEXT_MEAN, 0, G, c, C), mask=ok, cache_modifier=".cg")
    var = tl.load(row(rows, NEXT_VAR, 0, G, c, C), mask=ok, cache_modifier=".cg")
    tl.store(running_mean + c, mean, mask=ok)
    tl.store(running_var + c, var, mask=ok)
    if batches is not None:
        if first:
            seen = tl.load(batches)
            if seen == 0:
                before = tl.load(row(rows, SEEN, 0, G, 0, C), cache_modifier=".cg")
                seen = before.to(tl.int64)
            for g in tl.range(0, G):
                count = tl.load(row(rows, COUNT, g, G, 0, C), cache_modifier=".cg")
                seen += (count > 0.0).to(tl.int64)
            tl.store(batches, seen)


@triton.jit
def by_running(rows, weight, bias, running_mean, running_var, eps, g, G, c, ok, C, keep,
               WIDTH: tl.constexpr):  # fmt: skip
    """center, scale and shift of the running statistics.

    `rows`, where a backward may follow, keeps them: written by the programs that are to `keep`.
    """
    center = tl.load(running_mean + c, mask=ok, other=0.0)
    spread = tl.load(running_var + c, mask=ok, other=1.0)
    gamma, beta = affine(weight, bias, c, ok, WIDTH)
    zero = tl.zeros_like(center)
    one = zero + 1.0
    if rows is not None:
        store_moments(rows, g, G, c, ok & keep, C, zero, zero, zero, zero)
        scale, shift = store_normalizer(
            rows, g, G, c, ok & keep, C, gamma, beta, eps, center, zero, spread, one, zero, zero
        )
    else:
        scale, shift, rho = coefficients(zero, spread, one, zero, gamma, beta, eps)
    return center, scale, shift


@triton.jit(do_not_specialize_on_alignment=["signs"])  # aligned, bytes would be stored in pairs
def apply(x, residual, y, signs, starts, rows, weight, bias, running_mean, running_var, batches,
          eps, N, C, LV, SR, SQ, RB, A: tl.constexpr, B: tl.constexpr, WIDTH: tl.constexpr,
          VEC: tl.constexpr, LAST: tl.constexpr, BIG: tl.constexpr, FOUR: tl.constexpr,
          ACT: tl.constexpr, FIXED: tl.constexpr = False):  # fmt: skip
    """`activation((x - center)·scale + shift + residual)`, and the sign bits.

    By `rows` as `moments` left them; then the running statistics, if given, move. FIXED: by the
    running statistics, which stay. Programs and tiles go backwards, to meet what the cache still
    holds of the reduction.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    part = SR * SQ - 1 - tl.program_id(1)
    G = tl.num_programs(2)
    g = G - 1 - tl.program_id(2)
    begin, length = span_of(starts, N, g)
    c = channels_of(block, WIDTH)
    inside = c < C
    if FIXED:
        center, scale, shift = by_running(
            rows, weight, bias, running_mean, running_var, eps, g, G, c, inside, C, part == 0,
            WIDTH,
        )  # fmt: skip
    else:
        center = tl.load(row(rows, CENTER, g, G, c, C), mask=inside, other=0.0)
        scale = tl.load(row(rows, SCALE, g, G, c, C), mask=inside, other=0.0)
        shift = tl.load(row(rows, SHIFT, g, G, c, C), mask=inside, other=0.0)
        if running_mean is not None:
            if part == 0 and g == 0:
                move_running(rows, running_mean, running_var, batches, block == 0, G, c, inside, C)
    columns = columns_of(block, part, SQ, B, LAST)
    turns = turns_of(length, part, SR, SQ, A)
    for i in tl.range(0, turns):
        row_block = (part // SQ) + (turns - 1 - i) * SR
        r = row_block * A + tl.arange(0, A)
        at, n, ok = tile_at(begin, length, r, columns, block, C, LV, VEC, LAST, BIG)
        v = tl.load(x + at, mask=ok, other=0.0, eviction_policy="evict_first").to(tl.float32)
        z = tl.fma(v - center[None, :], scale[None, :], shift[None, :])
        if residual is not None:
            extra = tl.load(residual + at, mask=ok, other=0.0, eviction_policy="evict_first")
            z += extra.to(tl.float32)
        z = activated(z, ACT)
        tl.store(y + at, z.to(y.dtype.element_ty), mask=ok)
        if signs is not None:
            open_ = through(tl.full((A, B), 1.0, tl.float32), z, ACT) != 0.0
            to = bits_at(signs, row_block, block, tl.num_programs(0), part, g, RB, SQ, A, B, FOUR)
            tl.store(to, pack_bits(open_, A, B, FOUR))
