"""The running variance is 0 or below eps, so that eps decides the scale.

A channel whose input hardly varies is divided by √eps instead of its standard deviation: it comes
out smaller than the network was meant to see it, and if its input varies after all, as on other
data, it is multiplied by up to 1/√eps, 316 for 1e-5. Behind it are units that died, features that
are constant in the training data, weights so small that the signal fades on its way, or statistics
that were filled with 0.

When: An error where every channel is exactly 0: even a network that has died varies by rounding. A
warning where at least half of the channels lie below a tenth of eps: they leave with less than a
third of the standard deviation they should have. Where the layer before has no weight above 0.01 it
is named, and half of the channels below three times eps are enough, which takes a seventh off their
standard deviation: weight decay without bound shrinks what a batch norm follows, until eps decides.
Information where any channel lies below eps, as a few
do in most trained networks.

Cure: Measure the statistics on data that varies; if they are right, look for dead units and
constant features before this layer, and for weights made too small: multiply them, and let weight
decay end where a batch norm follows.

Code: sn.calibrate(model, batches)

Source: Ioffe & Szegedy 2015, Alg. 1, where eps is there for stability alone.
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.rules.rule import (
    ERROR,
    INFO,
    WARNING,
    Evidence,
    Findings,
    NormEvidence,
    Numbers,
    Rule,
)  # fmt: skip

FAR_BELOW = 10
NEAR = 3  # 1 - √(3/4) = 0.13
SHRUNK = 0.01

rule = Rule(__name__, __doc__, ERROR, safe=True, explains=("SN106", "SN301", "SN302"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    state = layer.state
    var, eps = state.running_var, state.known_eps
    if var is None or not var.size:
        return
    usage = layer.usage
    peak = None if usage is None or usage.host_peak is None else float(usage.host_peak.max())
    shrunk = peak is not None and peak < SHRUNK
    limit = NEAR * eps if shrunk else eps
    below = (var >= 0) & (var < limit)
    count = int(below.sum())
    if not count:
        return
    zero = int((var == 0).sum())
    far = int((below & (var < eps / FAR_BELOW)).sum())
    numbers: Numbers = {
        "eps": eps,
        "below_eps": int((below & (var < eps)).sum()),
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
        yield rule.finding(layer, message, numbers)
        return
    named = f"{NEAR} eps = {limit:g}" if shrunk else f"eps = {eps:g}"
    message = f"running_var lies below {named} in {count} of {var.size} channels"
    if far:
        message += f", below a tenth of {'eps' if shrunk else 'it'} in {far}"
    if shrunk and peak is not None and usage is not None and usage.before:
        numbers["largest_weight"] = peak
        message += f"; {usage.before[0].name!r} before it has no weight above {peak:.2g}"
    many = 2 * (count if shrunk else far) >= var.size
    severity = WARNING if many else INFO
    yield rule.finding(layer, message, numbers, severity=severity)
