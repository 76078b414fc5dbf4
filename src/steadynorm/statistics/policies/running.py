"""`Running`: the running averages normalize in training too."""

from __future__ import annotations

from dataclasses import dataclass

from steadynorm.statistics.moments import Array, Moments
from steadynorm.statistics.normalizer import Normalizer
from steadynorm.statistics.policies.base import Context, Policy
from steadynorm.statistics.running import (
    RunningStatistics,
    blend,
    first_alone,
    new_batch_weight,
    update_average,
)


@dataclass(frozen=True)
class Running(Policy):
    """The running averages, this batch included, normalize in training too.

    With a = max(momentum, 1/(t + 1)), t the batches seen before:

        running_mean ← (1 - a)·running_mean + a·μ        running_var ← (1 - a)·running_var + a·v
        m = the new running_mean        u = the new running_var        α = a

    The first batch stands alone, so the initial 0 and 1 have no influence. Keeps the biased
    variance, with which it normalizes. Nearest peer: equinox, `mode="ema"`.

    >>> Running()
    Running()
    """

    unbiased = False

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        assert running is not None
        weight = self._weight(running, context)
        mean, low, _ = blend(batch, running, weight)
        var = (1 - weight) * running.var + weight * batch.var
        return Normalizer(mean, low, var, 1.0, 0.0, weight)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        weight = self._weight(running, context)
        return update_average(running, batch, weight, unbiased=False, xp=context.xp)

    @staticmethod
    def _weight(running: RunningStatistics, context: Context) -> Array:
        weight = new_batch_weight(context.momentum, running.batches)
        return first_alone(weight, running.batches, xp=context.xp)
