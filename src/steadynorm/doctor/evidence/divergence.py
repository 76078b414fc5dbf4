"""How far the statistics that normalize lie from those of the data."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from steadynorm.doctor.evidence.records import Evidence, NormData, NormEvidence

EPS = 1e-5
ENOUGH = 8
"""Independent values of a batch from which it normalizes well: the mean is then off by a third of a
standard deviation, and digit classifiers reach what they do at batch 64."""
FAR = 0.02
"""Divergence from which statistics count as wrong: means 0.2 standard deviations off, or standard
deviations 15 % too large. Averaging over batches of 8 independent values leaves 0.01."""
CLEARLY = 0.05
"""Divergence from which it is worth a warning without a loss to weigh it by."""


class Divergence(NamedTuple):
    """Per channel, the mean m and variance u that normalize against the data's μ and v.

    `shift`: (m - μ)/√v. `ratio`: √(u/v). `kl`: the Kullback-Leibler divergence of the data's normal
    distribution from the other,

        (v/u + (m - μ)²/u - 1 - log(v/u))/2

    `noise`: the divergence that so little data gives by itself. eps is added to both variances.
    """

    shift: np.ndarray
    ratio: np.ndarray
    kl: np.ndarray
    noise: float

    @property
    def typical_shift(self) -> float:
        """Root mean square over the channels."""
        return float(np.sqrt(np.mean(self.shift**2)))

    @property
    def typical_ratio(self) -> float:
        """Geometric mean over the channels."""
        return float(np.exp(np.mean(np.log(self.ratio))))

    @property
    def mean_kl(self) -> float:
        """Over the channels, each counted up to 1: a single dead one is not the layer's fault."""
        return float(np.mean(np.minimum(self.kl, 1)))

    @property
    def far(self) -> bool:
        """Whether it is more than `FAR`, and more than so little data explains."""
        return self.mean_kl > FAR + 4 * self.noise

    def __str__(self) -> str:
        return (
            f"means {self.typical_shift:.2g} standard deviations off, standard deviations "
            f"{self.typical_ratio:.2g} times those of the data"
        )


def divergence(
    mean: np.ndarray, var: np.ndarray, data_mean: np.ndarray, data_var: np.ndarray,
    noise: float = 0.0, eps: float = EPS,
) -> Divergence:  # fmt: skip
    """`mean`, `var` against those of data.

    >>> divergence(*map(np.array, ([1.0], [4.0], [0.0], [1.0])), eps=0.0).kl.round(3)
    array([0.443])
    """
    used, there = np.maximum(var, 0) + eps, data_var + eps
    shift = (mean - data_mean) / np.sqrt(there)
    over = there / used
    kl = (over + (mean - data_mean) ** 2 / used - 1 - np.log(over)) / 2
    return Divergence(shift, np.sqrt(1 / over), kl, noise)


def running_divergence(layer: NormEvidence) -> Divergence | None:
    """Running statistics against those of batches in training; None where either is not known.

    A layer that does not train is left out: somebody holds its statistics still.
    """
    data, mean, var = layer.data, layer.state.running_mean, layer.state.running_var
    if data is None or not data.trains or mean is None or var is None:
        return None
    if not (np.isfinite(mean).all() and np.isfinite(var).all()):
        return None
    eps = layer.state.eps or EPS
    return divergence(mean, var, data.mean, data.var, sampling_noise(data), eps)


def sampling_noise(data: NormData) -> float:
    """The divergence of statistics of this much data from the truth: 1/n for n independent values,
    half of it the mean's, half the variance's.
    """
    return 1 / max(data.values / data.positions * (data.worth or 1), 1)


def measured(evidence: Evidence) -> list[tuple[NormEvidence, NormData]]:
    """The layers that batches reached and what these show, in the order of their first calls."""
    seen = [(layer, layer.data) for layer in evidence.layers if layer.data is not None]
    return sorted(seen, key=lambda pair: pair[1].order)


def first_divergent(evidence: Evidence) -> tuple[NormEvidence, Divergence, int] | None:
    """The first layer whose running statistics are not its batches', and how many do in all."""
    known = ((layer, running_divergence(layer)) for layer, _ in measured(evidence))
    found = [(layer, running) for layer, running in known if running is not None and running.far]
    return (*found[0], len(found)) if found else None


def independent_values(layer: NormEvidence, evidence: Evidence) -> float:
    """Independent values per channel in a batch that normalizes by itself; infinity for others."""
    data, usage = layer.data, layer.usage
    if data is None or data.worth is None or not data.trains or data.single is not None:
        return math.inf
    if not layer.by_batch:
        return math.inf
    pooled = evidence.model if usage is not None and usage.synchronized else None
    return data.samples * data.worth * (1 if pooled is None else pooled.replicas)
