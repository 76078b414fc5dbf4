"""`Renorm`: batch renormalization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steadynorm.statistics.moments import Array, Moments, difference
from steadynorm.statistics.normalizer import Normalizer
from steadynorm.statistics.policies.base import Context, Policy, check_number
from steadynorm.statistics.running import RunningStatistics


@dataclass(frozen=True)
class Renorm(Policy):
    """The batch normalizes, corrected towards the running statistics (Ioffe 2017).

    With σ_B = √(v + ε) and σ = √(running_var + ε), from the statistics before the update:

        m = μ    u = v    r = clip(σ_B/σ, 1/r, r)    d = clip((μ - running_mean)/σ, -d, d)    α = 1

    where the bounds grow with the batches seen, t: 1 and 0 (plain batch normalization) for `warmup`
    batches, then linearly to `r_max` over the next `r_ramp` and to `d_max` over the next `d_ramp`.
    No gradient flows through r and d. The paper keeps a running standard deviation; we keep
    `running_var`, so that checkpoints stay exchangeable.

    >>> Renorm().bounds(5000)
    (1.0, 0.0)
    >>> Renorm().bounds(40000)
    (3.0, 5.0)
    """

    r_max: float = 3.0
    d_max: float = 5.0
    warmup: int = 5000
    r_ramp: int = 35000
    d_ramp: int = 20000

    def __post_init__(self) -> None:
        check_number("Renorm", "r_max", self.r_max, low=1)
        check_number("Renorm", "d_max", self.d_max, low=0)
        for name in ("warmup", "r_ramp", "d_ramp"):
            check_number("Renorm", name, getattr(self, name), low=0, whole=True)

    def bounds(self, batches: Array | None, *, xp: Any = None) -> tuple[Array, Array]:
        """The bounds of r and d after `batches` batches; None reads as "many"."""

        def risen(ramp: int) -> Array:
            if batches is None:
                return 1.0
            done = (batches - self.warmup) / max(ramp, 1)
            if isinstance(done, int | float):
                return min(max(done, 0.0), 1.0)
            return xp.clip(done, 0.0, 1.0)

        return 1 + (self.r_max - 1) * risen(self.r_ramp), self.d_max * risen(self.d_ramp)

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        assert running is not None
        xp = context.xp
        r_bound, d_bound = self.bounds(running.batches, xp=xp)
        rho = (running.var + context.eps) ** -0.5
        delta, delta_low = difference(batch, running.mean)
        gain = _clip((batch.var + context.eps) ** 0.5 * rho, 1 / r_bound, r_bound, xp)
        offset = _clip((delta + delta_low) * rho, -d_bound, d_bound, xp)
        return Normalizer(batch.mean, batch.mean_low, batch.var, gain, offset, 1.0)


def _clip(value: Array, low: Array, high: Array, xp: Any) -> Array:
    value = xp.where(value < low, low, value)
    return xp.where(value > high, high, value)
