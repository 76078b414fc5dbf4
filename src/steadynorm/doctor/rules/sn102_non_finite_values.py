"""A weight, bias or running statistic is NaN or infinite.

One batch with an infinity makes the running mean infinite and the running variance NaN, and
averaging never gets rid of either: training goes on as if nothing were wrong, since it normalizes
by the batch, and in inference every output of the channel is NaN. A weight or bias that is not
finite spoils training too.

When: Any value that is not finite: none of them can be right.

Cure: Find the batch that brought it (an overflow in half precision, a division by 0), and measure
the statistics anew.

Code: sn.calibrate(model, batches)

Source: pytorch/pytorch issues 1206, 10008 and 115500.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.rules.rule import ERROR, Evidence, Findings, NormEvidence, Numbers, Rule

rule = Rule(__name__, __doc__, ERROR, safe=True, explains=("SN301", "SN302", "SN310"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    numbers: Numbers = {"channels": layer.state.num_features}
    parts = []
    for name, array in layer.state.arrays().items():
        nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
        for count, what in ((nan, "NaN"), (infinite, "infinite")):
            if count:
                numbers[f"{name}_{what.lower()}"] = count
                parts.append(f"{name} is {what} in {count} of {array.size} channels")
    if not parts:
        return
    if {"weight", "bias"} & {part.split()[0] for part in parts}:
        cure = "Go back to a checkpoint from before: trained values cannot be measured anew."
        yield rule.finding(layer, "; ".join(parts), numbers, cure=cure, line="", safe=None)
    else:
        yield rule.finding(layer, "; ".join(parts), numbers)
