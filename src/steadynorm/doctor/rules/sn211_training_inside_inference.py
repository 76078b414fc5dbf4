"""SN211."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class TrainingInsideInference(Rule):
    """SN211: the layer is in training mode, the model is not."""

    code = "SN211"
    name = "training-inside-inference"
    summary = "The layer is in training mode inside a model that is in inference mode."
    why = (
        "It normalizes by the batch where the rest of the model has settled, so that answers "
        "depend on the other samples of a batch, and every batch looked at moves its statistics. "
        "It comes of train() called on a part after eval() on the whole, or of a class that "
        "overrides train()."
    )
    source = "Documentation of torch.nn.Module.eval."
    threshold = (
        "The model's mode is inference, the layer's is training, and the layer is not frozen. The "
        "other way round is a common way to freeze, and left alone."
    )
    cure = "Put the whole model into inference mode."
    line = "model.eval()"
    severity = Severity.WARNING
    safe = None
    needs = "model"
    explains = ("SN301",)

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where modes are mixed."""
        place, model = layer.place, evidence.model
        if place is None or model is None or model.training or not place.training:
            return
        if place.policy != "Frozen":
            yield self.finding(
                layer,
                "in training mode inside a model in inference mode: batches normalize it and move "
                "its statistics",
                {"policy": place.policy, "statistics_move": "yes" if place.moves else "no"},
            )
