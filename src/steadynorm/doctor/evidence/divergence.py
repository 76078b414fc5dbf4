"""How far the running statistics of a layer lie from those of its batches."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from steadynorm.doctor.evidence import Evidence, NormData, NormEvidence

EPS = 1e-5
ENOUGH = 8
"""Independent values of a batch from which it knows what it normalizes by: the mean is then off by
a third of a standard deviation, and digit classifiers reach what they do at batch 64."""
FAR = 0.02
"""Divergence from which statistics count as apart: means 0.2 standard deviations off, or standard
deviations 15 % too large. Averaging over batches of 8 independent values leaves 0.01."""


class Divergence(NamedTuple):
    """Per channel, what normalizes against what is there: `shift`, the distance of the means in
    standard deviations of what is there; `ratio`, the standard deviation that normalizes over the
    one that is there; `divergence`, the Kullback-Leibler divergence of normal distributions,

        (v/u + (m - μ)²/u - 1 - log(v/u)) / 2        m, u: normalizes; μ, v: is there

    `noise`: the divergence that so little data gives by itself.
    """

    shift: np.ndarray
    ratio: np.ndarray
    divergence: np.ndarray
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
        return float(np.mean(np.minimum(self.divergence, 1)))

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
    mean: np.ndarray, var: np.ndarray, data_mean: np.ndarray, data_var: np.ndarray, noise: float,
    eps: float = EPS,
) -> Divergence:  # fmt: skip
    """`mean`, `var` against those of data.

    >>> divergence(
    ...     *map(np.array, ([1.0], [4.0], [0.0], [1.0])), noise=0.0, eps=0.0
    ... ).divergence.round(3)
    array([0.443])
    """
    used, there = np.maximum(var, 0) + eps, data_var + eps
    shift = (mean - data_mean) / np.sqrt(there)
    over = there / used
    divergence = (over + (mean - data_mean) ** 2 / used - 1 - np.log(over)) / 2
    return Divergence(shift, np.sqrt(1 / over), divergence, noise)


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
    return divergence(mean, var, data.mean, data.var, noise(data), eps)


def noise(data: NormData) -> float:
    """The divergence of statistics of this much data from the truth: 1/n for n independent values,
    half of it the mean's, half the variance's.
    """
    return 1 / max(data.values / data.positions * (data.worth or 1), 1)


def called(evidence: Evidence) -> list[NormEvidence]:
    """The layers that batches reached, in the order of their first calls."""
    seen = [layer for layer in evidence.layers if layer.data is not None]
    return sorted(seen, key=lambda layer: layer.data.order if layer.data else 0)


def first_divergent(evidence: Evidence) -> tuple[NormEvidence, Divergence, int] | None:
    """The first layer whose running statistics part from its batches', and how many do in all."""
    found = []
    for layer in called(evidence):
        how = running_divergence(layer)
        if how is not None and how.far:
            found.append((layer, how))
    return (*found[0], len(found)) if found else None


def known(layer: NormEvidence, evidence: Evidence) -> float:
    """Independent values per channel in a batch that normalizes by itself; infinity for others."""
    data, place = layer.data, layer.usage
    if data is None or data.worth is None or not data.trains or data.single is not None:
        return math.inf
    if place is not None and place.policy not in ("Batch", "Ghost"):
        return math.inf
    pooled = place is not None and place.synchronized and evidence.model is not None
    replicas = evidence.model.replicas if pooled and evidence.model else 1
    return data.samples * data.worth * replicas
