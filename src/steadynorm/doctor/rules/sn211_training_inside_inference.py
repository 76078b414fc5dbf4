"""The layer is in training mode inside a model that is in inference mode.

It normalizes by the batch where the rest of the model has settled, so that answers depend on the
other samples of a batch, and every batch looked at moves its statistics. It comes of train() called
on a part after eval() on the whole, or of a class that overrides train().

When: The model's mode is inference, the layer's is training, and the layer is not frozen. The other
way round is a common way to freeze, and left alone.

Cure: Put the whole model into inference mode.

Code: model.eval()

Source: Documentation of torch.nn.Module.eval.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301",))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    usage, model = layer.usage, evidence.model
    if usage is None or model is None or model.training or not usage.training:
        return
    if usage.policy != "Frozen":
        yield rule.finding(
            layer,
            "in training mode inside a model in inference mode: batches normalize it and move "
            "its statistics",
            {"policy": usage.policy, "statistics_move": "yes" if usage.moves else "no"},
        )
