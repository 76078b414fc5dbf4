"""One training batch under a policy."""

from __future__ import annotations

from steadynorm.statistics.moments import Array, Moments
from steadynorm.statistics.normalizer import Normalizer, of_running
from steadynorm.statistics.policies.base import Context, Policy
from steadynorm.statistics.running import RunningStatistics


def _standard(like: Array) -> Normalizer:
    """Leaves x as it is: for a batch without a value where nothing was ever tracked."""
    return Normalizer(like * 0, 0.0, like * 0 + 1, 1.0, 0.0, 0.0)


def step(
    policy: Policy,
    batch: Moments,
    running: RunningStatistics | None,
    context: Context,
    *,
    skip_nonfinite: bool = False,
) -> tuple[Normalizer, RunningStatistics | None]:
    """One training batch under a policy: what normalizes it, and the running statistics after it.

    A batch without a value is normalized by the running statistics and updates nothing. With
    `skip_nonfinite` a batch whose moments hold NaN or infinity updates nothing either.
    """
    xp = context.xp
    idle = of_running(running) if running is not None else _standard(batch.var)
    known = isinstance(batch.count, int | float)
    if known and batch.count == 0:
        return idle, running
    normalizer = policy.normalizer(batch, running, context)
    counts = None if known else batch.count > 0
    if counts is not None:
        zero = 0 * batch.count  # `where` of two plain numbers would be float32 in torch
        normalizer = Normalizer(
            *(xp.where(counts, a + zero, b + zero) for a, b in zip(normalizer, idle, strict=True))
        )
    if running is None:
        return normalizer, None
    after = policy.update(batch, running, context)
    keep = None if counts is None else xp.any(counts)
    if skip_nonfinite:
        finite = xp.all(xp.logical_and(xp.isfinite(batch.mean), xp.isfinite(batch.var)))
        keep = finite if keep is None else xp.logical_and(keep, finite)
    if keep is not None:
        after = RunningStatistics(
            *(
                old if new is None else xp.where(keep, new, old)
                for new, old in zip(after, running, strict=True)
            )
        )
    return normalizer, after
