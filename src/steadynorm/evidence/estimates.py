"""Means, paired differences and ratios of independent runs, each with Student's 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from statistics import fmean, stdev
from typing import NamedTuple


class Estimate(NamedTuple):
    """A value with Student's 95 % interval from `low` to `high`, over `seeds` independent runs.

    A single run has no interval: `low` and `high` are then the value itself.
    """

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        return self.text()

    def text(self, digits: int | None = None) -> str:
        """Value and interval, with `digits` decimals or else three significant digits.

        >>> Estimate(2.0, 1.5, 2.5, 5).text(1)
        '2.0 (1.5 to 2.5)'
        """
        form = ".3g" if digits is None else f".{digits}f"
        value, low, high = (format(part, form) for part in self[:3])
        if self.seeds < 2:
            return value if digits is not None else f"{value} (one seed)"
        return f"{value} ({low} to {high})"

    @property
    def plus_minus(self) -> str:
        """Value ± half the interval, with one decimal.

        >>> mean([1.0, 2.0, 3.0]).plus_minus
        '2.0 ± 2.5'
        """
        half = f" ± {(self.high - self.low) / 2:.1f}" if self.seeds > 1 else ""
        return f"{self.value:.1f}{half}"


@lru_cache
def _quantile(freedom: int) -> float:
    """Student's t, two-sided 95 %, to the three decimals of printed tables."""
    from scipy.special import stdtrit

    return round(float(stdtrit(freedom, 0.975)), 3)


def mean(values: Iterable[float]) -> Estimate:
    """The mean of independent runs.

    >>> print(mean([1.0, 2.0, 3.0]))
    2 (-0.484 to 4.48)
    """
    runs = [float(value) for value in values]
    if not runs:
        raise ValueError("mean: `values` must hold at least one run; got none.")
    value, count = fmean(runs), len(runs)
    half = _quantile(count - 1) * stdev(runs) / math.sqrt(count) if count > 1 else 0.0
    return Estimate(value, value - half, value + half, count)


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of `first` - `second`, paired: runs at the same place share their seed.

    >>> print(difference([5.0, 6.0, 7.0], [3.0, 4.0, 5.0]))
    2 (2 to 2)
    """
    return mean(a - b for a, b in zip(first, second, strict=True))


def ratio(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The geometric mean of `first` / `second`, paired; the interval is that of the logarithms.

    >>> print(ratio([4.0, 9.0], [2.0, 4.5]))
    2 (2 to 2)
    """
    for name, values in (("first", first), ("second", second)):
        if min(values, default=1.0) <= 0:
            raise ValueError(f"ratio: `{name}` must be above 0; got {min(values)!r}.")
    logs = mean(math.log(a / b) for a, b in zip(first, second, strict=True))
    value, low, high = (math.exp(part) for part in logs[:3])
    return Estimate(value, low, high, logs.seeds)
