"""What a policy is asked, and what most policies share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from steadynorm.statistics.moments import Array, Moments
from steadynorm.statistics.normalizer import Normalizer
from steadynorm.statistics.running import RunningStatistics, new_batch_weight, update_average


@dataclass(slots=True)
class Context:
    """What a policy may ask besides moments and running statistics."""

    samples: Array
    """Samples in the batch over all replicas; not values per channel. For `Steady(window=...)`
    those with a valid position."""
    momentum: float | None
    """Weight of the new batch, as in torch; None averages over all batches."""
    eps: float
    xp: Any
    """The array namespace."""
    unbiased: bool = True
    """Whether the framework keeps the unbiased running variance; Keras and flax do not."""


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
    counts_samples: ClassVar[bool] = False
    """Whether it asks how many samples a batch has; with a mask, those with a valid position."""
    uses_momentum: ClassVar[bool] = True
    """Whether the layer's `momentum` says how fast the running statistics move."""

    def normalizer(
        self, batch: Moments, running: RunningStatistics | None, context: Context
    ) -> Normalizer:
        """What normalizes a training batch; see `Normalizer`."""
        raise NotImplementedError

    def gradient_rate(self, samples: Array) -> Array | None:
        """At which rate the memory of the gradient follows a batch; None where there is none."""
        return None

    def one_way(self) -> Policy:
        """The policy without a memory of the gradient, for frameworks that keep none."""
        return self

    def update(
        self, batch: Moments, running: RunningStatistics, context: Context
    ) -> RunningStatistics:
        """Running statistics after this batch, by torch's rule unless the policy has its own."""
        weight = new_batch_weight(context.momentum, running.batches)
        unbiased = self.unbiased and context.unbiased
        return update_average(running, batch, weight, unbiased=unbiased, xp=context.xp)


def check_number(
    owner: str, name: str, value: object, *, low: float, strict: bool = False, whole: bool = False
) -> None:
    """A setting is a number of at least (or above) `low`."""
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"{owner}: `{name}` must be {kind}; got {value!r}.")
    if not (value > low if strict else value >= low):  # also refuses NaN
        bound = f"above {low:g}" if strict else f"at least {low:g}"
        raise ValueError(f"{owner}: `{name}` must be {bound}; got {value!r}.")
