"""`Batch`: plain batch normalization."""

from __future__ import annotations

from dataclasses import dataclass

from steadynorm.statistics.moments import Moments
from steadynorm.statistics.normalizer import Normalizer, of_batch
from steadynorm.statistics.policies.base import Context, Policy
from steadynorm.statistics.running import RunningStatistics


@dataclass(frozen=True)
class Batch(Policy):
    """The batch's own mean and biased variance normalize it (Ioffe & Szegedy 2015, Alg. 1).

        m = μ        u = v        α = 1

    Needs at least two values per channel. Keeps torch's running averages.

    >>> Batch()
    Batch()
    """

    needs_running = False
    batch_alone = True
    counts_batches = False

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        return of_batch(batch)
