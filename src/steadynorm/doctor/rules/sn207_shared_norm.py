"""One layer normalizes several different inputs in one forward.

In training each call is normalized by its own statistics, while one pair of running statistics
averages over all of them: in inference every call is normalized by a mixture that fits none, unless
the inputs are alike, as in a twin network fed from one source. Under DistributedDataParallel a
second forward before the backward fails besides.

When: More than one call in a forward on more than one tensor, by the graph of calls, and inputs
that differ: a divergence of 0.02 or more of one call's inputs from all of them together. Two views
of one picture do not differ so, nor does one tensor used again. Information where no batches were
given to compare the inputs by.

Cure: Give each place a batch norm of its own; the other weights can stay shared.

Source: pytorch/pytorch issue 175024; Cooijmans et al. 2016, section 4 (statistics per step).
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import FAR
from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301", "SN302"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    if layer.usage is None:
        return
    calls, inputs = layer.usage.calls or 0, layer.usage.inputs or 0
    divergence = None if layer.data is None else layer.data.calls_divergence
    if min(calls, inputs) < 2 or (divergence is not None and divergence < FAR):
        return
    message = (
        f"called {calls} times in a forward, on {inputs} different inputs, with one pair of "
        f"running statistics"
    )
    numbers = {"calls": calls, "inputs": inputs}
    if divergence is None:
        message += "; give batches to see whether the inputs differ"
        yield rule.finding(layer, message, numbers, severity=INFO)
    else:
        message += f", which lie up to a divergence of {divergence:.2g} from a call's own"
        yield rule.finding(layer, message, {**numbers, "divergence": divergence})
