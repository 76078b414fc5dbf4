"""`Frozen`: the running statistics, never updated."""

from __future__ import annotations

from dataclasses import dataclass

from steadynorm.statistics.moments import Moments
from steadynorm.statistics.normalizer import Normalizer, of_running
from steadynorm.statistics.policies.base import Context, Policy
from steadynorm.statistics.running import RunningStatistics


@dataclass(frozen=True)
class Frozen(Policy):
    """The running statistics normalize and are never updated; gradient flows through x, γ, β only.

        m = running_mean        u = running_var        α = 0

    Survives `model.train()`. Every policy does this in inference (Ioffe & Szegedy 2015, Alg. 2).

    >>> Frozen()
    Frozen()
    """

    counts_batches = False
    uses_momentum = False

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        assert running is not None
        return of_running(running)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        return running
