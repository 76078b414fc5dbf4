"""SN102."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class NonFiniteValues(Rule):
    """SN102: a weight, a bias or a statistic is NaN or infinite."""

    code = "SN102"
    name = "non-finite-values"
    summary = "A weight, bias or running statistic is NaN or infinite."
    why = (
        "One batch with an infinity makes the running mean infinite and the running variance NaN, "
        "and averaging never gets rid of either: training goes on as if nothing were wrong, since "
        "it normalizes by the batch, and in inference every output of the channel is NaN. A weight "
        "or bias that is not finite spoils training too."
    )
    source = "pytorch/pytorch issues 1206, 10008 and 115500."
    threshold = "Any value that is not finite: none of them can be right."
    cure = (
        "Find the batch that brought it (an overflow in half precision, a division by 0), and "
        "measure the statistics anew."
    )
    line = "sn.calibrate(model, batches)"
    severity = Severity.ERROR
    safe = True
    needs = "state"
    explains = ("SN301", "SN302", "SN310")

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all arrays of a layer."""
        numbers: dict[str, float | int | str] = {"channels": layer.state.num_features}
        parts = []
        for name, array in layer.state.arrays().items():
            nan, infinite = int(np.isnan(array).sum()), int(np.isinf(array).sum())
            for count, what in ((nan, "NaN"), (infinite, "infinite")):
                if count:
                    numbers[f"{name}_{what.lower()}"] = count
                    parts.append(f"{name} is {what} in {count} of {array.size} channels")
        if not parts:
            return
        if {"weight", "bias"} & {part.split()[0] for part in parts}:
            cure = "Go back to a checkpoint from before: trained values cannot be measured anew."
            yield self.finding(layer, "; ".join(parts), numbers, cure=cure, line="", safe=None)
        else:
            yield self.finding(layer, "; ".join(parts), numbers)
