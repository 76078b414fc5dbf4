"""No gradient reaches a batch norm whose weight and bias are to be trained.

It and all before it stand still. A detach, a dead activation after it, or a policy that normalizes
one value by itself stop the gradient without a word.

When: A gradient of exactly 0 for the layer's output, or none at all, in every reading of the run's
second half, at least 8, while another layer had one. An error.

Cure: Find what stops it between this layer and the loss; freeze the layer if that is meant.

Code: model, changes = sn.freeze(model)

Source: Ioffe & Szegedy 2015, section 3: the gradient through the normalization.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import ERROR, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, ERROR, safe=False)


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    run, usage = evidence.run, layer.usage
    if run is None or usage is None or not any(usage.trained.values()):
        return
    late = run.second_half(layer.name)
    others = len({r.layer for r in run.readings if r.gradient > 0 and r.step >= run.steps / 2})
    if len(late) < 8 or any(reading.gradient != 0 for reading in late) or not others:
        return
    yield rule.finding(
        layer,
        f"no gradient, or one of exactly 0, in all {len(late)} readings of the run's second "
        f"half, while {others} of {len(run.layers)} batch norms had one",
        {"readings": len(late), "layers_with_gradient": others},
    )
