"""`Steady`: batch and running statistics, each weighted by how much it has seen."""

from __future__ import annotations

from dataclasses import dataclass

from steadynorm.statistics.moments import Array, Moments, at_least_one
from steadynorm.statistics.normalizer import Normalizer
from steadynorm.statistics.policies.base import Context, Policy, check_number
from steadynorm.statistics.running import (
    RunningStatistics,
    blend,
    first_alone,
    merge_average,
)


@dataclass(frozen=True)
class Steady(Policy):
    """Batch and running statistics, each weighted by what it has seen: for every batch size.

    With n values per channel in the batch, N samples, t batches seen before, δ = μ - running_mean:

        k = max(n/(n + prior), 1/(t + 1))
        m = running_mean + k·δ
        u = (1 - k)·running_var + k·v + k(1 - k)·δ²                    α = k

    Then the running statistics move with a = max(N/(N + horizon), 1/(t + 1)):

        running_mean ← running_mean + a·δ
        running_var  ← (1 - a)·running_var + a·v + a(1 - a)·δ²

    which merges two parts of weight 1 - a and a (Chan's formula): the running variance is the
    biased variance of everything seen, and right for batches of one, where v is 0.

    `prior`: the weight of the running statistics, in values; 0 equals `Batch`, where n > 1.
    `horizon`: how many samples the running averages span, at every batch size. It replaces
    `momentum`: 640 samples equal momentum 0.1 at batch 64.

    No gradient flows through k or the δ² term. Ours; kin of Yong et al. 2020 (momentum batch
    normalization) and Schneider et al. 2020 (prior-weighted statistics).

    >>> Steady()
    Steady(prior=4.0, horizon=640)
    """

    prior: float = 4.0
    horizon: float = 640

    unbiased = False
    uses_momentum = False

    def __post_init__(self) -> None:
        check_number("Steady", "prior", self.prior, low=0)
        check_number("Steady", "horizon", self.horizon, low=0)

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        assert running is not None  # the caller checks needs_running
        share = self._weight(batch.count, self.prior, running, context)
        mean, low, var = blend(batch, running, share)
        return Normalizer(mean, low, var, 1.0, 0.0, share)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        weight = self._weight(context.samples, self.horizon, running, context)
        return merge_average(running, batch, weight)

    @staticmethod
    def _weight(
        known: Array, remembered: float, running: RunningStatistics, context: Context
    ) -> Array:
        weight = known / (at_least_one(known) + remembered)
        return first_alone(weight, running.batches, xp=context.xp)
