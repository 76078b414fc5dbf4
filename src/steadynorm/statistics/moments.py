"""Moments of a batch per channel, and merging the moments of several parts into one."""

from __future__ import annotations

from typing import Any, NamedTuple

Array = Any  # an array of NumPy, torch, jax.numpy or Keras


class Moments(NamedTuple):
    """How many values a channel has, their mean, and their biased variance.

    `mean` is rounded to the array's type; `mean_low` is what the rounding lost, so that
    `mean + mean_low` is the mean to about twice the precision. With data near 1e6 and a standard
    deviation of 1 a float32 mean alone is off by up to 0.03, and so would be the output.

    Shapes: `mean`, `mean_low`, `var` are (C,), or (G, C) for G groups; `count` is a number, or an
    array that broadcasts against them ((G, 1) for groups).
    """

    count: Array
    mean: Array
    var: Array
    mean_low: Array


def is_number(value: Array) -> bool:
    """Whether it is a plain number, or a tracer's symbol for one, and no array."""
    return isinstance(value, int | float) or not hasattr(value, "shape")


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum `a + b` and exactly what the rounding lost (Knuth's TwoSum)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)) + (b - b_part)


def at_least_one(count: Array) -> Array:
    """`count`, or 1 where it is 0, so that nothing is divided by 0."""
    return count + 0.0**count  # 0 to the power 0 is 1; TensorFlow adds no boolean to a float


def difference(batch: Moments, center: Array) -> tuple[Array, Array]:
    """`mean - center` to twice the precision, as a pair (rounded, what the rounding lost)."""
    high = batch.mean - center
    part = high - batch.mean
    low = (batch.mean - (high - part)) - (center + part)  # what two_sum gives of the negated center
    return high, low + batch.mean_low


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of two disjoint parts seen as one.

    Chan, Golub & LeVeque 1979, with w = n_b / (n_a + n_b) and δ = mean_b - mean_a:

        mean = mean_a + w·δ        var = (1 - w)·var_a + w·var_b + w·(1 - w)·δ²

    All terms of the variance are at least 0, so it is never negative. The variance stays biased.
    Two empty parts give an empty part.

    >>> import numpy as np
    >>> left = Moments(2, np.array([1.0]), np.array([1.0]), np.array([0.0]))  # of 0 and 2
    >>> right = Moments(1, np.array([4.0]), np.array([0.0]), np.array([0.0]))  # of 4
    >>> merged = merge(left, right)  # of 0, 2 and 4
    >>> int(merged.count), float(merged.mean[0]), round(float(merged.var[0]), 6)
    (3, 2.0, 2.666667)
    """
    count = a.count + b.count
    weight = b.count / at_least_one(count)
    delta, delta_low = difference(b, a.mean)
    delta_low = delta_low - a.mean_low
    mean, low = two_sum(a.mean, weight * delta)
    spread = delta + delta_low
    return Moments(
        count,
        mean,
        (1 - weight) * a.var + weight * b.var + weight * (1 - weight) * spread * spread,
        low + weight * delta_low + a.mean_low,
    )


def pool(parts: Moments, *, xp: Any) -> Moments:
    """Moments of many disjoint parts seen as one; the parts stand along the first axis.

    The same result as merging them one by one, in one step. Parts with count 0 have no say, but
    must hold finite numbers. With no value at all the result is empty: count, mean and var are 0.

    Shapes: `count` (P, 1), the others (P, C); the result's `count` is (1,), the others (C,).
    """
    count = xp.sum(parts.count, axis=0)
    weight = parts.count / xp.where(count > 0, count, 1.0)  # TensorFlow adds no bool to a float
    center = xp.sum(weight * parts.mean, axis=0)  # a pivot near the mean; its rounding is repaired
    delta, low = difference(parts, center)
    delta = delta + low
    step = xp.sum(weight * delta, axis=0)
    away = delta - step
    mean, mean_low = two_sum(center, step)
    return Moments(count, mean, xp.sum(weight * (parts.var + away * away), axis=0), mean_low)


def contribution(part: Moments, whole: Moments) -> tuple[Array, Array]:
    """What one part adds to the mean and to the variance of the whole, about the whole's mean.

        w·(mean_part - mean)        w·(var_part + (mean_part - mean)²)        w = n_part / n

    Summed over all parts: 0 and the whole's variance. For gradients when the whole's mean is held
    fixed; as it moves by δ, the variance about it is less by δ².
    """
    weight = part.count / at_least_one(whole.count)
    away = (part.mean - whole.mean) + (part.mean_low - whole.mean_low)
    return weight * away, weight * (part.var + away * away)
