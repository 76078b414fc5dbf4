"""Elementary functions that Triton has not, or not in its interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(z):
    """exp(z) - 1 for z at most 0; a Taylor polynomial, off by 2e-9, where that would cancel."""
    p = 1.0 + z * (1 / 8)
    for k in tl.static_range(7, 1, -1):
        p = tl.fma(z * (1 / k), p, 1.0)
    return tl.where(z > -0.35, z * p, tl.exp(z) - 1.0)


@triton.jit
def tanh(z):
    """By e^(-2|z|) - 1, which neither overflows nor cancels."""
    t = expm1(-2.0 * tl.abs(z))
    t = -tl.div_rn(t, t + 2.0)
    return tl.where(z < 0.0, -t, t)


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z)."""
    return tl.div_rn(1.0, 1.0 + tl.exp(-z))


@triton.jit
def normal_cdf(z):
    """The standard normal distribution, by the error function."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
