"""SN210."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class TrainingModeAtExport(Rule):
    """SN210: the model is about to be exported in training mode."""

    code = "SN210"
    name = "training-mode-at-export"
    summary = "The model is about to be exported while batch norms are in training mode."
    why = (
        "An exported graph has one mode baked in. In training mode it normalizes by whatever batch "
        "it is given, answers one sample by how the others look, cannot be folded, and may carry "
        "the update of the running statistics along."
    )
    source = "pytorch/pytorch issue 151726; microsoft/onnxruntime issue 16867."
    threshold = (
        "diagnose was told that the model is about to be exported, and a layer that normalizes by "
        "batches in training is in training mode."
    )
    cure = "Put the model into inference mode before exporting it."
    line = "model.eval()"
    severity = Severity.ERROR
    safe = None
    needs = "model"
    explains = ("SN211",)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for the model."""
        if evidence.model is None or not evidence.model.exporting:
            return
        found = [
            layer
            for layer in evidence.layers
            if layer.place is not None and layer.place.training and layer.place.policy != "Frozen"
        ]
        if found:
            total = len(evidence.layers)
            yield self.finding(
                None,
                f"{len(found)} of {total} batch norms are in training mode, first "
                f"{found[0].name or 'the model'!r}",
                {"layers_training": len(found), "layers": total, "first_layer": found[0].name},
            )
