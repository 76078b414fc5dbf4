"""What JAX and Keras have in common as array namespaces: nothing writes into an array."""

from __future__ import annotations

from typing import Any

from steadynorm.statistics.moments import Array


class ImmutableArrays:
    """Sums and sums of products for a namespace with `square`, `size`, `maximum` and `sum_over`."""

    def const(self, number: float, like: Array) -> float:
        """Beside a plain number, operators keep the array's type."""
        return number

    def sum(self: Any, x: Array, axes: tuple[int, ...]) -> Array:
        """The sum, one axis after the other, the last first.

        XLA on the CPU adds hundreds of values of a channel sequentially; for data near 1e6, whose
        roundings repeat, that cost the variance of 448 values 2e-6.
        """
        for axis in sorted(axes, reverse=True):  # the first one first takes XLA 20 times as long
            x = self.sum_over(x, axis)
        return x

    def mean(self: Any, x: Array, axes: tuple[int, ...]) -> Array:
        """The mean over `axes`; 0 where there is no value."""
        size = self.size(x, axes)
        return self.sum(x, axes) / (
            max(size, 1) if isinstance(size, int) else self.maximum(size, 1)
        )

    def mean_and_variance(self: Any, x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
        """The mean, and the biased variance about it."""
        mean = self.mean(x, axes)
        return mean, self.mean(self.square(x - mean), axes)

    def add(self, a: Array, b: Array, *, out: Array) -> Array:
        """`a + b`; `out` is not needed."""
        return a + b

    def addcmul(self, a: Array, b: Array, c: Array, *, out: Array) -> Array:
        """`a + b·c`; `out` is not needed."""
        return a + b * c
