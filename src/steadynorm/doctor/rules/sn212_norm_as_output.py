"""A batch norm is the last layer of a classifier or a regression.

Each output then has mean β and standard deviation γ over every batch of training, whatever the
batch: a batch of one class, or of targets far from the average, cannot be answered as it should,
and in training the answer to one sample depends on its neighbours. In inference that tie is gone,
and answers leave the range that the loss has seen.

When: All that takes the layer's output is the model's output, by the graph of calls. Only
where batches hold targets, classes or values: backbones and the projection heads of self-supervised
training end so on purpose.

Cure: Take it out, or put it before the last linear layer.

Source: Ioffe & Szegedy 2015, section 3.2, places it before a nonlinearity; Chen & He 2021
(SimSiam), section 3, for projection heads.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Numbers, Rule

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301", "SN302"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    usage, state = layer.usage, layer.state
    targets = "" if evidence.data is None else evidence.data.targets
    if usage is None or not usage.after or not targets:
        return
    if {user.kind for user in usage.after} != {"output"}:
        return
    channels = state.num_features
    numbers: Numbers = {"channels": channels, "targets": targets}
    message = "is the model's last layer"
    if state.weight is not None and state.bias is not None:
        largest = float(np.abs(state.weight).max())
        numbers["largest_std"] = largest
        message += (
            f": in training its {channels} outputs have standard deviations of at most "
            f"{largest:.2g} in every batch"
        )
    yield rule.finding(layer, message, numbers)
