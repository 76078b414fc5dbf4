"""Something drawn at random widens the layer's input in training, and not in inference.

Dropout called as a function, stochastic depth on a residual, noise added to inputs: each changes
the variance of what a layer meets in training. The layer remembers that variance and divides by it
in inference, where nothing is drawn: its outputs come out too small (or too large) in all that
follows. SN205 says it of a dropout module straight before; this rule measures it, whatever makes
it.

When: With all of the model in training mode, the standard deviation of the layer's input, geometric
mean over channels, is another than with dropout and its kin in inference; batches normalize both
times, so that each layer shows what lies between it and the norm before. A warning from a factor of
1.15, as straight behind a dropout of p = 0.25, where the running statistics are not those of
inference (the divergence of SN302); information from 1.05, and where they were measured since.
Where SN205 names the layer this rule keeps quiet.

Cure: Draw behind the last batch norm, or let the branch end in a norm; where it must stay, measure
the statistics when training is over.

Code: sn.calibrate(model, batches)

Source: Li et al. 2019, Understanding the Disharmony between Dropout and BN by Variance Shift; Huang
et al. 2016, Deep Networks with Stochastic Depth.
"""

from __future__ import annotations

import math

from steadynorm.doctor.evidence.divergence import measured, running_divergence
from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, NormEvidence, Rule

CLEAR, SMALL = 1.15, 1.05

rule = Rule(__name__, __doc__, WARNING, safe=True, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    found = []
    for layer, data in measured(evidence):
        before = () if layer.usage is None else layer.usage.before or ()
        has_dropout_module = any(neighbour.probability for neighbour in before)
        ratio = (
            1.0
            if data.chance is None or has_dropout_module or not data.trains
            else data.chance.std_ratio
        )
        if abs(math.log(ratio)) > math.log(SMALL):
            found.append((layer, ratio))
    if not found:
        return
    clear = [pair for pair in found if abs(math.log(pair[1])) > math.log(CLEAR) and _far(pair[0])]
    layer, ratio = (clear or found)[0]
    yield rule.finding(
        layer,
        f"what is drawn at random before it makes its input {ratio:.3g} times as wide in training "
        f"as in inference",
        {"std_ratio": ratio},
        layers=len(clear or found),
        severity=WARNING if clear else INFO,
    )


def _far(layer: NormEvidence) -> bool:
    divergence = running_divergence(layer)
    return divergence is not None and divergence.far
