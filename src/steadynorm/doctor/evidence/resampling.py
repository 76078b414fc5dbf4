"""How far sets of data and batches differ by chance: samples dealt out anew, at random."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from steadynorm.doctor.evidence.divergence import divergence
from steadynorm.doctor.evidence.inputs import SEVERAL, InputStatistics
from steadynorm.doctor.evidence.records import ClassScatter

DEALS = 199
"""Random deals. A limit that none of them exceeds is exceeded by chance in one of 200 pairs of
sets, all layers of a model together."""
DEALS_OF_CLASSES = 4999


def resample(
    first: Mapping[str, InputStatistics], second: Mapping[str, InputStatistics]
) -> dict[str, dict[str, float]]:
    """By layer, `reference_noise` and `reference_limit` as in `NormData`.

    A permutation test: groups of samples of both sets are dealt into two sets of the same sizes.
    With d the divergence of a layer in a deal, m and s its mean and standard deviation over deals,
    the limit is m + s·t, where t is the largest (d - m)/s over all layers and deals, so that many
    layers do not make a false alarm more likely (Westfall & Young 1993, max-T).
    """
    dealt = {
        name: _divergences(seen, second[name])
        for name, seen in first.items()
        if name in second and seen.groups and second[name].groups
    }
    if not dealt:
        return {}
    scale = {name: (float(d.mean()), max(float(d.std()), 1e-12)) for name, d in dealt.items()}
    largest = max(float(np.max((d - scale[n][0]) / scale[n][1])) for n, d in dealt.items())
    return {
        name: {"reference_noise": mean, "reference_limit": mean + std * largest}
        for name, (mean, std) in scale.items()
    }


def _divergences(first: InputStatistics, second: InputStatistics) -> np.ndarray:
    """Of the two sets in each random deal. Layers with as many groups are dealt alike."""
    groups = [*first.groups, *second.groups]
    counts = np.array([float(group.count) for group in groups])
    means = np.stack([group.mean.numpy() for group in groups])
    squares = np.stack([group.var.numpy() for group in groups])
    means = means - means.mean(0)
    squares = squares + means**2
    chance = np.random.default_rng(0)
    order = np.argsort(chance.random((DEALS, len(groups))), axis=1)
    in_first = order < len(first.groups)

    def moments(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = chosen * counts
        weights = weights / weights.sum(1, keepdims=True)
        mean = weights @ means
        return mean, np.maximum(weights @ squares - mean**2, 0)

    (mean, var), (data_mean, data_var) = moments(~in_first), moments(in_first)
    kl = divergence(mean, var, data_mean, data_var).kl
    found: np.ndarray = np.minimum(kl, 1).mean(1)
    return found


def class_scatter(batches: Sequence[np.ndarray]) -> ClassScatter | None:
    """How far the numbers of each class scatter between batches, and what chance makes of it: the
    labels are dealt into batches anew, at random. Of the batches of the usual size; None where
    there are too few, or one class.
    """
    samples = int(np.median([len(labels) for labels in batches])) if batches else 0
    usual = [labels for labels in batches if len(labels) == samples]
    if len(usual) < SEVERAL or samples < 2:
        return None
    classes, labels = np.unique(np.concatenate(usual), return_inverse=True)
    if len(classes) < 2:
        return None
    totals = np.bincount(labels)
    first = np.repeat(np.arange(len(usual)) * len(classes), samples)  # of a batch's counts

    def scatter(labels: np.ndarray) -> float:
        counts = np.bincount(first + labels, minlength=len(usual) * len(classes))
        squares = np.sum(counts.reshape(len(usual), -1) ** 2 / totals)
        # Pearson's χ² over what it is in the mean of all deals.
        chi_square = len(labels) * (squares / samples - 1)
        expected = len(labels) / (len(labels) - 1) * (len(usual) - 1) * (len(classes) - 1)
        return float(chi_square / expected)

    chance = np.random.default_rng(0)
    limit = max(scatter(chance.permutation(labels)) for _ in range(DEALS_OF_CLASSES))
    return ClassScatter(samples, scatter(labels), limit)
