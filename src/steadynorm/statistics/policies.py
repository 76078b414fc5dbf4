"""Which statistics normalize a training batch: six policies, one normal form.

A policy answers two questions from the batch's moments and the running statistics as they were
before this batch: what normalizes (`normalizer`), and what is kept (`update`). Both are pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from steadynorm.statistics.moments import Array, Moments, difference, two_sum
from steadynorm.statistics.normalizer import Normalizer
from steadynorm.statistics.running import (
    RunningStatistics,
    first_alone,
    new_batch_weight,
    update_average,
)


class Context:
    """What a policy may ask besides moments and running statistics.

    `samples`: samples in the batch over all replicas (not values per channel). `momentum`: the
    layer's, torch's meaning. `eps`: the layer's. `xp`: the array namespace. `unbiased`: whether the
    framework keeps the unbiased running variance, as torch does and Keras and flax do not.
    """

    __slots__ = ("eps", "momentum", "samples", "unbiased", "xp")

    def __init__(
        self, samples: Array, momentum: float | None, eps: float, xp: Any, unbiased: bool = True
    ) -> None:
        self.samples = samples
        self.momentum = momentum
        self.eps = eps
        self.xp = xp
        self.unbiased = unbiased


class Policy:
    """Base of the policies; holds what most of them share."""

    needs_running: ClassVar[bool] = True
    """Whether it cannot work with `track_running_stats=False`."""
    batch_alone: ClassVar[bool] = False
    """Whether the batch's own moments alone normalize: one value per channel is then not enough."""
    unbiased: ClassVar[bool] = True
    """Whether the running variance it keeps may be unbiased, as torch's is."""
    counts_batches: ClassVar[bool] = True
    """Whether it asks how many batches the running statistics have seen."""
    uses_momentum: ClassVar[bool] = True
    """Whether the layer's `momentum` says how fast the running statistics move."""

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        """What normalizes a training batch; see `Normalizer`."""
        raise NotImplementedError

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        """Running statistics after this batch, by torch's rule unless the policy has its own."""
        weight = new_batch_weight(context.momentum, running.batches)
        unbiased = self.unbiased and context.unbiased
        return update_average(running, batch, weight, unbiased=unbiased, xp=context.xp)


def of_batch(batch: Moments) -> Normalizer:
    """The batch's own statistics normalize it."""
    return Normalizer(batch.mean, batch.mean_low, batch.var, 1.0, 0.0, 1.0)


def of_running(running: RunningStatistics) -> Normalizer:
    """The running statistics normalize: what every policy does in inference."""
    return Normalizer(running.mean, 0.0, running.var, 1.0, 0.0, 0.0)


def _number(
    owner: str, name: str, value: object, *, low: float, strict: bool = False, whole: bool = False
) -> None:
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"{owner}: `{name}` must be {kind}; got {value!r}.")
    if not (value > low if strict else value >= low):  # also refuses NaN
        bound = f"above {low:g}" if strict else f"at least {low:g}"
        raise ValueError(f"{owner}: `{name}` must be {bound}; got {value!r}.")


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


@dataclass(frozen=True)
class Steady(Policy):
    """Batch and running statistics, each believed as far as it knows: holds at every batch size.

    With n values per channel in the batch, N samples, t batches seen before, δ = μ - running_mean:

        k = max(n/(n + prior), 1/(t + 1))
        m = running_mean + k·δ
        u = (1 - k)·running_var + k·v + k(1 - k)·δ²                    α = k

    and then the running statistics move with a = max(N/(N + horizon), 1/(t + 1)):

        running_mean ← running_mean + a·δ
        running_var  ← (1 - a)·running_var + a·v + a(1 - a)·δ²

    that is, by merging two parts of weight 1 - a and a (Chan's formula), so the running variance is
    the biased variance of everything seen, right even for batches of one, where v is 0.

    `prior`: how many values the memory counts for; 0 is `Batch` wherever the batch has a variance.
    `horizon`: over how many samples the memory reaches, whatever the batch size; it replaces
    `momentum`, which 640 samples equal at momentum 0.1 and batch 64. No gradient flows through k or
    the δ² term. Ours; kin of Yong et al. 2020 (momentum batch normalization) and Schneider et al.
    2020 (prior-weighted statistics). torch, Keras and flax have no such policy.

    >>> Steady()
    Steady(prior=4.0, horizon=640)
    >>> Steady(prior=1)
    Steady(prior=1, horizon=640)
    """

    prior: float = 4.0
    horizon: float = 640

    unbiased = False
    uses_momentum = False

    def __post_init__(self) -> None:
        _number("Steady", "prior", self.prior, low=0)
        _number("Steady", "horizon", self.horizon, low=0)

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        assert running is not None  # the caller checks needs_running
        share = self._weight(batch.count, self.prior, running, context)
        mean, low, var = _blend(batch, running, share)
        return Normalizer(mean, low, var, 1.0, 0.0, share)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        weight = self._weight(context.samples, self.horizon, running, context)
        mean, _, var = _blend(batch, running, weight)
        batches = None if running.batches is None else running.batches + 1
        return RunningStatistics(mean, var, batches)

    @staticmethod
    def _weight(
        known: Array, remembered: float, running: RunningStatistics, context: Context
    ) -> Array:
        if isinstance(known, int | float):
            weight: Array = known / (known + remembered) if known > 0 else 0.0
        else:
            weight = known / (context.xp.where(known > 0, known, 1.0) + remembered)
        return first_alone(weight, running.batches, xp=context.xp)


def _blend(batch: Moments, running: RunningStatistics, weight: Array) -> tuple[Array, Array, Array]:
    """Mean (rounded, and what that lost) and variance of two parts of weight 1 - w and w."""
    delta, delta_low = difference(batch, running.mean)
    mean, low = two_sum(running.mean, weight * delta)
    spread = delta + delta_low
    var = (1 - weight) * running.var + weight * (batch.var + (1 - weight) * spread * spread)
    return mean, low + weight * delta_low, var


@dataclass(frozen=True)
class Running(Policy):
    """The running averages, this batch included, normalize in training too.

    With a = max(momentum, 1/(t + 1)), t the batches seen before:

        running_mean ← (1 - a)·running_mean + a·μ        running_var ← (1 - a)·running_var + a·v
        m = the new running_mean        u = the new running_var        α = a

    The first batch stands alone, so nothing leans on the initial 0 and 1. Keeps the biased
    variance, since it normalizes with what it keeps. Nearest peer: equinox, `mode="ema"`.

    >>> Running()
    Running()
    """

    unbiased = False

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        assert running is not None
        weight = self._weight(running, context)
        delta, delta_low = difference(batch, running.mean)
        mean, low = two_sum(running.mean, weight * delta)
        var = (1 - weight) * running.var + weight * batch.var
        return Normalizer(mean, low + weight * delta_low, var, 1.0, 0.0, weight)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        weight = self._weight(running, context)
        return update_average(running, batch, weight, unbiased=False, xp=context.xp)

    @staticmethod
    def _weight(running: RunningStatistics, context: Context) -> Array:
        weight = new_batch_weight(context.momentum, running.batches)
        return first_alone(weight, running.batches, xp=context.xp)


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
        _number("Renorm", "r_max", self.r_max, low=1)
        _number("Renorm", "d_max", self.d_max, low=0)
        for name in ("warmup", "r_ramp", "d_ramp"):
            _number("Renorm", name, getattr(self, name), low=0, whole=True)

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


@dataclass(frozen=True)
class Ghost(Policy):
    """Every group of `size` consecutive samples is normalized on its own (Hoffer et al. 2017).

    In training only. A last group of fewer than 2 samples joins the one before it. The running
    statistics are updated by each group in order, each counting as one batch.

    >>> Ghost(size=32).lengths(70)
    (32, 32, 6)
    >>> Ghost(size=32).lengths(65)
    (32, 33)
    """

    size: int = 32

    needs_running = False
    batch_alone = True
    counts_batches = False

    def __post_init__(self) -> None:
        _number("Ghost", "size", self.size, low=1, whole=True)

    def lengths(self, samples: int) -> tuple[int, ...]:
        """How many samples each group of a batch holds."""
        full, rest = divmod(samples, self.size)
        groups = [self.size] * full
        if rest >= 2 or (rest and not groups):
            groups.append(rest)
        elif rest:
            groups[-1] += rest
        return tuple(groups)

    def pieces(self, before: int, samples: int, total: int) -> tuple[int, tuple[int, ...]]:
        """Which groups of a batch of `total` samples hold the `samples` after the first `before`.

        Returns the first such group, and how many of the samples it and the next ones hold.

        >>> Ghost(size=4).pieces(before=6, samples=5, total=12)
        (1, (2, 3))
        """
        first, start = 0, 0
        held: list[int] = []
        for group, length in enumerate(self.lengths(total)):
            end = start + length
            common = min(end, before + samples) - max(start, before)
            if common > 0:
                first = first if held else group
                held.append(common)
            start = end
        return first, tuple(held)

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        return of_batch(batch)

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        for group in range(batch.mean.shape[0]):
            row = Moments(*(part[group] for part in batch))
            some = row.count > 0
            before, batches = running, None
            if running.batches is not None:
                # In the statistics' type, for 1 / (t + 1) of an integer array would be float32.
                before = running._replace(batches=running.batches + 0 * row.count)
                batches = running.batches + some[0]
            after = super().update(row, before, context)
            running = RunningStatistics(
                context.xp.where(some, after.mean, running.mean),
                context.xp.where(some, after.var, running.var),
                batches,
            )
        return running


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


POLICIES: dict[str, type[Policy]] = {
    kind.__name__.lower(): kind for kind in (Batch, Steady, Running, Renorm, Ghost, Frozen)
}


def policy_from(value: object) -> Policy:
    """A policy from itself or from its lower-case name.

    Raises ValueError for an unknown name and TypeError for anything else.

    >>> policy_from("steady")
    Steady(prior=4.0, horizon=640)
    """
    if isinstance(value, Policy):
        return value
    if isinstance(value, str):
        if value in POLICIES:
            return POLICIES[value]()
        raise ValueError(
            f"statistics must be one of {', '.join(map(repr, POLICIES))} or a policy; "
            f"got {value!r}."
        )
    hint = f" Write {value.__name__}()." if isinstance(value, type) else ""
    raise TypeError(
        f"statistics must be a policy such as sn.Steady() or its lower-case name; "
        f"got {value!r}.{hint}"
    )
