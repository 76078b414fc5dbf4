"""A batch has one value per channel, which has no variance: training refuses it.

The mean of one value is the value, and the output would be the bias whatever the input. torch
raises ValueError. It is met in training with batches of one behind pooling or fully connected
layers, and at the end of an epoch, where the last batch holds what is left over: hours into a run.

When: An error where a batch of those given has one value per channel; a warning where the loader's
last batch of an epoch will. Layers that train with other statistics than the batch's are left out.

Cure: Leave the last odd batch out, or train with Steady, which takes batches of one.

Code: loader = DataLoader(dataset, batch_size=..., drop_last=True)

Source: pytorch/pytorch issues 4534 and 77014.
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import measured
from steadynorm.doctor.rules.rule import ERROR, WARNING, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, ERROR, safe=False)


@rule.whole
def _check(evidence: Evidence) -> Findings:
    layers = measured(evidence)
    refused = [(layer, data.single) for layer, data in layers if data.single]
    if refused:
        (layer, shape), count = refused[0], len(refused)
        yield rule.finding(
            layer,
            f"an input of shape {shape} has one value per channel: training refuses it",
            {"shape": str(shape)},
            line='model, changes = sn.convert(model, statistics="steady")',
            layers=count,
        )
        return
    if evidence.data is None or evidence.data.last_batch != 1:
        return
    for layer, data in layers:
        if data.trains and data.positions == 1 and layer.by_batch:
            yield rule.finding(
                layer,
                f"the last batch of an epoch holds 1 sample, where the others hold "
                f"{data.samples}: training will stop there",
                {"last_batch": 1, "samples": data.samples},
                severity=WARNING,
            )
            return
