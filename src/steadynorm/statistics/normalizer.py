"""The one normal form of every policy, its gradient in closed form, and folding it away."""

from __future__ import annotations

from typing import NamedTuple

from steadynorm.statistics.moments import Array, Moments, at_least_one
from steadynorm.statistics.running import RunningStatistics


class Normalizer(NamedTuple):
    """What normalizes a batch: `x̂ = (x - m)·ρ·r + d` with `ρ = 1/√(u + ε)`.

    `m = mean + mean_low` (see `Moments`), `u = var`, `r = gain`, `d = offset`. `share` (α) says how
    much of m and u came from the batch: gradient flows as if `m = m₀ + α·μ` and `u = u₀ + α·v` with
    all else constant. All but `mean` and `var` may be plain numbers.
    """

    mean: Array
    mean_low: Array
    var: Array
    gain: Array
    offset: Array
    share: Array


def of_batch(batch: Moments) -> Normalizer:
    """The batch's own statistics normalize it."""
    return Normalizer(batch.mean, batch.mean_low, batch.var, 1.0, 0.0, 1.0)


def of_running(running: RunningStatistics) -> Normalizer:
    """The running statistics normalize: what every policy does in inference."""
    return Normalizer(running.mean, 0.0, running.var, 1.0, 0.0, 0.0)


class Coefficients(NamedTuple):
    """`z = (x - center)·scale + shift`, and the `rho` of the normal form, each (C,) or (G, C)."""

    center: Array
    scale: Array
    shift: Array
    rho: Array


class GradientFactors(NamedTuple):
    """What turns the two sums of the backward reduction into `GradientCoefficients`.

    dx = scale·g - constant·S₁ - constant·ρ²·S₂·((x - center) - mean_gap), with
    S₁ = Σg and S₂ = Σg·(x - center) - mean_low·S₁.
    """

    rho: Array
    constant: Array
    mean_low: Array
    mean_gap: Array


class GradientCoefficients(NamedTuple):
    """`dx = scale·g + slope·(x - center) + constant`, the last two at valid positions only."""

    slope: Array
    constant: Array


def coefficients(
    normalizer: Normalizer, weight: Array | None, bias: Array | None, eps: float
) -> Coefficients:
    """Scale and shift per channel for the map over x.

        scale = γ·r·ρ        shift = β + γ·d - mean_low·scale

    The map subtracts first (`x - center`), so that a large mean cancels exactly, and the part of
    the mean that float32 cannot hold enters through the shift. Without a weight γ is 1, without a
    bias β is 0.
    """
    # In two steps: the derivative of ** -0.5 has ρ³, which leaves float32.
    rho = ((normalizer.var + eps) ** 0.5) ** -1
    scale = rho if _is(normalizer.gain, 1) else rho * normalizer.gain
    shift = -normalizer.mean_low * scale
    if weight is not None:
        scale, shift = scale * weight, shift * weight
    if not _is(normalizer.offset, 0):
        offset = normalizer.offset
        shift = shift + (offset if weight is None else weight * offset)
    if bias is not None:
        shift = shift + bias
    return Coefficients(normalizer.mean, scale, shift, rho)


def _is(part: Array, number: int) -> bool:
    """Whether a part of a normalizer is that plain number, and so costs no array operation."""
    return isinstance(part, int | float) and part == number


def attach(normalizer: Normalizer, batch: Moments, live: Moments) -> Normalizer:
    """The same values, joined to moments that carry gradient, by the share that flows.

    `live` equals `batch` in value but belongs to a framework's graph; for where a framework
    differentiates by itself instead of by the closed form. Its mean's gradient sits in `mean_low`.
    """
    return normalizer._replace(
        mean_low=normalizer.mean_low + normalizer.share * (live.mean_low - batch.mean_low),
        var=normalizer.var + normalizer.share * (live.var - batch.var),
    )


def parameter_gradients(
    normalizer: Normalizer, rho: Array, sum_grad: Array, sum_grad_x: Array
) -> tuple[Array, Array]:
    """Gradients of weight and bias from the two sums of the backward reduction.

        dγ = r·ρ·S₂ + d·S₁        dβ = S₁        S₁ = Σg, S₂ = Σg·(x - m)

    `sum_grad_x` is about the rounded mean, Σg·(x - center); S₂ follows from it.
    With groups the caller sums both results over the first axis.
    """
    gradient = rho * (sum_grad_x - normalizer.mean_low * sum_grad)
    if not _is(normalizer.gain, 1):
        gradient = gradient * normalizer.gain
    if not _is(normalizer.offset, 0):
        gradient = gradient + normalizer.offset * sum_grad
    return gradient, sum_grad


def gradient_factors(
    normalizer: Normalizer, batch: Moments, scale: Array, rho: Array
) -> GradientFactors:
    """The part of the gradient with respect to x that is known before the backward reduction.

        dx = scale·( g - α·S₁/n - α·(x - μ)·ρ²·S₂/n )

    With several replicas `batch` holds the pooled moments, and the sums run over all of them.
    """
    per_value = scale * (normalizer.share / at_least_one(batch.count))
    gap = (batch.mean - normalizer.mean) + batch.mean_low
    return GradientFactors(rho, per_value, normalizer.mean_low, gap)


def gradient_coefficients(
    factors: GradientFactors, sum_grad: Array, sum_grad_x: Array
) -> GradientCoefficients:
    """The two terms that reach x through the batch's own mean and variance, from the sums.

    S₂ is scaled by ρ first: ρ³ leaves float32 where x has a standard deviation of 1e13 or 1e-13.
    """
    sum_grad_xhat = factors.rho * (sum_grad_x - factors.mean_low * sum_grad)
    slope = -factors.constant * sum_grad_xhat * factors.rho
    return GradientCoefficients(slope, -factors.constant * sum_grad - slope * factors.mean_gap)


def fold(
    mean: Array, var: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array]:
    """Batch normalization in inference as one scale and one shift: `y = scale·x + shift`.

        scale = γ/√(var + ε)        shift = β - mean·scale

    Compute it in float64: here the mean is not subtracted first.
    """
    scale = (var + eps) ** -0.5
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale, shift if bias is None else shift + bias
