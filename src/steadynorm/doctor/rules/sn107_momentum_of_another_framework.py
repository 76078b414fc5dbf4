"""momentum looks as if it were meant in another framework's words.

torch means by momentum the weight of the new batch, Keras and flax that of the old average: 0.99
there is 0.01 here. Taken over as it is, the running statistics are those of the last batch and
little else, and inference is as noisy as that batch was; the other way round they take a hundred
times as long to follow the weights.

When: 0.9 or more under torch, 0.1 or less under Keras and flax: their defaults (0.1, and 0.99) and
what people choose lie on the other side. A warning where the layer is in training mode, its mode
is not known, or its statistics are not those of the batches (the divergence of SN302); else, in
inference, the momentum is not used: information.

Cure: Set momentum to 1 minus what it is, then measure the statistics anew.

Source: pytorch/examples issue 289; ludwig-ai/ludwig issue 2100; kazuto1011/deeplab-pytorch issue
79.
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import running_divergence
from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, NormEvidence, Rule
from steadynorm.statistics import CONVENTIONS

WITHOUT_MOMENTUM = ("Steady", "Frozen")

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN301", "SN302", "SN303"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    state, usage = layer.state, layer.usage
    momentum = state.momentum
    if momentum is None or (usage is not None and usage.policy in WITHOUT_MOMENTUM):
        return
    new = CONVENTIONS[state.framework].momentum_weighs == "new"
    weight = min(momentum if new else 1 - momentum, 1.0)  # of the new batch
    if weight < 0.9:
        return
    others, here = ("Keras and flax", state.framework) if new else ("torch", state.framework)
    # The average of so many batches alike is as certain as one weighted a, (1-a)a, (1-a)²a, …
    batches = (2 - weight) / weight
    message = (
        f"momentum is {momentum:g}: for {here} a new batch weighs {weight:g}, so that the "
        f"statistics know as much as {batches:.3g} batches; {others} would mean "
        f"{1 - weight:.3g}"
    )
    numbers = {
        "momentum": momentum,
        "weight_of_new_batch": weight,
        "batches_remembered": batches,
    }
    divergence = running_divergence(layer)
    used = (
        usage is None
        or (usage.training and usage.moves)
        or (divergence is not None and divergence.far)
    )
    yield rule.finding(
        layer,
        message,
        numbers,
        severity=WARNING if used else INFO,
        line=setting(layer, "momentum", 1 - momentum),
    )


def setting(layer: NormEvidence, name: str, value: float) -> str:
    """The line that sets an attribute of a layer; none for a checkpoint, which has none."""
    if layer.usage is None:
        return ""
    owner = f"model.get_submodule({layer.name!r})" if layer.name else "model"
    return f"{owner}.{name} = {value:.6g}"
