"""SN208."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class RecomputedNorm(Rule):
    """SN208: activation checkpointing updates the statistics twice."""

    code = "SN208"
    name = "recomputed-norm"
    summary = "The layer runs inside activation checkpointing, which updates its statistics twice."
    why = (
        "Checkpointing runs the forward again in the backward pass. torch's layer cannot tell and "
        "takes the same batch twice: momentum a acts as 1 - (1 - a)², 0.19 for 0.1, the averages "
        "span half the data they should, and num_batches_tracked counts double, which with "
        "momentum=None shifts the average for good."
    )
    source = "pytorch/pytorch issue 96136; facebookresearch/fairscale issue 1035."
    threshold = (
        "While the model ran in training, a checkpointing library (torch's, fairscale's, "
        "deepspeed's) was on the stack when the layer was called, and the layer is not this "
        "package's, which updates once."
    )
    cure = "Use this package's layers, which update once; or leave batch norms out of the segment."
    line = "model, changes = sn.convert(model)"
    severity = Severity.WARNING
    safe = None
    needs = "model"
    explains = ("SN303",)

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding for a layer of others inside a checkpointed segment."""
        place, momentum = layer.place, layer.state.momentum
        if place is None or not place.recomputed or place.ours or not place.moves:
            return
        numbers: dict[str, float | int | str] = {"updates_per_batch": 2}
        message = "inside activation checkpointing: every batch updates the statistics twice"
        if momentum is not None:
            acts = 1 - (1 - momentum) ** 2
            numbers |= {"momentum": momentum, "acts_as": acts}
            message += f", so that momentum {momentum:g} acts as {acts:.3g}"
        yield self.finding(layer, message, numbers)
