"""NaN or infinity reaches a batch norm.

One such value makes the whole channel of the batch NaN and, where the layer trains, its running
statistics for good: every later inference is NaN too, long after the batch.

When: A single value, with every batch norm normalizing as in training. An error.

Cure: Find the batch or the layer that makes it; `skip` keeps it out of the statistics.

Code: layer = sn.BatchNorm2d(channels, nonfinite="skip")

Source: pytorch/pytorch issues 1206, 10008 and 115500.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import ERROR, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, ERROR, safe=False, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    data = evidence.data
    layer = None if data is None else evidence.layer(data.first_nonfinite)
    if data is None or layer is None:
        return
    count = data.batches if layer.data is None else layer.data.nonfinite
    yield rule.finding(
        layer,
        f"its input holds NaN or infinity in {count} of {data.batches} batches; it is the first "
        f"batch norm that they reach",
        {"calls": count, "batches": data.batches},
    )
