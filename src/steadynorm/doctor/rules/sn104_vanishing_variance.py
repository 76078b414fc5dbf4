"""SN104."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule

FAR_BELOW = 100


class VanishingVariance(Rule):
    """SN104: eps, not the data, decides the scale."""

    code = "SN104"
    name = "vanishing-variance"
    summary = "The running variance is 0 or below eps, so that eps decides the scale."
    why = (
        "A channel whose input hardly varies is divided by √eps instead of its standard "
        "deviation: it comes out smaller than the network was meant to see it, and if its input "
        "varies after all, as on other data, it is multiplied by up to 1/√eps, 316 for 1e-5. "
        "Behind it are units that died, features that are constant in the training data, weights "
        "so small that the signal fades on its way, or statistics that were filled with 0."
    )
    source = "Ioffe & Szegedy 2015, Alg. 1, where eps is there for stability alone."
    threshold = (
        "An error where every channel is exactly 0: even a network that has died varies by "
        "rounding. A warning where at least half of the channels lie below a hundredth of eps: "
        "they leave with a tenth of the standard deviation they should have. Information where any "
        "channel lies below eps, as a few do in most trained networks."
    )
    cure = (
        "Measure the statistics on data that varies; if they are right, look for dead units and "
        "constant features before this layer, and for weights made too small."
    )
    line = "sn.calibrate(model, batches)"
    severity = Severity.ERROR
    safe = True
    needs = "state"
    explains = ("SN106", "SN302")

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where a channel's variance is below eps."""
        state = layer.state
        var, eps = state.running_var, state.known_eps
        if var is None or not var.size:
            return
        below = (var >= 0) & (var < eps)
        count = int(below.sum())
        if not count:
            return
        zero = int((var == 0).sum())
        far = int((below & (var < eps / FAR_BELOW)).sum())
        numbers: dict[str, float | int | str] = {
            "eps": eps,
            "below_eps": count,
            "far_below_eps": far,
            "zero": zero,
            "channels": var.size,
            "smallest": float(np.min(var[below])),
        }
        if zero == var.size:
            message = (
                f"running_var is 0 in all {zero} channels: inference multiplies by "
                f"1/√eps = {eps**-0.5:.3g}"
            )
            yield self.finding(layer, message, numbers)
            return
        message = f"running_var lies below eps = {eps:g} in {count} of {var.size} channels"
        if far:
            message += f", below a hundredth of it in {far}"
        many = 2 * far >= var.size
        severity = Severity.WARNING if many else Severity.INFO
        yield self.finding(layer, message, numbers, severity=severity)
