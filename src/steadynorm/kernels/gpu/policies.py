"""What `statistics/` says about a channel, inside the last program that finishes it.

In plain operations this is 13 large and 66 small launches for `Steady` with residual and ReLU. The
names are those of statistics/, and tests hold both to the same truth: `decide` is the policies'
`normalizer` and `update` and then `coefficients`; `finish_gradient` is `gradient_factors`,
`gradient_coefficients`, `parameter_gradients`, `remember` and `with_memory`.

What one forward knows per channel are the rows of one float32 tensor (ROWS, G, C).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lanes import two_sum

# The map over x, which the stages hand over alone, comes first.
CENTER = tl.constexpr(0)
SCALE = tl.constexpr(1)
SHIFT = tl.constexpr(2)
COUNT = tl.constexpr(3)
MEAN = tl.constexpr(4)
MEAN_LOW = tl.constexpr(5)
VAR = tl.constexpr(6)
CENTER_LOW = tl.constexpr(7)
SPREAD = tl.constexpr(8)  # the variance that normalizes
GAIN = tl.constexpr(9)
OFFSET = tl.constexpr(10)
SHARE = tl.constexpr(11)
RHO = tl.constexpr(12)
# What the running statistics become; in group 0 alone.
NEXT_MEAN = tl.constexpr(13)
NEXT_VAR = tl.constexpr(14)
SEEN = tl.constexpr(15)  # batches before this one
ROWS = 16


@triton.jit
def row(rows, k: tl.constexpr, group, groups, c, C):
    """Where row k of group g holds the channels c."""
    return rows + (k * groups + group) * C + c


@triton.jit
def difference(mean, mean_low, center):
    """`mean - center` to twice the precision."""
    high = mean - center
    part = high - mean
    return high, ((mean - (high - part)) - (center + part)) + mean_low


@triton.jit
def clip(value, low, high):
    """Between low and high; NaN stays."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def batches_seen(batches, running_mean, running_var, C, COUNTS: tl.constexpr):
    """How many batches the running statistics have seen, given their count `batches`.

    COUNTS: a count of 0 beside statistics that are not 0 and 1 reads as 2^30. Nobody writes the
    statistics of another channel meanwhile.
    """
    seen = batches
    if COUNTS:
        if tl.max(batches, 0) == 0.0:
            trained = 0
            for k in tl.range(0, C, 256):
                c = k + tl.arange(0, 256)
                mean = tl.load(running_mean + c, mask=c < C, other=0.0)
                var = tl.load(running_var + c, mask=c < C, other=1.0)
                trained += tl.sum(((mean != 0.0) | (var != 1.0)).to(tl.int32))
            if trained > 0:
                seen += 1073741824.0
    return seen


@triton.jit
def running_before(running_mean, running_var, batches, c, inside, WIDTH: tl.constexpr,
                   POLICY: tl.constexpr, NEEDED: tl.constexpr):  # fmt: skip
    """Mean and variance before this batch, and the count of batches where it is NEEDED.

    0, 1 and 0 where nothing is tracked or asked; 2^30 batches where there is no count.
    """
    mean = tl.zeros((WIDTH,), tl.float32)
    var = mean + 1.0
    seen = mean
    if running_mean is not None and POLICY is not None:
        mean = tl.load(running_mean + c, mask=inside, other=0.0)
        var = tl.load(running_var + c, mask=inside, other=1.0)
        if batches is None:
            seen += 1073741824.0
        elif NEEDED:
            seen += tl.load(batches).to(tl.float32)
    return mean, var, seen


@triton.jit
def affine(weight, bias, c, inside, WIDTH: tl.constexpr):
    """γ and β; 1 and 0 where there is none."""
    beta = tl.zeros((WIDTH,), tl.float32)
    gamma = beta + 1.0
    if weight is not None:
        gamma = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        beta = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    return gamma, beta


@triton.jit
def coefficients(center_low, spread, gain, offset, gamma, beta, eps):
    """scale, shift and rho of the map."""
    rho = tl.div_rn(1.0, tl.sqrt_rn(spread + eps))
    scale = rho * gain
    shift = (-center_low * scale + offset) * gamma + beta
    return scale * gamma, shift, rho


@triton.jit
def store_moments(rows, group, groups, c, inside, C, n, mean, low, var):
    """The moments of one group."""
    tl.store(row(rows, COUNT, group, groups, c, C), n, mask=inside)
    tl.store(row(rows, MEAN, group, groups, c, C), mean, mask=inside)
    tl.store(row(rows, MEAN_LOW, group, groups, c, C), low, mask=inside)
    tl.store(row(rows, VAR, group, groups, c, C), var, mask=inside)


@triton.jit
def store_normalizer(rows, group, groups, c, inside, C, gamma, beta, eps, center, low, spread, gain,
                     offset, share):  # fmt: skip
    """What normalizes one group, and the map that follows."""
    scale, shift, rho = coefficients(low, spread, gain, offset, gamma, beta, eps)
    tl.store(row(rows, CENTER, group, groups, c, C), center, mask=inside)
    tl.store(row(rows, CENTER_LOW, group, groups, c, C), low, mask=inside)
    tl.store(row(rows, SPREAD, group, groups, c, C), spread, mask=inside)
    tl.store(row(rows, GAIN, group, groups, c, C), gain, mask=inside)
    tl.store(row(rows, OFFSET, group, groups, c, C), offset, mask=inside)
    tl.store(row(rows, SHARE, group, groups, c, C), share, mask=inside)
    tl.store(row(rows, SCALE, group, groups, c, C), scale, mask=inside)
    tl.store(row(rows, SHIFT, group, groups, c, C), shift, mask=inside)
    tl.store(row(rows, RHO, group, groups, c, C), rho, mask=inside)
    return scale, shift


@triton.jit
def renorm(mean, low, var, old_mean, old_var, seen, eps, R_MAX: tl.constexpr, D_MAX: tl.constexpr,
           WARMUP: tl.constexpr, R_RAMP: tl.constexpr, D_RAMP: tl.constexpr):  # fmt: skip
    """Gain and offset of `Renorm`."""
    r_bound = 1.0 + (R_MAX - 1.0) * clip(tl.div_rn(seen - WARMUP, R_RAMP), 0.0, 1.0)
    d_bound = D_MAX * clip(tl.div_rn(seen - WARMUP, D_RAMP), 0.0, 1.0)
    rho = tl.div_rn(1.0, tl.sqrt_rn(old_var + eps))
    delta, delta_low = difference(mean, low, old_mean)
    gain = clip(tl.sqrt_rn(var + eps) * rho, tl.div_rn(1.0, r_bound), r_bound)
    return gain, clip((delta + delta_low) * rho, -d_bound, d_bound)


@triton.jit
def decide(n, pivot, middle, total, rows, group, groups, c, inside, C, gamma, beta, old_mean,
           old_var, seen, eps, pace, prior, known, POLICY: tl.constexpr, FIRST: tl.constexpr,
           TRACKED: tl.constexpr, R_MAX: tl.constexpr, D_MAX: tl.constexpr, WARMUP: tl.constexpr,
           R_RAMP: tl.constexpr, D_RAMP: tl.constexpr):  # fmt: skip
    """The normalizer of one group into `rows`; returns the running statistics after it and the map.

    `pace`: weight of the batch in the running statistics. `prior`, `known`: `Steady`'s share is
    known/(known + prior), of values per channel for a negative `known`. FIRST: both are at least
    1/(t + 1).
    """
    mean, low = two_sum(pivot, middle)
    low = tl.where(tl.abs(mean) < float("inf"), low, 0.0)
    var = tl.div_rn(total, tl.maximum(n, 1.0))
    store_moments(rows, group, groups, c, inside, C, n, mean, low, var)
    if POLICY is None:
        return old_mean, old_var, seen, mean, var, low
    else:
        some = n > 0.0
        first = tl.where(FIRST, tl.div_rn(1.0, seen + 1.0), 0.0)
        share = tl.full(n.shape, 1.0, tl.float32)
        gain = share
        offset = tl.zeros_like(n)
        center = mean
        center_low = low
        spread = var
        if POLICY == "steady":
            heard = tl.where(known < 0.0, n, known)
            share = tl.div_rn(heard, tl.maximum(heard, 1.0) + prior)
            share = tl.maximum(share, first)
        if POLICY == "running":
            share = tl.maximum(share * pace, first)
        if POLICY == "steady" or POLICY == "running":
            delta, delta_low = difference(mean, low, old_mean)
            center, center_low = two_sum(old_mean, share * delta)
            center_low = tl.fma(share, delta_low, center_low)
            away = delta + delta_low
            between = away * away if POLICY == "steady" else 0.0
            spread = (1.0 - share) * old_var + share * (var + (1.0 - share) * between)
        if POLICY == "renorm":
            gain, offset = renorm(
                mean, low, var, old_mean, old_var, seen, eps, R_MAX, D_MAX, WARMUP, R_RAMP, D_RAMP
            )
        center = tl.where(some, center, old_mean)
        scale, shift = store_normalizer(
            rows, group, groups, c, inside, C, gamma, beta, eps, center,
            tl.where(some, center_low, 0.0), tl.where(some, spread, old_var),
            tl.where(some, gain, 1.0), tl.where(some, offset, 0.0), tl.where(some, share, 0.0),
        )  # fmt: skip
        if TRACKED:
            weight_new = tl.maximum(tl.zeros_like(n) + pace, first)
            delta = (mean - old_mean) + low
            if POLICY == "steady":
                rest = 1.0 - weight_new
                new_var = rest * old_var + weight_new * (var + rest * delta * delta)
            else:
                if POLICY == "running":
                    kept = var
                else:
                    kept = tl.div_rn(total, tl.maximum(n - 1.0, 1.0))
                new_var = tl.fma(weight_new, kept - old_var, old_var)
            old_mean = tl.where(some, tl.fma(weight_new, delta, old_mean), old_mean)
            old_var = tl.where(some, new_var, old_var)
            seen += some.to(tl.float32)
        return old_mean, old_var, seen, center, scale, shift


@triton.jit
def remember(before, state, g_mean, g_xhat, share, rate, gap_hat, var_hat, c, inside, C,
             FIRST: tl.constexpr):  # fmt: skip
    """The memory of the gradient after this backward; in the first, `state` moves."""
    if FIRST:
        old_constant = tl.load(state + c, mask=inside, other=0.0).to(tl.float32)
        old_slope = tl.load(state + C + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(before + c, old_constant, mask=inside)
        tl.store(before + C + c, old_slope, mask=inside)
    else:
        old_constant = tl.load(before + c, mask=inside, other=0.0)
        old_slope = tl.load(before + C + c, mask=inside, other=0.0)
    left = (1.0 - share) * g_mean
    left_xhat = g_xhat - share * (var_hat * g_xhat + gap_hat * g_mean)
    old = 1.0 - rate
    constant = old * old_constant + rate * left
    slope = old * old_slope + rate * left_xhat
    slope = tl.div_rn(
        slope - rate * gap_hat * constant, old * (1.0 + rate * gap_hat * gap_hat) + rate * var_hat
    )
    constant = constant - rate * gap_hat * slope
    finite = (tl.abs(constant) < float("inf")) & (tl.abs(slope) < float("inf"))
    constant = tl.where(finite, constant, old_constant)
    slope = tl.where(finite, slope, old_slope)
    if FIRST:
        tl.store(state + c, constant.to(state.dtype.element_ty), mask=inside)
        tl.store(state + C + c, slope.to(state.dtype.element_ty), mask=inside)
    return constant, slope


@triton.jit
def gradient_facts(rows, group, groups, c, inside, C):
    """What `finish_gradient` reads of one group's rows: ahead, while the sums are on their way."""
    n = tl.maximum(tl.load(row(rows, COUNT, group, groups, c, C), mask=inside, other=1.0), 1.0)
    mean = tl.load(row(rows, MEAN, group, groups, c, C), mask=inside, other=0.0)
    mean_low = tl.load(row(rows, MEAN_LOW, group, groups, c, C), mask=inside, other=0.0)
    center = tl.load(row(rows, CENTER, group, groups, c, C), mask=inside, other=0.0)
    low = tl.load(row(rows, CENTER_LOW, group, groups, c, C), mask=inside, other=0.0)
    gain = tl.load(row(rows, GAIN, group, groups, c, C), mask=inside, other=1.0)
    offset = tl.load(row(rows, OFFSET, group, groups, c, C), mask=inside, other=0.0)
    share = tl.load(row(rows, SHARE, group, groups, c, C), mask=inside, other=0.0)
    scale = tl.load(row(rows, SCALE, group, groups, c, C), mask=inside, other=0.0)
    rho = tl.load(row(rows, RHO, group, groups, c, C), mask=inside, other=0.0)
    var = tl.load(row(rows, VAR, group, groups, c, C), mask=inside, other=0.0)
    return n, mean, mean_low, var, center, low, gain, offset, share, scale, rho


@triton.jit
def finish_gradient(sum_grad, sum_grad_x, facts, maps, before, state, rate, group, groups, c,
                    inside, C, FIRST: tl.constexpr):  # fmt: skip
    """dγ, dβ, and slope and constant of the backward map, these into `maps` (2, G, C) if given.

    sum_grad = Σg, sum_grad_x = Σg·(x - center).
    """
    n, mean, mean_low, var, center, low, gain, offset, share, scale, rho = facts
    exact = tl.fma(-low, sum_grad, sum_grad_x)  # Σg·(x - mean), with the mean unrounded
    per_value = scale * tl.div_rn(share, n)
    slope = -per_value * (rho * exact) * rho  # ρ³ may leave float32
    gap = (mean - center) + mean_low
    constant = -per_value * sum_grad - slope * gap
    if before is not None:
        remembered, tilt = remember(
            before, state, tl.div_rn(sum_grad, n), tl.div_rn(rho * exact, n), share, rate,
            (gap - low) * rho, var * rho * rho, c, inside, C, FIRST,
        )  # fmt: skip
        taken = -scale * rho * tilt
        slope += taken
        constant += -scale * remembered - taken * low
    if maps is not None:
        tl.store(maps + group * C + c, slope, mask=inside)
        tl.store(maps + (groups + group) * C + c, constant, mask=inside)
    return gain * rho * exact + offset * sum_grad, sum_grad, slope, constant
