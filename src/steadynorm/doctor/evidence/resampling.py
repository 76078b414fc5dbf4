"""How far two sets of data differ by chance: their samples dealt out anew, at random."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from steadynorm.doctor.evidence.divergence import divergence
from steadynorm.doctor.evidence.inputs import InputStatistics

DEALS = 199
"""Random deals. A limit that none of them exceeds is exceeded by chance in one of 200 pairs of
sets, all layers of a model together."""


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
