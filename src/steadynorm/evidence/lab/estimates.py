"""What independent runs say: means, paired differences and ratios, each with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from steadynorm.evidence.lab.runs import interval


class Estimate(NamedTuple):
    """A value with Student's 95 % interval from `low` to `high`, over `seeds` independent runs.

    A single run has no interval: `low` and `high` are then the value itself.
    """

    value: float
    low: float
    high: float
    seeds: int

    def __str__(self) -> str:
        if self.seeds < 2:
            return f"{self.value:.3g} (one seed)"
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    def text(self, digits: int) -> str:
        """With so many decimals.

        >>> Estimate(2.0, 1.5, 2.5, 5).text(1)
        '2.0 (1.5 to 2.5)'
        """
        if self.seeds < 2:
            return f"{self.value:.{digits}f}"
        return f"{self.value:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def mean(values: Sequence[float]) -> Estimate:
    """The mean of independent runs.

    >>> print(mean([1.0, 2.0, 3.0]))
    2 (-0.484 to 4.48)
    """
    found = interval([float(value) for value in values])
    return Estimate(found.mean, found.mean - found.half, found.mean + found.half, found.runs)


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The mean of `first` - `second`, paired: the runs at the same place share their seed.

    >>> print(difference([5.0, 6.0, 7.0], [3.0, 4.0, 5.0]))
    2 (2 to 2)
    """
    return mean([a - b for a, b in zip(first, second, strict=True)])


def ratio(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """The geometric mean of `first` / `second`, paired; the interval is taken of the logarithms.

    >>> print(ratio([4.0, 9.0], [2.0, 4.5]))
    2 (2 to 2)
    """
    for name, values in (("first", first), ("second", second)):
        if min(values, default=1.0) <= 0:
            raise ValueError(f"ratio: `{name}` must be above 0; got {min(values)!r}.")
    logs = mean([math.log(a / b) for a, b in zip(first, second, strict=True)])
    value, low, high = (math.exp(part) for part in logs[:3])
    return Estimate(value, low, high, logs.seeds)
