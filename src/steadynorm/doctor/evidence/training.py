"""What a training run showed: readings by step and layer, made by `monitor`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

WINDOW = 32
"""Readings of a layer that are kept by channel."""
ENOUGH = 8
"""Readings to judge a trend by."""


class Reading(NamedTuple):
    """One layer in one training forward, before it updated its statistics.

    `shift`: root mean square over channels of (batch mean − running mean)/√(running var + eps).
    `ratio`: √(batch var + eps) over √(running var + eps), geometric mean over channels.
    `divergence`: Kullback–Leibler, of the batch's normal distribution from the running one, in
    nats, mean over channels. All three are NaN where a side is not finite, or without running
    statistics.
    `dead`: share of channels whose output is nowhere above 0 in this batch: nothing of them passes
    a ReLU. `saturated`: share of outputs beyond ±4.36, where a sigmoid's slope is below a twentieth
    of its largest. `gradient`: norm of the loss's gradient for the output, 0 where none came;
    infinite where it is not finite, NaN where the output takes none. `nonfinite`: channels whose
    values were not all finite.
    """

    step: int
    layer: str
    shift: float
    ratio: float
    divergence: float
    dead: float
    saturated: float
    gradient: float
    nonfinite: int


@dataclass(frozen=True, eq=False)
class Trend:
    """The last readings of a layer by channel, of the run's second half; at most `WINDOW`.

    `lag`: mean of (batch mean − running mean) in running standard deviations; the scatter of single
    batches cancels in it, and `error` is what is left of it (the mean's standard error). `ratio`:
    the batches' unbiased variance over the running one, as a ratio of standard deviations.
    `dead`, `no_gradient`: in all of the readings. `values`: of a channel in all of them.
    `samples`: in a batch. `alike`: how many times as far the batches' means scatter from one
    reading to the next, as a variance, as those of batches with the same samples mixed would; NaN
    where not known.
    `independent`: independent values that a batch counts for: the variance of values over that of
    (batch mean − running mean), or over that of means of as many mixed samples, whichever is less;
    harmonic mean over channels. The running mean takes out the slow movement of the weights.
    """

    readings: int
    values: int
    lag: np.ndarray
    error: np.ndarray
    ratio: np.ndarray
    dead: np.ndarray
    samples: int = 0
    independent: float = float("nan")
    alike: float = float("nan")
    no_gradient: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """A monitored run: `steps` training forwards, read at every `every`-th; all layers in the order
    in which they were called. Of a long run `readings` holds every second step, fourth, and so on,
    and each layer's first that was not finite.

    `updates`: by layer, how far `num_batches_tracked` rose. `in_inference`: forwards in inference
    mode through which a gradient was computed.
    """

    steps: int
    every: int
    layers: tuple[str, ...]
    readings: tuple[Reading, ...]
    trends: Mapping[str, Trend] = field(default_factory=dict)
    updates: Mapping[str, int] = field(default_factory=dict)
    in_inference: int = 0

    def second_half(self, layer: str) -> list[Reading]:
        """A layer's readings after the first half, in which everything still moves."""
        return [r for r in self.readings if r.layer == layer and r.step >= self.steps / 2]


class ChannelReading(NamedTuple):
    """One layer in one forward, by channel."""

    step: int
    values: int
    mean: np.ndarray
    var: np.ndarray
    running_mean: np.ndarray
    running_var: np.ndarray
    eps: float
    dead: np.ndarray
    samples: int = 0
    of_means: np.ndarray | None = None
    no_gradient: np.ndarray | None = None

    @property
    def finite(self) -> bool:
        """Whether both sides can be compared."""
        parts = (self.mean, self.var, self.running_mean, self.running_var)
        return all(bool(np.isfinite(part).all()) for part in parts)

    def shift(self) -> np.ndarray:
        """Batch mean minus running mean in running standard deviations."""
        found: np.ndarray = (self.mean - self.running_mean) / _std(self.running_var, self.eps)
        return found

    def reading(self, layer: str, saturated: float, gradient: float) -> Reading:
        """The same in one number each."""
        nonfinite = int(np.sum(~(np.isfinite(self.mean) & np.isfinite(self.var))))
        shift = ratio = divergence = float("nan")
        if self.finite:
            shifts = self.shift()
            ratios = _std(self.var, self.eps) / _std(self.running_var, self.eps)
            shift = float(np.sqrt(np.mean(shifts**2)))
            ratio = float(np.exp(np.mean(np.log(ratios))))
            divergence = float(np.mean(0.5 * (ratios**2 + shifts**2 - 1) - np.log(ratios)))
        dead = float(np.mean(self.dead))
        return Reading(
            self.step, layer, shift, ratio, divergence, dead, saturated, gradient, nonfinite
        )


def trend(readings: Iterable[ChannelReading], steps: int) -> Trend | None:
    """What the readings of a run's second half have in common; None where there is none."""
    late = [reading for reading in readings if reading.step >= steps / 2 and reading.finite]
    if not late:
        return None
    shifts = np.array([reading.shift() for reading in late])
    unbiased = [r.var * r.values / max(r.values - 1, 1) + r.eps for r in late]
    running = [r.running_var + r.eps for r in late]
    silent = [reading.no_gradient for reading in late if reading.no_gradient is not None]
    std = shifts.std(axis=0, ddof=1) if len(late) > 1 else np.full(shifts.shape[1], np.inf)
    return Trend(
        len(late),
        sum(reading.values for reading in late),
        shifts.mean(axis=0),
        std / np.sqrt(len(late)),
        _std(np.mean(unbiased, axis=0), 0.0) / _std(np.mean(running, axis=0), 0.0),
        np.all([reading.dead for reading in late], axis=0),
        int(np.median([reading.samples for reading in late])),
        *_independent(late),
        np.all(silent, axis=0) if silent else None,
    )


def _independent(late: list[ChannelReading]) -> tuple[float, float]:
    """`independent` and `alike` of a trend."""
    if len(late) < 3:
        return float("nan"), float("nan")
    away = [r.mean - r.running_mean for r in late]
    of_means = np.var(away, axis=0, ddof=1)
    # Single values vary within and between batches.
    var = np.mean([r.var for r in late], axis=0) + of_means
    varying = var > 0
    if not varying.any():
        return float("inf"), float("nan")
    share = max(float(np.mean(of_means[varying] / var[varying])), 1e-12)
    mixed = [r.of_means / max(r.samples - 1, 1) for r in late if r.of_means is not None]
    expected = (
        float(np.mean(np.mean(mixed, axis=0)[varying] / var[varying])) if mixed else float("nan")
    )
    # Weights that learn fast move the means steadily, which second differences leave out; of
    # readings that scatter by s² they are 6·s².
    steps = np.mean(np.diff(away, n=2, axis=0) ** 2, axis=0) / 6
    scatter = float(np.mean(steps[varying] / var[varying]))
    alike = scatter / expected if expected > 0 else float("nan")
    # A norm before this one holds the batches' means together, however few samples they are of.
    return 1 / max(share, expected if expected > 0 else 0.0), alike


def _std(var: np.ndarray, eps: float) -> np.ndarray:
    found: np.ndarray = np.sqrt(np.maximum(var + eps, np.finfo(np.float64).tiny))
    return found
