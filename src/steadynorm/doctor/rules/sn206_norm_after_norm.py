"""A batch norm straight before: the second one undoes its scale and shift.

The first one's γ and β are a scale and a shift per channel, which the second one takes out again:
their gradient is 0 but for eps, and both layers cost their time and memory. It is usually left over
from gluing blocks together.

When: All of the layer's input comes from one batch norm without an activation of its own, straight
or behind operators that only rearrange, and goes nowhere else in between.

Cure: Take one of the two out, or put what was meant to stand between them there.

Source: Ioffe & Szegedy 2015, section 3.2: BN(a·u + b) = BN(u).
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, WARNING, safe=None)


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    before = layer.usage.before if layer.usage is not None else None
    if before is None or len(before) != 1:
        return
    first = evidence.layer(before[0].name)
    after = first.usage.after if first is not None and first.usage is not None else None
    if first is None or first is layer or after is None or before[0].activated:
        return
    if [user.name for user in after] == [layer.name]:
        yield rule.finding(
            layer,
            f"takes what {first.name!r} gives, and undoes its weight and bias",
            {"first": first.name, "channels": layer.state.num_features},
        )
