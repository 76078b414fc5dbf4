"""Times side by side: every round times each contender once, so that drift hits all alike."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple

Seconds = Mapping[str, Sequence[float]]
"""Seconds of a call, round by round, of each contender."""


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    least: float = 1e-3,
    tick: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds that a call of each contender takes, round by round, in another order each round.

    Everybody is called twice beforehand, for first use may compile. A quick call is repeated until
    the slowest contender's calls of a round take `least` seconds. `tick` is told of the two rounds
    before and of each that follows, one by one.
    """
    slowest = 0.0
    for _ in range(2):
        slowest = max(_seconds(contender, 1) for contender in contenders.values())
        if tick is not None:
            tick(1)
    repeats = max(1, math.ceil(least / max(slowest, 1e-9)))
    names = list(contenders)
    found: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                found[name].append(_seconds(contenders[name], repeats))
            if tick is not None:
                tick(1)
    finally:
        if collecting:
            gc.enable()
    return found


def _seconds(contender: Callable[[], object], repeats: int) -> float:
    start = perf_counter()
    for _ in range(repeats):
        contender()
    return (perf_counter() - start) / repeats


class Ratio(NamedTuple):
    """How many times as long one takes as the other: the median over the rounds, and quartiles."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f}× ({self.low:.2f} to {self.high:.2f})"

    @property
    def words(self) -> str:
        """How fast, and that it is slower, or that the rounds do not tell."""
        if self.low <= 1 <= self.high:
            return f"neither faster nor slower for certain ({self.middle:.2f}×)"
        words = f"{self.middle:.2f} times as fast"
        return words if self.middle > 1 else f"slower, {words}"


def ratio(before: Sequence[float], after: Sequence[float]) -> Ratio:
    """How many times as fast `after` is, from rounds that timed both.

    >>> print(ratio([2.0, 2.0, 4.0], [1.0, 1.0, 1.0]))
    2.00× (2.00 to 4.00)
    """
    if len(before) < 2:
        raise ValueError(f"ratio: at least 2 rounds must have been timed; got {len(before)}.")
    rounds = [a / b for a, b in zip(before, after, strict=True)]
    return Ratio(*statistics.quantiles(rounds, n=4))


def milliseconds(seconds: Sequence[float]) -> float:
    """The median, in milliseconds."""
    return 1e3 * statistics.median(seconds)
