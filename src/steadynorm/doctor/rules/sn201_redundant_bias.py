"""The layer before has a bias, which this one subtracts again.

A batch norm subtracts the mean, and with it any constant added before: the bias changes no output
in training, its gradient is 0, and it costs a parameter per channel to store, update and
synchronize. Weight decay and noise still move it, and the running mean has to follow. β does its
work.

When: By the graph of calls: all that takes the biased output is batch norms that subtract the
batch's mean in full. Always information: it costs a little and spoils nothing.

Cure: Drop it; the running mean moves along, so that answers stay the same.

Code: model, changes = sn.drop_redundant_bias(model, example_inputs)

Source: Ioffe & Szegedy 2015, section 3.2; matterport/Mask_RCNN issue 1455.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import INFO, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, INFO, safe=True)


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    if layer.usage is not None and layer.usage.redundant_bias is not None:
        bias, channels = layer.usage.redundant_bias, layer.state.num_features
        message = f"{bias} is subtracted again: {channels} parameters that change nothing"
        yield rule.finding(layer, message, {"bias": bias, "parameters": channels})
