"""SN307."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.apart import called
from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class SaturatedActivation(Rule):
    """SN307: the sigmoid or tanh after a batch norm is saturated."""

    code = "SN307"
    name = "saturated-activation"
    summary = "The sigmoid or tanh after the batch norm is saturated: almost no gradient passes."
    why = (
        "Where the slope is near 0 the layers before learn nothing, and the unit tells little more "
        "than a sign. Batch normalization is there to keep values where the slope is; large "
        "weights or biases of the batch norm itself carry them away again."
    )
    source = "Ioffe & Szegedy 2015, sections 1 and 4.1; Glorot & Bengio 2010."
    threshold = (
        "Flat: a slope below a twentieth of the steepest, |z| > 4.4 for sigmoid and 2.2 for tanh. "
        "A warning from half of the values, an error from nine tenths; normalized values with "
        "weight 1 and bias 0 are flat in 0.001 % and 3 % of cases. What the model returns as its "
        "answer is left out: it is meant to decide."
    )
    cure = "Set the batch norm's weight back towards 1 and its bias towards 0, and train on."
    severity = Severity.ERROR
    safe = False
    needs = "data"
    explains = ("SN301", "SN308")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, in the first layer that saturates what follows it."""
        found = []
        for layer in called(evidence):
            seen = None if layer.data is None else layer.data.saturation
            if seen is not None and seen.share > 0.5:
                found.append((layer, seen))
        if not found:
            return
        layer, seen = found[0]
        worst = max(share.share for _, share in found)
        message = (
            f"{100 * seen.share:.0f} % of the values of the {seen.function} that follows lie where "
            f"it is flat, in {100 * seen.idle:.0f} % of the channels nearly all"
        )
        if len(found) > 1:
            message += f"; {len(found)} layers are concerned, this is the first"
        yield self.finding(
            layer,
            message,
            {
                "function": seen.function,
                "flat_share": seen.share,
                "idle_channels": seen.idle,
                "layers_concerned": len(found),
            },
            severity=Severity.ERROR if worst > 0.9 else Severity.WARNING,
        )
