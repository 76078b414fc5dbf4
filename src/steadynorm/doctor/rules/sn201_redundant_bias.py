"""SN201."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class RedundantBias(Rule):
    """SN201: the bias before the layer does nothing."""

    code = "SN201"
    name = "redundant-bias"
    summary = "The layer before has a bias, which this one subtracts again."
    why = (
        "A batch norm subtracts the mean, and with it any constant added before: the bias changes "
        "no output in training, its gradient is 0, and it costs a parameter per channel to store, "
        "update and synchronize. Weight decay and noise still move it, and the running mean has to "
        "follow. β does its work."
    )
    source = "Ioffe & Szegedy 2015, section 3.2; matterport/Mask_RCNN issue 1455."
    threshold = (
        "By the graph of calls: all that takes the biased output is batch norms that subtract the "
        "batch's mean in full. Always information: it costs a little and spoils nothing."
    )
    cure = "Drop it; the running mean moves along, so that answers stay the same."
    line = "model, changes = sn.drop_redundant_bias(model, example_inputs)"
    severity = Severity.INFO
    safe = True
    needs = "model"

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where a bias is cancelled."""
        if layer.place is not None and layer.place.redundant_bias is not None:
            bias, channels = layer.place.redundant_bias, layer.state.num_features
            message = f"{bias} is subtracted again: {channels} parameters that change nothing"
            yield self.finding(layer, message, {"bias": bias, "parameters": channels})
