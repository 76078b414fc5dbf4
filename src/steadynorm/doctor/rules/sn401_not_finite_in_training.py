"""NaN or infinity reached a batch norm while the model trained.

The running statistics of those channels are NaN from that step on, and so is every inference,
though training itself may go on as if nothing had been: it normalizes with the next batch.

When: A single channel in a single reading. An error.

Cure: Find the batch or the layer that makes it; `skip` keeps it out of the statistics.

Code: layer = sn.BatchNorm2d(channels, nonfinite="skip")

Source: pytorch/pytorch issues 1206, 10008 and 115500.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import ERROR, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, ERROR, safe=False, explains=("SN102", "SN402", "SN403", "SN404"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    run = evidence.run
    bad = [] if run is None else [r for r in run.readings if r.nonfinite]
    if run is None or not bad:
        return
    first = bad[0]
    steps = len({reading.step for reading in bad})
    good = max((r.step for r in run.readings if r.step < first.step), default=None)
    since = "" if good is None else f" (not yet at step {good})"
    message = (
        f"NaN or infinity in {first.nonfinite} channels at step {first.step}{since}; "
        f"in {steps} of the {len({r.step for r in run.readings})} steps that were read"
    )
    yield rule.finding(
        evidence.layer(first.layer),
        message,
        {"step": first.step, "channels": first.nonfinite, "steps": steps},
    )
