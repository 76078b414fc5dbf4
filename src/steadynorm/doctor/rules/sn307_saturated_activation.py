"""The sigmoid or tanh after the batch norm is saturated: almost no gradient passes.

Where the slope is near 0 the layers before learn nothing, and the unit tells little more than a
sign. Batch normalization is there to keep values where the slope is; large weights or biases of the
batch norm itself carry them away again.

When: Flat: a slope below a twentieth of the steepest, |z| > 4.4 for sigmoid and 2.2 for tanh. A
warning from half of the values, an error from nine tenths; normalized values with weight 1 and bias
0 are flat in 0.001 % and 3 % of cases. What the model returns as its answer is left out: it is
meant to decide.

Cure: Set the batch norm's weight back towards 1 and its bias towards 0, and train on.

Source: Ioffe & Szegedy 2015, sections 1 and 4.1; Glorot & Bengio 2010.
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import measured
from steadynorm.doctor.rules.rule import ERROR, WARNING, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, ERROR, safe=False, explains=("SN301", "SN308"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    seen = [(layer, data.saturation) for layer, data in measured(evidence) if data.saturation]
    found = [(layer, saturation) for layer, saturation in seen if saturation.share > 0.5]
    if not found:
        return
    layer, first = found[0]
    worst = max(saturation.share for _, saturation in found)
    yield rule.finding(
        layer,
        f"{100 * first.share:.0f} % of the values of the {first.function} that follows lie where "
        f"it is flat, in {100 * first.idle:.0f} % of the channels nearly all",
        {
            "function": first.function,
            "flat_share": first.share,
            "idle_channels": first.idle,
        },
        layers=len(found),
        severity=ERROR if worst > 0.9 else WARNING,
    )
