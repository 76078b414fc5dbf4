"""What normalized a layer's batches in forwards that activation checkpointing may run again.

A policy that normalizes by running statistics must meet them in the second run as they were in the
first. What normalized a first run is found again by the batch's own moments.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steadynorm.statistics.moments import Moments
from steadynorm.statistics.normalizer import Normalizer

REMEMBERED = 64
"""Forwards of one layer that may wait for their second run at a time; channel-sized each."""


@dataclass(eq=False, slots=True)
class _FirstRun:
    batch: Moments
    normalizer: Normalizer
    region: Any  # a weak reference to what stands for the region; None where it is not known
    repeated: bool = False


class FirstRuns:
    """First runs of one layer. `equal` says whether two arrays have the same values.

    `cure` ends the message of the error that is raised where a choice is left.
    """

    def __init__(self, equal: Callable[[Any, Any], bool], cure: str) -> None:
        self._equal, self._cure = equal, cure
        self._runs: deque[_FirstRun] = deque(maxlen=REMEMBERED)

    def __len__(self) -> int:
        return len(self._runs)

    def remember(self, batch: Moments, normalizer: Normalizer, region: Any = None) -> None:
        """Keep what normalized this batch in that region; forget what has been repeated."""
        waiting = [run for run in self._runs if not run.repeated]
        reference = None if region is None else weakref.ref(region)
        self._runs = deque((*waiting, _FirstRun(batch, normalizer, reference)), maxlen=REMEMBERED)

    def recall(self, batch: Moments, owner: str) -> Normalizer | None:
        """What normalized a batch of the same moments in its first run; None if that is not known.

        Of several, the last that waits: a backward pass goes through regions in reverse order, but
        through one region from its beginning. NotImplementedError where that does not tell.
        """
        alike = [
            run
            for run in self._runs
            if self._equal(run.batch.mean, batch.mean) and self._equal(run.batch.var, batch.var)
        ]
        if not alike:
            return None
        waiting = [run for run in alike if not run.repeated] or alike
        run = waiting[-1]
        if not all(self._same(run.normalizer, other.normalizer) for other in waiting):
            if run.repeated or run.region is None:
                raise NotImplementedError(
                    f"{owner}: activation checkpointing repeats one of {len(waiting)} forwards "
                    f"that saw the same batch with other running statistics, and which one cannot "
                    f"be told. {self._cure}"
                )
            run = next(each for each in waiting if each.region == run.region)
        run.repeated = True
        return run.normalizer

    def _same(self, one: Normalizer, other: Normalizer) -> bool:
        return all(
            a == b if isinstance(a, int | float) and isinstance(b, int | float)
            else self._equal(a, b)
            for a, b in zip(one, other, strict=True)
        )  # fmt: skip
