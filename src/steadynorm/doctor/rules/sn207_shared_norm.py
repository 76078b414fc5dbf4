"""SN207."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class SharedNorm(Rule):
    """SN207: one layer is called several times in a forward."""

    code = "SN207"
    name = "shared-norm"
    summary = "One layer normalizes several different inputs in one forward."
    why = (
        "In training each call is normalized by its own statistics, while one pair of running "
        "statistics averages over all of them: in inference every call is normalized by a mixture "
        "that fits none, unless the inputs are alike, as in a twin network fed from one source. "
        "Under DistributedDataParallel a second forward before the backward fails besides."
    )
    source = "pytorch/pytorch issue 175024; Cooijmans et al. 2016, section 4 (statistics per step)."
    threshold = (
        "More than one call in a forward on more than one tensor, by the graph of calls. A layer "
        "that is used again on the same tensor is not meant."
    )
    cure = "Give each place a batch norm of its own; the other weights can stay shared."
    severity = Severity.WARNING
    safe = None
    needs = "model"
    explains = ("SN301", "SN302")

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where the calls' inputs differ."""
        if layer.place is None:
            return
        calls, inputs = layer.place.calls or 0, layer.place.inputs or 0
        if min(calls, inputs) < 2:
            return
        yield self.finding(
            layer,
            f"called {calls} times in a forward, on {inputs} different inputs, with one pair of "
            f"running statistics",
            {"calls": calls, "inputs": inputs},
        )
