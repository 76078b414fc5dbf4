"""Channels are below 0 for every input, and the ReLU that follows gives 0 for all.

No gradient passes them, so weight and bias of such a channel never come back by themselves: the
network is narrower than it was made. A learning rate that is too high, or weight decay that pulls
weight to 0 under a negative bias, leaves them so.

When: Not one value above 0 in any reading of the run's second half, over at least 8 readings and
500 values of the channel, before a ReLU; where the graph of calls is not known, not any gradient
either. A warning from half of a layer's channels on; information from a tenth.

Cure: Lower the learning rate, or take weight and bias out of weight decay.

Code: groups = sn.parameter_groups(model, weight_decay=1e-4)

Source: Lu et al. 2019, Dying ReLU and Initialization; Mehta et al. 2019, section 3.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, Rule

ENOUGH = 500  # values of a channel

rule = Rule(__name__, __doc__, WARNING, safe=False)


@rule.whole
def _check(evidence: Evidence) -> Findings:
    for layer, trend in evidence.trends():
        after = None if layer.usage is None else layer.usage.after
        silent = trend.dead
        if not after and trend.no_gradient is not None:
            silent = silent & trend.no_gradient
        elif not any(part.kind in {"ReLU", "ReLU6", "relu", "relu6"} for part in after or ()):
            continue
        dead, channels = int(np.sum(silent)), silent.size
        if trend.values < ENOUGH or dead < 0.1 * channels:
            continue
        yield rule.finding(
            layer,
            f"{dead} of {channels} channels were never above 0 in {trend.values:,} values",
            {"dead": dead, "channels": channels, "values": trend.values},
            severity=WARNING if 2 * dead >= channels else INFO,
        )
