"""A running variance is negative, which no variance is.

Below -eps the square root gives NaN; above it the channel is blown up. It comes from computing
E[x²] - E[x]² in float32 where the mean is large, from averaging checkpoints with negative weights,
or from noise or an optimizer applied to buffers.

When: Any value below 0. Values that are not finite are SN102's.

Cure: Measure the statistics anew.

Code: sn.calibrate(model, batches)

Source: google/flax issue 1491; keras-team/keras-core issue 866.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import ERROR, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, ERROR, safe=True, explains=("SN301", "SN302", "SN310"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    var = layer.state.running_var
    if var is None or not (var < 0).any():
        return
    count, smallest = int((var < 0).sum()), float(var[var < 0].min())
    yield rule.finding(
        layer,
        f"running_var is negative in {count} of {var.size} channels, down to {smallest:.3g}",
        {"negative": count, "channels": var.size, "smallest": smallest},
    )
