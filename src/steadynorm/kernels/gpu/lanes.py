"""Moments of the values that one program sees, and merging moments.

Each lane of a tile keeps the first value it sees as its pivot and runs Welford's recurrence about
it: nothing near mean² is ever summed. At mean 1e6 and standard deviation 1 the output is then off
by 4.8e-7, and by 7.9e-7 if the first row lies 50 standard deviations away; about no pivot by
2.9e-2. Lanes, then programs, are merged about a common centre by Chan's formula.

What Triton's interpreter does not enforce, and these files keep:

- values are widened to float32 before anything is done to them;
- every fused multiply-add is written out, and kernels are compiled without fusing others: the
  interpreter then rounds as the device does;
- roots and quotients that reach a result are `sqrt_rn` and `div_rn`; plain ones are approximate.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def two_sum(a, b):
    """The rounded sum, and exactly what the rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@triton.jit
def lane_step(value, valid, first, mean, m2, inverse, SELECT: tl.constexpr, WELFORD: tl.constexpr):
    """One value more for each lane (with SELECT: where `ok`), about the lane's first value.

    WELFORD: the recurrence, `inverse` being 1 / count with this value. Else plain sums, for 16-bit
    values, which want fewer instructions: a lane whose first value lies 50 standard deviations from
    its others is then off by 3e-5 of the variance at 64 values, far below their own rounding.
    """
    centered = value - first
    if WELFORD:
        delta = centered - mean
        if SELECT:
            delta = tl.where(valid, delta, 0.0)
        mean = tl.fma(delta, inverse, mean)
        left = centered - mean
        if SELECT:
            left = tl.where(valid, left, 0.0)
        m2 = tl.fma(delta, left, m2)
    else:
        if SELECT:
            centered = tl.where(valid, centered, 0.0)
        mean += centered
        m2 = tl.fma(centered, centered, m2)
    return mean, m2


@triton.jit
def lane_moments(count, mean, m2, WELFORD: tl.constexpr):
    """Mean beyond the pivot, and sum of squared distances from it."""
    if not WELFORD:
        total = mean
        mean = tl.div_rn(total, tl.maximum(count, 1.0))
        m2 = tl.maximum(tl.fma(-total, mean, m2), 0.0)
    return mean, m2


@triton.jit
def beside(values, AXIS: tl.constexpr):
    """What a reduction over `AXIS` gave, in a shape that broadcasts against what was reduced."""
    return values if AXIS is None else tl.expand_dims(values, AXIS)


@triton.jit
def counted(count, AXIS: tl.constexpr):
    """How many values there are, and how many parts that are not empty."""
    return tl.sum(count, AXIS), tl.sum((count > 0.0).to(tl.float32), AXIS)


@triton.jit
def merge(count, n, many, first, mean, m2, AXIS: tl.constexpr):
    """Pivot, mean beyond the pivot, and sum of squared distances, of all parts together.

    `n` and `many` are what `counted` says: where no mask is given, they are known without a
    reduction. Any value in the midst of the pivots of parts that are not empty will do as the
    common one.
    """
    some = count > 0.0
    even = beside(tl.div_rn(1.0, tl.maximum(many, 1.0)), AXIS)
    pivot = tl.sum(tl.where(some, first, 0.0) * even, AXIS)
    away = tl.where(some, (first - beside(pivot, AXIS)) + mean, 0.0)
    middle = tl.sum(count * away, AXIS) * tl.div_rn(1.0, tl.maximum(n, 1.0))
    off = tl.where(some, away - beside(middle, AXIS), 0.0)
    return pivot, middle, tl.sum(tl.fma(count * off, off, m2), AXIS)


@triton.jit
def gather(partials, group, groups, parts, c, C, PARTS_AT_ONCE: tl.constexpr, WIDTH: tl.constexpr):
    """Merge the partials of one group in the channels c, PARTS_AT_ONCE at a time, in their order.

    A loop of little state and one merge across threads at its end: few registers, which would cost
    the whole kernel its occupancy, and no barrier in the loop.
    """
    n = tl.zeros((PARTS_AT_ONCE, WIDTH), tl.float32)
    first = tl.zeros((PARTS_AT_ONCE, WIDTH), tl.float32)
    middle = tl.zeros((PARTS_AT_ONCE, WIDTH), tl.float32)
    total = tl.zeros((PARTS_AT_ONCE, WIDTH), tl.float32)
    step = groups * parts * C
    for k in tl.range(0, parts, PARTS_AT_ONCE):
        part = k + tl.arange(0, PARTS_AT_ONCE)[:, None]
        inside = (part < parts) & (c < C)[None, :]
        places = partials + (group * parts + part) * C + c[None, :]
        # .cg reads the L2, where other programs' stores are; a line of this L1 may be older.
        count = tl.load(places, mask=inside, other=0.0, cache_modifier=".cg")
        pivot = tl.load(places + step, mask=inside, other=0.0, cache_modifier=".cg")
        mean = tl.load(places + 2 * step, mask=inside, other=0.0, cache_modifier=".cg")
        m2 = tl.load(places + 3 * step, mask=inside, other=0.0, cache_modifier=".cg")
        some = count > 0.0
        first = tl.where(some & (n == 0.0), pivot, first)
        share = tl.div_rn(count, tl.maximum(n + count, 1.0))
        delta = tl.where(some, ((pivot - first) + mean) - middle, 0.0)
        middle = tl.fma(share, delta, middle)
        total += tl.fma(delta * delta, n * share, tl.where(some, m2, 0.0))
        n += count
    number, many = counted(n, 0)
    first, middle, total = merge(n, number, many, first, middle, total, 0)
    return number, first, middle, total


@triton.jit
def gather_sums(partials, group, groups, parts, c, C, PARTS_AT_ONCE: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    """Add the partials of two sums, in their order."""
    sum_grad = tl.zeros((PARTS_AT_ONCE, WIDTH), tl.float32)
    sum_grad_x = tl.zeros((PARTS_AT_ONCE, WIDTH), tl.float32)
    for k in tl.range(0, parts, PARTS_AT_ONCE):
        part = k + tl.arange(0, PARTS_AT_ONCE)[:, None]
        inside = (part < parts) & (c < C)[None, :]
        places = partials + (group * parts + part) * C + c[None, :]
        sum_grad += tl.load(places, mask=inside, other=0.0, cache_modifier=".cg")
        sum_grad_x += tl.load(
            places + groups * parts * C, mask=inside, other=0.0, cache_modifier=".cg"
        )
    return tl.sum(sum_grad, 0), tl.sum(sum_grad_x, 0)
