"""Each replica normalizes by its own few samples.

Data parallelism splits a batch; gradients are pooled, moments are not. Each replica normalizes by
its own samples, and the running statistics saved are those of replica 0 alone. ImageNet's error
under ResNet-50 rises from 23.7 % at 16 samples a replica to 24.8 % at 8, 27.3 % at 4 and 34.7 % at
2.

When: Wrapped in DistributedDataParallel or DataParallel over two replicas or more, layers that do
not pool moments, and fewer than 16 samples a replica, where the figures above leave the level.
Information where no batch was given to count samples by.

Cure: Pool the moments over replicas; convert before wrapping the model.

Code: model, changes = sn.convert(model, synchronize=True)

Source: Wu & He 2018, Group Normalization, table 2; pytorch/pytorch issues 65907 and 22095.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, Numbers, Rule

ENOUGH = 16

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN303",))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    model = evidence.model
    if model is None or not model.wrapper or model.replicas < 2:
        return
    alone = [
        layer.usage
        for layer in evidence.layers
        if layer.usage is not None and layer.usage.moves and not layer.usage.synchronized
    ]
    if not alone:
        return
    samples = min((p.samples for p in alone if p.samples is not None), default=None)
    if samples is not None and model.wrapper == "DataParallel":
        samples = -(-samples // model.replicas)  # one process splits the batch
    if samples is not None and samples >= ENOUGH:
        return
    numbers: Numbers = {
        "replicas": model.replicas,
        "layers_alone": len(alone),
        "layers": len(evidence.layers),
    }
    message = (
        f"{len(alone)} of {len(evidence.layers)} batch norms on {model.replicas} replicas "
        f"({model.wrapper}) normalize each by itself"
    )
    if samples is None:
        message += "; give batches to see by how many samples"
        yield rule.finding(None, message, numbers, severity=INFO)
    else:
        numbers["samples"] = samples
        message += f", by {samples} {'sample' if samples == 1 else 'samples'}"
        yield rule.finding(None, message, numbers)
