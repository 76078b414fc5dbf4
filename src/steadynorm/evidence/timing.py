"""Interleaved timing: every round times each contender once, so that drift affects all alike."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import NamedTuple, TypeVar

T = TypeVar("T")
Seconds = Mapping[str, Sequence[float]]
"""Seconds of a call, round by round, of each contender."""


def in_turns(
    contenders: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    warm_up: int = 0,
    tick: Callable[[int], None] | None = None,
) -> dict[str, list[T]]:
    """What each contender returns, round by round, without garbage collection. The order rotates,
    since whoever comes next finds other caches. The first `warm_up` rounds do not count.
    """
    names = list(contenders)
    found: dict[str, list[T]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(-warm_up, rounds):
            first = max(number, 0) % len(names)
            for name in names[first:] + names[:first]:
                answer = contenders[name]()
                if number >= 0:
                    found[name].append(answer)
            if tick is not None:
                tick(1)
    finally:
        if enabled:
            gc.enable()
    return found


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    least: float = 1e-3,
    tick: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds that a call of each contender takes, round by round.

    Two rounds before do not count, for first use may compile. A quick call is repeated until the
    slowest contender's calls of a round take `least` seconds. `tick` is called after every round,
    the first two included.
    """
    slowest = 0.0
    for _ in range(2):
        slowest = max(seconds(contender) for contender in contenders.values())
        if tick is not None:
            tick(1)
    repeats = max(1, math.ceil(least / max(slowest, 1e-9)))
    timed = {
        name: lambda contender=contender: seconds(contender, repeats)
        for name, contender in contenders.items()
    }
    return in_turns(timed, rounds, tick=tick)


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call, the mean of `repeats`."""
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


class SpeedUp(NamedTuple):
    """How many times as long one takes as the other: the median over the rounds, and quartiles."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.2f}× ({self.low:.2f} to {self.high:.2f})"

    @property
    def words(self) -> str:
        """How fast, and whether it is slower or the rounds do not decide."""
        if self.low <= 1 <= self.high:
            return f"neither faster nor slower for certain ({self.middle:.2f}×)"
        words = f"{self.middle:.2f} times as fast"
        return words if self.middle > 1 else f"slower, {words}"


def speed_up(before: Sequence[float], after: Sequence[float]) -> SpeedUp:
    """How many times as fast `after` is, from rounds that timed both.

    >>> print(speed_up([2.0, 2.0, 4.0], [1.0, 1.0, 1.0]))
    2.00× (2.00 to 4.00)
    """
    if len(before) < 2:
        raise ValueError(f"speed_up: at least 2 rounds must have been timed; got {len(before)}.")
    rounds = [a / b for a, b in zip(before, after, strict=True)]
    return SpeedUp(*statistics.quantiles(rounds, n=4))


def milliseconds(seconds: Sequence[float]) -> float:
    """The median, in milliseconds."""
    return 1e3 * statistics.median(seconds)
