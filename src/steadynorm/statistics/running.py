"""Running averages of the moments, and what every framework means by `momentum`."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

from steadynorm.statistics.moments import Array, Moments, difference, is_number, two_sum


class RunningStatistics(NamedTuple):
    """Averages kept over training.

    `mean` and `var` are (C,). `batches` is how many batches they have seen: a number or a scalar
    array; None where that is not known, which reads as "many".
    """

    mean: Array
    var: Array
    batches: Array | None


class Convention(NamedTuple):
    """What one framework's batch normalization means by its settings.

    `momentum_weighs`: whether `momentum` is the weight of the "new" batch or of the "old" average.
    `keeps`: whether the running variance is "biased" (divided by n) or "unbiased" (by n - 1).
    """

    momentum_weighs: Literal["new", "old"]
    momentum: float
    eps: float
    keeps: Literal["biased", "unbiased"]


CONVENTIONS: dict[str, Convention] = {
    "torch": Convention("new", 0.1, 1e-5, "unbiased"),
    "keras": Convention("old", 0.99, 1e-3, "biased"),
    "flax": Convention("old", 0.99, 1e-5, "biased"),
    "equinox": Convention("old", 0.99, 1e-5, "biased"),
    "mlx": Convention("new", 0.1, 1e-5, "unbiased"),
}


def _convention(name: str) -> Convention:
    try:
        return CONVENTIONS[name]
    except KeyError:
        known = ", ".join(CONVENTIONS)
        raise ValueError(f"convention must be one of {known}; got {name!r}.") from None


def convert_momentum(momentum: float, source: str, target: str) -> float:
    """`momentum` of one framework in the words of another.

    torch and MLX: `running = (1 - momentum)·running + momentum·batch`.
    Keras, flax, equinox: `running = momentum·running + (1 - momentum)·batch`.

    >>> convert_momentum(0.1, "torch", "keras")
    0.9
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1]; got {momentum!r}.")
    same = _convention(source).momentum_weighs == _convention(target).momentum_weighs
    return momentum if same else 1 - momentum


def bessel(count: Array, *, xp: Any) -> Array:
    """n / (n - 1), the factor from a biased to an unbiased variance; 1 where n is 1 or less."""
    if is_number(count):
        return count / (count - 1) if count > 1 else 1.0
    one = xp.ones_like(count)
    return xp.where(count > 1, count / xp.where(count > 1, count - 1, one), one)


def convert_variance(var: Array, count: Array, source: str, target: str, *, xp: Any) -> Array:
    """A running variance of one framework in the words of another.

    `count` is the number of values per channel in the batches that fed it: the factor
    n / (n - 1) between biased and unbiased depends on it.

    >>> import numpy as np
    >>> convert_variance(np.array([2.0]), 5, "torch", "flax", xp=np)
    array([1.6])
    """
    have, want = _convention(source).keeps, _convention(target).keeps
    if have == want:
        return var
    factor = bessel(count, xp=xp)
    return var * factor if want == "unbiased" else var / factor


def larger(a: Array, b: Array, *, xp: Any) -> Array:
    """The larger of two weights, each a number or a scalar array."""
    if is_number(a) and is_number(b):
        return max(a, b)
    if is_number(a):
        return xp.clip(b, a, math.inf)  # `where` may round a plain number to float32
    if is_number(b):
        return xp.clip(a, b, math.inf)
    return xp.maximum(a, b)


def new_batch_weight(momentum: float | None, batches: Array | None) -> Array:
    """Weight `a` of the new batch in `running = (1 - a)·running + a·batch`, torch's way.

    `momentum`, or with `momentum=None` the cumulative average's `1 / (batches + 1)`, where
    `batches` is the number of batches seen before this one.
    """
    if momentum is not None:
        return momentum
    if batches is None:
        raise ValueError(
            "momentum=None averages over all batches and needs their number; "
            "got num_batches_tracked=None. Pass it, or a momentum."
        )
    return 1 / (batches + 1)


def first_alone(weight: Array, batches: Array | None, *, xp: Any) -> Array:
    """`max(weight, 1 / (batches + 1))`: the first batch stands alone, nothing leans on 0 and 1."""
    return weight if batches is None else larger(weight, 1 / (batches + 1), xp=xp)


def update_average(
    running: RunningStatistics, batch: Moments, weight: Array, *, unbiased: bool, xp: Any
) -> RunningStatistics:
    """Running averages after one more batch.

        mean ← (1 - a)·mean + a·batch.mean        var ← (1 - a)·var + a·batch.var·(n / (n - 1))

    with a = `weight`; the factor n / (n - 1) only if `unbiased`, and left out for n = 1.
    Pure: returns new statistics whose `batches` is one higher.
    """
    delta = (batch.mean - running.mean) + batch.mean_low
    var = batch.var * bessel(batch.count, xp=xp) if unbiased else batch.var
    return RunningStatistics(
        running.mean + weight * delta,
        running.var + weight * (var - running.var),
        None if running.batches is None else running.batches + 1,
    )


def merge_average(running: RunningStatistics, batch: Moments, weight: Array) -> RunningStatistics:
    """Running statistics after one more batch, as the moments of two parts of weight 1 - a and a.

        mean ← mean + a·δ        var ← (1 - a)·var + a·v + a(1 - a)·δ²        δ = batch.mean - mean

    with a = `weight`. `blend` gives the same, and also what rounding the mean lost.
    """
    delta, rest = (batch.mean - running.mean) + batch.mean_low, 1 - weight
    return RunningStatistics(
        running.mean + weight * delta,
        rest * running.var + weight * (batch.var + rest * delta * delta),
        None if running.batches is None else running.batches + 1,
    )


def blend(batch: Moments, running: RunningStatistics, weight: Array) -> tuple[Array, Array, Array]:
    """Mean (rounded, and what the rounding lost) and variance of two parts of weight 1 - w and w.

    running_mean + w·δ        (1 - w)·running_var + w·v + w(1 - w)·δ²        δ = μ - running_mean
    """
    delta, delta_low = difference(batch, running.mean)
    mean, low = two_sum(running.mean, weight * delta)
    spread = delta + delta_low
    rest = 1 - weight
    var = rest * running.var + weight * (batch.var + rest * spread * spread)
    return mean, low + weight * delta_low, var


MANY_BATCHES = 1 << 30
"""A count of batches that stands for "unknown, many": no policy then lets one batch replace the
running statistics. Fits int32 with as many batches to come."""


def batches_seen(running: RunningStatistics, *, xp: Any, rows: bool = False) -> Array:
    """How many batches the running statistics have seen, where a count of 0 may be missing data.

    A checkpoint without `num_batches_tracked` leaves the count at 0. Beside running statistics that
    are not the initial 0 and 1 that cannot be right: it reads as `MANY_BATCHES`, so that the first
    batch does not replace statistics from pretraining. `rows`: each row is a layer's own.

    >>> import numpy as np
    >>> pretrained = RunningStatistics(np.array([2.0]), np.array([3.0]), 0)
    >>> int(batches_seen(pretrained, xp=np)) == MANY_BATCHES
    True
    >>> int(batches_seen(pretrained._replace(mean=np.zeros(1), var=np.ones(1)), xp=np))
    0
    """
    if running.batches is None:
        return None
    moved = (running.mean != 0) | (running.var != 1)
    trained = xp.any(moved, axis=1, keepdims=True) if rows else xp.any(moved)
    return xp.where((running.batches == 0) & trained, MANY_BATCHES, running.batches)
