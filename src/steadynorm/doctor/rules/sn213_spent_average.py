"""momentum=None averages over all batches, and so many were counted that nothing moves it.

With momentum = None the running statistics are the plain average of all batches since the count
was last 0: the next batch weighs 1/(count + 1). In fine-tuning, a count that came with the
checkpoint holds the statistics where they were, while the weights move on and training normalizes
with batches: good in train(), worse and worse in eval(). From the beginning of training the average
remembers the first weights as well as the last.

When: momentum is None and the count is 1,000 or more: moving half the way takes as many batches
again. A warning where the layer is in training mode and its statistics move; in inference
information.

Cure: Set a momentum, or the count to 0 where new training begins; measure the statistics when it
ends.

Source: torch.nn.BatchNorm2d's documentation of momentum=None (cumulative moving average).
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, NormEvidence, Rule
from steadynorm.doctor.rules.sn107_momentum_of_another_framework import WITHOUT_MOMENTUM, setting

MANY = 1000

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301", "SN302", "SN402"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    state, usage = layer.state, layer.usage
    count = state.num_batches_tracked
    if usage is None or usage.policy in WITHOUT_MOMENTUM or not usage.moves:
        return  # a checkpoint does not say what its momentum is
    if state.momentum is not None or count is None or count < MANY:
        return
    yield rule.finding(
        layer,
        f"momentum is None after {count} batches: the next one weighs {1 / (count + 1):.2g}",
        {"num_batches_tracked": count, "weight_of_new_batch": 1 / (count + 1)},
        severity=WARNING if usage.training else INFO,
        line=setting(layer, "momentum", 0.1),
    )
