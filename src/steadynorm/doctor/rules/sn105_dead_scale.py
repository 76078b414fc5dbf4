"""SN105."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule

DEAD = 1e-3


class DeadScale(Rule):
    """SN105: the weight of channels is 0, so that nothing of their input passes."""

    code = "SN105"
    name = "dead-scale"
    summary = "The weight γ of channels is practically 0: they give their bias, whatever comes in."
    why = (
        "Such a channel costs its memory and arithmetic and says nothing. A few are what weight "
        "decay leaves of channels that were not needed, and can be pruned. Half of a layer is a "
        "sign of too much decay on γ, of a learning rate that threw them there, or of weights that "
        "were not loaded. Where γ is exactly 0 no gradient reaches what lies before it."
    )
    source = "Liu et al. 2017, Network Slimming, which prunes by γ."
    threshold = (
        "|γ| at most a thousandth of the layer's largest: such a channel moves what comes next by "
        "less than rounding does in bfloat16. A warning from half of the channels on, else "
        "information. A layer whose γ is 0 throughout and whose bias is 0 was made so, to let a "
        "residual branch start silent (Goyal et al. 2017): information."
    )
    cure = (
        "Take γ out of weight decay and train on, or set the channels' γ to 1 again; channels that "
        "stay dead can be pruned."
    )
    severity = Severity.WARNING
    safe = None
    needs = "state"

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where channels have a weight of practically 0."""
        weight, bias = layer.state.weight, layer.state.bias
        weight = None if weight is None else weight[np.isfinite(weight)]
        if weight is None or not weight.size:
            return
        size = np.abs(weight)
        dead = int((size <= DEAD * size.max()).sum())
        if not dead:
            return
        numbers: dict[str, float | int | str] = {
            "dead": dead,
            "channels": weight.size,
            "largest": float(size.max()),
        }
        if dead < weight.size:
            message = (
                f"weight is at most a thousandth of the largest ({size.max():.3g}) in {dead} of "
                f"{weight.size} channels"
            )
            severity = Severity.WARNING if 2 * dead >= weight.size else Severity.INFO
            yield self.finding(layer, message, numbers, severity=severity)
        elif bias is None or not bias.any():
            message = f"weight and bias are 0 in all {dead} channels: the layer gives 0"
            yield self.finding(layer, message, numbers, severity=Severity.INFO)
        else:
            message = f"weight is 0 in all {dead} channels: the layer gives its bias alone"
            yield self.finding(layer, message, numbers)
