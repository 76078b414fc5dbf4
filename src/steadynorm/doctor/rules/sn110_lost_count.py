"""The statistics were trained, and the count of batches beside them is 0.

A checkpoint from before torch counted batches, or from another framework, holds none, and torch
fills in 0. With momentum=None a layer averages over all batches by that count, so the first batch
of fine-tuning replaces the statistics of pretraining.

When: num_batches_tracked is 0 beside statistics that are not 0 and 1. A warning where the layer is
trained with momentum=None under `Batch`, as torch's are. Else information: torch's own layers do
not look at the count while momentum is a number, and `Steady`, `Running` and `Renorm` read such a 0
as many batches. Frozen layers are left alone, and statistics that are not finite (SN102).

Cure: Set the count to the number of batches of pretraining, or give the layers a momentum.

Code: layer.momentum = 0.1

Source: torch.nn.modules.batchnorm._NormBase._load_from_state_dict, which fills in the 0.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, NormEvidence, Rule
from steadynorm.doctor.rules.sn101_statistics_never_updated import initial

rule = Rule(__name__, __doc__, WARNING, safe=False)


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    state, usage = layer.state, layer.usage
    mean, var = state.running_mean, state.running_var
    if state.num_batches_tracked != 0 or mean is None or var is None or initial(state):
        return
    if usage is not None and not usage.moves:
        return
    if not (np.isfinite(mean).all() and np.isfinite(var).all()):
        return
    averages = usage is not None and usage.policy == "Batch" and state.momentum is None
    message = "num_batches_tracked is 0 beside trained statistics"
    if averages:
        message += "; momentum=None averages by that count: the next batch would replace them"
    yield rule.finding(
        layer,
        message,
        {"num_batches_tracked": 0, "channels": state.num_features},
        severity=WARNING if averages else INFO,
    )
