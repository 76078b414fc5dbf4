"""A batch holds too few independent values per channel to normalize by.

Under `Batch` the mean of n independent values is off by 1/√n standard deviations, their variance by
√(2/n) of itself, and the network trains on that noise; inference, which has none, meets activations
it was not trained for. What counts is not N·H·W: neighbouring positions are alike. How many
independent values a sample is worth shows in how far the samples' own means and mean squares
scatter: it may be 2 where it has a hundred positions.

When: An error below 4 independent values in a batch: the mean is off by half a standard deviation
or more, and digit classifiers lose 10 to 20 points. A warning below 8, where the noise still shows
in the training loss. From 8 on, the same networks reach what they do at 64. Policies that use
running statistics too (Steady, Running, Renorm, Frozen) are left out; Ghost counts a group,
synchronized layers all replicas.

Cure: Train with larger batches or pool them over replicas. Or train with Steady, which with one or
two samples came within a point of what Batch reaches with 64, in networks of up to 15 batch norms.
Calibrate at the end.

Code: model, changes = sn.convert(model, statistics="steady")

Source: Wu & He 2018, figure 1; Ioffe 2017; Singh & Shrivastava 2019 (EvalNorm); docs/steady.md for
Steady.
"""

from __future__ import annotations

import math

from steadynorm.doctor.evidence.divergence import ENOUGH, independent_values, measured
from steadynorm.doctor.rules.rule import ERROR, WARNING, Evidence, Findings, Rule

TOO_FEW = 4
DEPTH = 15
"""Batch norms in the deepest network that Steady was measured in; see docs/steady.md."""

rule = Rule(__name__, __doc__, ERROR, safe=False, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    found = [
        (layer, data, values)
        for layer, data in measured(evidence)
        if (values := independent_values(layer, evidence)) < ENOUGH
    ]
    if not found:
        return
    layer = found[0][0]
    worst, data, fewest = min(found, key=lambda entry: entry[2])
    worth = data.worth or 1.0
    smallest = math.ceil(ENOUGH / worth)
    per_channel = data.samples * data.positions
    where = "" if worst is layer else f" in {worst.name!r}"
    size = f"{per_channel} values per channel"
    if data.positions > 1:
        size += f" ({data.samples} samples of {data.positions} positions)"
    message = (
        f"a batch holds {size}{where}, worth {fewest:.2g} independent ones: its mean is off by "
        f"{1 / math.sqrt(fewest):.2g} standard deviations, its variance by "
        f"{100 * math.sqrt(2 / fewest):.0f} %"
    )
    cure, line = f"Train with batches of at least {smallest}, or pool them over replicas. ", None
    if len(evidence.layers) <= DEPTH:
        cure += "Else train with Steady, and calibrate at the end."
    else:
        cure += (
            f"Else train on as it is and calibrate at the end, layer by layer: in networks of more "
            f"than {DEPTH} batch norms Steady was not measured."
        )
        line = 'sn.calibrate(model, batches, passes="layerwise")'
    yield rule.finding(
        layer,
        message,
        {
            "samples": data.samples,
            "values_per_channel": per_channel,
            "independent_values": fewest,
            "values_per_sample": worth,
            "smallest_batch": smallest,
            "worst_layer": worst.name,
        },
        severity=ERROR if fewest < TOO_FEW else WARNING,
        cure=cure,
        line=line,
        layers=len(found),
    )
