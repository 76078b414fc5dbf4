"""One training batch under a policy."""

from __future__ import annotations

from typing import Any

from steadynorm.statistics.moments import Array, Moments, is_number
from steadynorm.statistics.normalizer import Normalizer, of_running
from steadynorm.statistics.policies.base import Context, Policy
from steadynorm.statistics.running import RunningStatistics


def _standard(like: Array) -> Normalizer:
    """Leaves x as it is: for a batch without a value where nothing was ever tracked."""
    return Normalizer(like * 0, 0.0, like * 0 + 1, 1.0, 0.0, 0.0)


def usable(batch: Moments, *, skip_nonfinite: bool, xp: Any) -> Array | bool:
    """Where a batch may move the running statistics: a boolean array, or True or False.

    Not without a value; with counts of their own, channel by channel. With `skip_nonfinite` nowhere
    if the moments hold NaN or infinity.
    """
    known = is_number(batch.count)
    if known and batch.count == 0:
        return False
    some = True if known else batch.count > 0  # a compiler's symbol is a number, but not its test
    if not known and len(batch.mean.shape) > 1:
        some = xp.any(some)  # groups
    if not skip_nonfinite:
        return some
    finite = xp.all(xp.logical_and(xp.isfinite(batch.mean), xp.isfinite(batch.var)))
    return finite if known else xp.logical_and(some, finite)


def step(
    policy: Policy,
    batch: Moments,
    running: RunningStatistics | None,
    context: Context,
    *,
    skip_nonfinite: bool = False,
) -> tuple[Normalizer, RunningStatistics | None]:
    """One training batch under a policy: what normalizes it, and the running statistics after it.

    A batch (or a group) without a value is normalized by the running statistics and updates
    nothing. With `skip_nonfinite` a batch whose moments hold NaN or infinity updates nothing
    either.
    """
    xp = context.xp
    idle = of_running(running) if running is not None else _standard(batch.var)
    keep = usable(batch, skip_nonfinite=skip_nonfinite, xp=xp)
    if keep is False:
        return idle, running
    normalizer = policy.normalizer(batch, running, context)
    if not is_number(batch.count):
        some = batch.count > 0 if len(batch.mean.shape) > 1 else xp.any(batch.count > 0)
        zero = 0 * batch.count  # `where` of two plain numbers would be float32 in torch
        normalizer = Normalizer(
            *(xp.where(some, a + zero, b + zero) for a, b in zip(normalizer, idle, strict=True))
        )
    if running is None:
        return normalizer, None
    after = policy.update(batch, running, context)
    return normalizer, after if keep is True else _select(keep, after, running, xp)


def _select(
    keep: Array, after: RunningStatistics, before: RunningStatistics, xp: Any
) -> RunningStatistics:
    mean, var = (xp.where(keep, new, old) for new, old in zip(after[:2], before[:2], strict=True))
    if after.batches is None:
        return RunningStatistics(mean, var, before.batches)
    return RunningStatistics(mean, var, xp.where(xp.any(keep), after.batches, before.batches))
