"""SN310."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class ValuesNotFinite(Rule):
    """SN310: NaN or infinity reaches a batch norm."""

    code = "SN310"
    name = "values-not-finite"
    summary = "NaN or infinity reaches a batch norm."
    why = (
        "One such value makes the whole channel of the batch NaN and, where the layer trains, its "
        "running statistics for good: every later inference is NaN too, long after the batch."
    )
    source = "pytorch/pytorch issues 1206, 10008 and 115500."
    threshold = "A single value, with every batch norm normalizing as in training. An error."
    cure = "Find the batch or the layer that makes it; `skip` keeps it out of the statistics."
    line = 'layer = sn.BatchNorm2d(channels, nonfinite="skip")'
    severity = Severity.ERROR
    safe = False
    needs = "data"
    explains = ("SN301", "SN302")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, in the layer that is reached first."""
        name = None if evidence.data is None else evidence.data.first_nonfinite
        for layer in evidence.layers:
            if layer.name != name or evidence.data is None:
                continue
            batches = evidence.data.batches
            count = batches if layer.data is None else layer.data.nonfinite
            yield self.finding(
                layer,
                f"its input holds NaN or infinity in {count} of {batches} batches; it is the first "
                f"batch norm that they reach",
                {"calls": count, "batches": batches},
            )
