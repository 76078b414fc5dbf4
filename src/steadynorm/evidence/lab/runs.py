"""A training run as a value: what to build and how to train it, ready to be sent to a worker."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from steadynorm.evidence.lab.data import load
from steadynorm.evidence.lab.networks import (
    convolutional,
    fully_connected,
    initialize,
    normalization_1d,
    normalization_2d,
)
from steadynorm.evidence.lab.training import Recipe, Tick, Training, train
from steadynorm.statistics import Policy


@dataclass(frozen=True)
class Setup:
    """A network and its training. `statistics` is a policy, its name, "torch" for torch's own
    layer, or None for no normalization; `momentum` is the layers'.
    """

    network: Literal["fully connected", "convolutional"]
    statistics: Policy | str | None
    recipe: Recipe
    momentum: float = 0.1


def execute(setup: Setup, data_dir: str | None, seed: int, *, tick: Tick | None = None) -> Training:
    """Build the network from `seed`, train it on the digits of `data_dir` and measure it."""
    digits = load(data_dir)
    if setup.network == "convolutional":
        network = convolutional(normalization_2d(setup.statistics, momentum=setup.momentum))
    else:
        network = fully_connected(
            digits.train_images[0].size,
            normalization_1d(setup.statistics, momentum=setup.momentum),
        )
    initialize(network, seed)
    return train(network, digits, setup.recipe, seed=seed, tick=tick)


class Interval(NamedTuple):
    """A mean over `runs` independent runs; the 95 % interval of it is mean ± half."""

    mean: float
    half: float
    runs: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.runs < 2 else f"{self.mean:.1f} ± {self.half:.1f}"


# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom; scipy is a second of import away.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def interval(values: list[float]) -> Interval:
    """Student's 95 % interval for the mean of independent runs; half is 0 for a single one.

    >>> print(interval([1.0, 2.0, 3.0]))
    2.0 ± 2.5
    """
    if not values:
        raise ValueError("interval: `values` must hold at least one run; got none.")
    count = len(values)
    if count == 1:
        return Interval(values[0], 0.0, 1)
    t = _T[count - 2] if count - 2 < len(_T) else 1.96 + 2.5 / (count - 1)
    return Interval(fmean(values), t * stdev(values) / sqrt(count), count)
