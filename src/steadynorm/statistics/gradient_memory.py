"""What `Steady` remembers of the gradient: the other half of its memory of the statistics.

In a large batch the loss reaches every sample through the batch's mean and variance, and so the
gradient of the input has no part along 1 or along x̂: a layer whose inputs are shifted or scaled
computes the same. A normalizer of share k passes only k of that on. The rest would have to reach
samples gone by; here the present ones take it over, at the rate that a window of samples shows.

With h the gradient that the share leaves, per channel, and g the gradient at z:

    h  = g - k·E[g] - k·(x - μ)·ρ·E[g·x̂]                     E over the batch's values
    dx = γ·ρ·( h - M - R·x̂ )

where (M, R) regresses h on (1, x̂) over the window, by one implicit step a batch:

    M' = (1 - β)·M + β·(E[h]    - R'·E[x̂])              β = N/(N + window), N samples
    R' = R + β/(1 - β)·(E[h·x̂] - M'·E[x̂] - R'·E[x̂²])

Two things follow, whatever the window, prior, horizon and number of positions. The map from h to
h - M' - R'·x̂ is (1 + β/(1 - β)·XXᵀ/n)⁻¹ with X = (1, x̂), so it is positive definite: no sample's
gradient turns round. And what is left along 1 and x̂ adds up to the change of M and R:

    Σ E[h - M' - R'·x̂]·β/(1 - β) = M_end - M_start               and for x̂ and R likewise

E[h], E[h·x̂], E[x̂] and E[x̂²] are channel-sized, known from the moments and from the two sums of the
backward reduction. The memory enters the backward map through its slope and constant alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from steadynorm.statistics.moments import Array, Moments, at_least_one
from steadynorm.statistics.normalizer import GradientCoefficients, Normalizer


class GradientMemory(NamedTuple):
    """The remembered part of the gradient, `constant + slope·x̂` (M and R), each (C,).

    Starts at 0. In units of the gradient at z, before γ.
    """

    constant: Array
    slope: Array


def remember(
    memory: GradientMemory,
    rate: Array,
    normalizer: Normalizer,
    batch: Moments,
    rho: Array,
    sum_grad: Array,
    sum_grad_x: Array,
    *,
    xp: Any,
) -> GradientMemory:
    """The memory after a backward.

    `rate` is β, from 0 (nothing is remembered anew) to below 1. `sum_grad` and `sum_grad_x` are the
    sums of the backward reduction, Σg and Σg·(x - mean), over all replicas where there are several;
    `batch` then holds the pooled moments. For normalizers of gain 1 and offset 0.

    A channel whose new memory would hold NaN or infinity keeps the old one, as after the overflow
    of a loss scaled for half precision.
    """
    n = at_least_one(batch.count)
    share = normalizer.share
    grad = sum_grad / n
    grad_xhat = rho * (sum_grad_x - normalizer.mean_low * sum_grad) / n
    mean, var = _moments_of_xhat(normalizer, batch, rho)
    left = (1 - share) * grad  # E[h]
    left_xhat = grad_xhat - share * (var * grad_xhat + mean * grad)  # E[h·x̂]

    old = 1 - rate
    constant = old * memory.constant + rate * left
    slope = old * memory.slope + rate * left_xhat
    # [[1, βA], [βA, 1 - β + βE[x̂²]]]·(M', R') = (constant, slope), solved by elimination.
    slope = (slope - rate * mean * constant) / (old * (1 + rate * mean * mean) + rate * var)
    constant = constant - rate * mean * slope
    finite = xp.logical_and(xp.isfinite(constant), xp.isfinite(slope))
    return GradientMemory(
        xp.where(finite, constant, memory.constant), xp.where(finite, slope, memory.slope)
    )


def _moments_of_xhat(normalizer: Normalizer, batch: Moments, rho: Array) -> tuple[Array, Array]:
    """Mean and biased variance of x̂ over the batch."""
    gap = (batch.mean - normalizer.mean) + (batch.mean_low - normalizer.mean_low)
    return gap * rho, batch.var * rho * rho


def with_memory(
    flowing: GradientCoefficients,
    memory: GradientMemory,
    normalizer: Normalizer,
    scale: Array,
    rho: Array,
) -> GradientCoefficients:
    """The map's slope and constant with the remembered part taken off.

        -γρ·(M + R·x̂),  x̂ = ((x - mean) - mean_low)·ρ

    `flowing` is what flows through the share, of `gradient_coefficients`; `scale` is γ·ρ.
    """
    slope = -scale * rho * memory.slope
    constant = -scale * memory.constant - slope * normalizer.mean_low
    return GradientCoefficients(flowing.slope + slope, flowing.constant + constant)
