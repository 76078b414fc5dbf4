"""The layer runs inside activation checkpointing, which updates its statistics twice.

Checkpointing runs the forward again in the backward pass. torch's layer cannot tell and takes the
same batch twice: momentum a acts as 1 - (1 - a)², 0.19 for 0.1, the averages span half the data
they should, and num_batches_tracked counts double, which with momentum=None shifts the average for
good.

When: While the model ran in training, a checkpointing library (torch's, fairscale's, deepspeed's)
was on the stack when the layer was called, and the layer is not this package's, which updates once.

Cure: Use this package's layers, which update once; or leave batch norms out of the segment.

Code: model, changes = sn.convert(model)

Source: pytorch/pytorch issue 96136; facebookresearch/fairscale issue 1035.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Numbers, Rule

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN303",))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    usage, momentum = layer.usage, layer.state.momentum
    if usage is None or not usage.recomputed or usage.ours or not usage.moves:
        return
    numbers: Numbers = {"updates_per_batch": 2}
    message = "inside activation checkpointing: every batch updates the statistics twice"
    if momentum is not None:
        acts = 1 - (1 - momentum) ** 2
        numbers |= {"momentum": momentum, "acts_as": acts}
        message += f", so that momentum {momentum:g} acts as {acts:.3g}"
    yield rule.finding(layer, message, numbers)
