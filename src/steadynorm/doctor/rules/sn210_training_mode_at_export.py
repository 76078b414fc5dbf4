"""The model is about to be exported while batch norms are in training mode.

An exported graph has one mode baked in. In training mode it normalizes by whatever batch it is
given, answers one sample by how the others look, cannot be folded, and may carry the update of the
running statistics along.

When: diagnose was told that the model is about to be exported, and a layer that normalizes by
batches in training is in training mode.

Cure: Put the model into inference mode before exporting it.

Code: model.eval()

Source: pytorch/pytorch issue 151726; microsoft/onnxruntime issue 16867.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import ERROR, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, ERROR, safe=None, explains=("SN211",))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    if evidence.model is None or not evidence.model.exporting:
        return
    found = [
        layer
        for layer in evidence.layers
        if layer.usage is not None and layer.usage.training and layer.usage.policy != "Frozen"
    ]
    if found:
        total = len(evidence.layers)
        yield rule.finding(
            None,
            f"{len(found)} of {total} batch norms are in training mode, first "
            f"{found[0].name or 'the model'!r}",
            {"layers_training": len(found), "layers": total, "first_layer": found[0].name},
        )
