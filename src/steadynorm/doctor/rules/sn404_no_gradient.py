"""SN404."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class NoGradient(Rule):
    """SN404: no gradient reaches a batch norm that is to be trained."""

    code = "SN404"
    name = "no-gradient"
    summary = "No gradient reaches a batch norm whose weight and bias are to be trained."
    why = (
        "It and all before it stand still. A detach, a dead activation after it, or a policy that "
        "normalizes one value by itself stop the gradient without a word."
    )
    source = "Ioffe & Szegedy 2015, section 3: the gradient through the normalization."
    threshold = (
        "A gradient of exactly 0 for the layer's output, or none at all, in every reading of the "
        "run's second half, at least 8, while another layer had one. An error."
    )
    cure = "Find what stops it between this layer and the loss; freeze the layer if that is meant."
    line = "model, changes = sn.freeze(model)"
    severity = Severity.ERROR
    safe = False
    needs = "run"

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where others have a gradient and this layer has none."""
        run, place = evidence.run, layer.place
        if run is None or place is None or not any(place.trained.values()):
            return
        late = run.second_half(layer.name)
        others = len({r.layer for r in run.readings if r.gradient > 0 and r.step >= run.steps / 2})
        if len(late) < 8 or any(reading.gradient != 0 for reading in late) or not others:
            return
        yield self.finding(
            layer,
            f"no gradient, or one of exactly 0, in all {len(late)} readings of the run's second "
            f"half, while {others} of {len(run.layers)} batch norms had one",
            {"readings": len(late), "layers_with_gradient": others},
        )
