"""`Steady`: batch and running statistics, each weighted by how much it has seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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

    With N samples in the batch (those with a valid position, where there is a mask), n = N of them
    (without a `window` n counts its values per channel), t batches seen before, and
    δ = μ - running_mean:

        k = max(n/(n + prior), 1/(t + 1))
        m = running_mean + k·δ
        u = (1 - k)·running_var + k·v + k(1 - k)·δ²                    α = k

    Then the running statistics move with a = max(N/(N + horizon), 1/(t + 1)):

        running_mean ← running_mean + a·δ
        running_var  ← (1 - a)·running_var + a·v + a(1 - a)·δ²

    which merges two parts of weight 1 - a and a (Chan's formula): the running variance is the
    biased variance of everything seen, and right for batches of one, where v is 0.

    The share k passes on its part of the gradient through mean and variance. The rest is
    remembered, at the rate N/(N + window), and taken off the gradient that the share leaves, so
    that no part of it along 1 or x̂ lasts; see `remember`.

    `prior`: the weight of the running statistics, in what n counts; 0 equals `Batch`, where the
    batch has a variance; with a `window`, in gradients up to what ε is of that variance.
    `horizon`: how many samples the running averages span, at every batch size. It replaces
    `momentum`: 640 samples equal momentum 0.1 at batch 64.
    `window`: how many samples the memory of the gradient spans. None keeps none, and is one-way:
    `Steady(prior=4, window=None)` trains small networks from about two samples on, not batches of
    one nor deep networks. The memory is kept by PyTorch's layers and by Keras's on torch; elsewhere
    `Steady` is one-way, as with None.

    No gradient flows through k or the δ² term. Ours; kin of Yong et al. 2020 (momentum batch
    normalization) and Schneider et al. 2020 (prior-weighted statistics); of the gradient's memory
    Yan et al. 2020 and Chiley et al. 2019.

    >>> Steady()
    Steady(prior=16, horizon=640, window=16)
    """

    prior: float = 16
    horizon: float = 640
    window: float | None = 16

    unbiased = False
    counts_samples = True
    uses_momentum = False

    def __post_init__(self) -> None:
        check_number("Steady", "prior", self.prior, low=0)
        check_number("Steady", "horizon", self.horizon, low=0)
        if self.window is not None:
            check_number("Steady", "window", self.window, low=0, strict=True)

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        assert running is not None  # the caller checks needs_running
        share = self.share(batch.count, context.samples, running.batches, xp=context.xp)
        mean, low, var = blend(batch, running, share)
        return Normalizer(mean, low, var, 1.0, 0.0, share)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        weight = self.weight(context.samples, running.batches, xp=context.xp)
        return merge_average(running, batch, weight)

    def share(self, count: Array, samples: Array, batches: Array | None, *, xp: Any) -> Array:
        """k, for a batch of `count` values per channel after `batches` others."""
        known = count if self.window is None else samples
        return first_alone(known / (at_least_one(known) + self.prior), batches, xp=xp)

    def weight(self, samples: Array, batches: Array | None, *, xp: Any) -> Array:
        """a, for a batch of so many samples after `batches` others."""
        return first_alone(samples / (at_least_one(samples) + self.horizon), batches, xp=xp)

    def one_way(self) -> Steady:
        return replace(self, window=None)

    def gradient_rate(self, samples: Array) -> Array | None:
        return None if self.window is None else samples / (samples + self.window)
