"""SN401."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class NotFiniteInTraining(Rule):
    """SN401: NaN or infinity reached a batch norm while training."""

    code = "SN401"
    name = "not-finite-in-training"
    summary = "NaN or infinity reached a batch norm while the model trained."
    why = (
        "The running statistics of those channels are NaN from that step on, and so is every "
        "inference, though training itself may go on as if nothing had been: it normalizes with "
        "the next batch."
    )
    source = "pytorch/pytorch issues 1206, 10008 and 115500."
    threshold = "A single channel in a single reading. An error."
    cure = "Find the batch or the layer that makes it; `skip` keeps it out of the statistics."
    line = 'layer = sn.BatchNorm2d(channels, nonfinite="skip")'
    severity = Severity.ERROR
    safe = False
    needs = "run"
    explains = ("SN102", "SN402", "SN403", "SN404")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, in the layer that was reached first."""
        run = evidence.run
        bad = [] if run is None else [r for r in run.readings if r.nonfinite]
        if run is None or not bad:
            return
        first = bad[0]
        layer = next((layer for layer in evidence.layers if layer.name == first.layer), None)
        steps = len({reading.step for reading in bad})
        message = (
            f"NaN or infinity in {first.nonfinite} channels at step {first.step}; "
            f"in {steps} of the {len({r.step for r in run.readings})} steps that were read"
        )
        yield self.finding(
            layer,
            message,
            {"step": first.step, "channels": first.nonfinite, "steps": steps},
        )
