"""The weight γ of channels is practically 0: they give their bias, whatever comes in.

Such a channel costs its memory and arithmetic and says nothing. A few are what weight decay leaves
of channels that were not needed, and can be pruned. Half of a layer is a sign of too much decay on
γ, of a learning rate that threw them there, or of weights that were not loaded. Where γ is exactly
0 no gradient reaches what lies before it.

When: |γ| at most a thousandth of the layer's largest: such a channel moves what comes next by less
than rounding does in bfloat16. A warning from half of the channels on, else information. A layer
whose γ is 0 throughout and whose bias is 0 was made so, to let a residual branch start silent
(Goyal et al. 2017): information.

Cure: Take γ out of weight decay and train on, or set the channels' γ to 1 again; channels that stay
dead can be pruned.

Source: Liu et al. 2017, Network Slimming, which prunes by γ.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, NormEvidence, Rule

DEAD = 1e-3

rule = Rule(__name__, __doc__, WARNING, safe=None)


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    weight, bias = layer.state.weight, layer.state.bias
    weight = None if weight is None else weight[np.isfinite(weight)]
    if weight is None or not weight.size:
        return
    size = np.abs(weight)
    dead = int((size <= DEAD * size.max()).sum())
    if not dead:
        return
    numbers = {"dead": dead, "channels": weight.size, "largest": float(size.max())}
    if dead < weight.size:
        message = (
            f"weight is at most a thousandth of the largest ({size.max():.3g}) in {dead} of "
            f"{weight.size} channels"
        )
        severity = WARNING if 2 * dead >= weight.size else INFO
        yield rule.finding(layer, message, numbers, severity=severity)
    elif bias is None or not bias.any():
        message = f"weight and bias are 0 in all {dead} channels: the layer gives 0"
        yield rule.finding(layer, message, numbers, severity=INFO)
    else:
        message = f"weight is 0 in all {dead} channels: the layer gives its bias alone"
        yield rule.finding(layer, message, numbers)
