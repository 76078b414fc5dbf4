"""The batches of the run held too few independent values per channel to normalize by.

The mean of n independent values is off by 1/√n standard deviations and their variance by √(2/n) of
itself; training normalizes by that noise, inference does not. It happens with few samples, as in
micro-batches whose gradients are accumulated, and with many that are alike: batches sorted by
class, frames of one video, crops of one picture.

When: From at least 8 readings in the run's second half: the variance of a channel's values over the
variance of (batch mean − running mean), harmonic mean over channels, is the number of independent
values that a batch counts for; or fewer, as the samples' own means within a batch tell, since
another norm before holds the batches' means together. A warning below 4, where the mean is off by
half a standard deviation and digit classifiers lose 10 to 20 points; and below 8, where SN303 warns
too, if a batch holds fewer than 8 values per channel at all, which is counted and not estimated.
Policies that use running statistics too are left out, and so are, from the count, layers that pool
it over replicas. `diagnose` with batches tells small batches (SN303) from alike ones (SN309).

Cure: Train with larger batches, or mix the samples better; accumulating gradients over small
batches does not help.

Code: loader = DataLoader(dataset, batch_size=..., shuffle=True)

Source: Wu & He 2018, figure 1; Wu & Johnson 2021, sections 4 and 6.
"""

from __future__ import annotations

import math

from steadynorm.doctor.evidence.divergence import ENOUGH
from steadynorm.doctor.evidence.training import Trend
from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Rule

TOO_FEW = 4

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN402",))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    found = [
        (layer, trend)
        for layer, trend in evidence.trends()
        if layer.by_batch and (trend.independent < TOO_FEW or _counted(layer, trend) < ENOUGH)
    ]
    if not found:
        return
    layer, trend = found[0]
    independent = min(trend.independent, _counted(layer, trend))
    samples = f" of {trend.samples} samples" if trend.samples else ""  # Keras's steps do not tell
    yield rule.finding(
        layer,
        f"a batch{samples} counts for {independent:.2g} independent values: its mean "
        f"is off by {independent**-0.5:.2g} standard deviations",
        {
            "samples": trend.samples,
            "independent_values": independent,
            "readings": trend.readings,
        },
        layers=len(found),
    )


def _counted(layer: NormEvidence, trend: Trend) -> float:
    """Values per channel in a batch that normalizes by itself; infinity where replicas share it."""
    if layer.usage is not None and layer.usage.synchronized:
        return math.inf
    return trend.values / trend.readings
