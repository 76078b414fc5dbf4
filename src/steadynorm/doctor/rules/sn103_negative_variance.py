"""SN103."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class NegativeVariance(Rule):
    """SN103: a running variance is negative."""

    code = "SN103"
    name = "negative-variance"
    summary = "A running variance is negative, which no variance is."
    why = (
        "Below -eps the square root gives NaN; above it the channel is blown up. It comes from "
        "computing E[x²] - E[x]² in float32 where the mean is large, from averaging checkpoints "
        "with negative weights, or from noise or an optimizer applied to buffers."
    )
    source = "google/flax issue 1491; keras-team/keras-core issue 866."
    threshold = "Any value below 0. Values that are not finite are SN102's."
    cure = "Measure the statistics anew."
    line = "sn.calibrate(model, batches)"
    severity = Severity.ERROR
    safe = True
    needs = "state"
    explains = ("SN301", "SN302", "SN310")

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where any channel's variance is below 0."""
        var = layer.state.running_var
        if var is None or not (var < 0).any():
            return
        count, smallest = int((var < 0).sum()), float(var[var < 0].min())
        yield self.finding(
            layer,
            f"running_var is negative in {count} of {var.size} channels, down to {smallest:.3g}",
            {"negative": count, "channels": var.size, "smallest": smallest},
        )
