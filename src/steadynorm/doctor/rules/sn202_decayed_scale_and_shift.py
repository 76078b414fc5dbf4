"""The optimizer pulls γ or β towards 0 by weight decay.

Decay of the weights before a batch norm only tunes the step size, since their scale is undone.
Decay of γ and β pulls the outputs themselves towards 0, by the same strength whatever the layer,
and small γ then die (SN105).

When: An optimizer was given, and holds a γ or β that requires a gradient in a group whose weight
decay is above 0. One finding for the model: the cure is one line for all layers.

Cure: Build the optimizer from two groups, without decay for norms and biases.

Source: He et al. 2019, Bag of Tricks, section 3.1; pytorch/pytorch issue 1402; ultralytics/yolov5
issue 4104.
"""

from __future__ import annotations

from importlib import import_module

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, Rule

rule = Rule(__name__, __doc__, WARNING, safe=None, explains=("SN105",))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    decayed = [
        (layer, name, rate)
        for layer in evidence.layers
        if layer.usage is not None
        for name, rate in layer.usage.decay.items()
        if layer.usage.trained[name]
    ]
    if not decayed or evidence.model is None:
        return
    layers = len({id(layer) for layer, _, _ in decayed})
    largest = max(rate for _, _, rate in decayed)
    parts = " and ".join(sorted({name for _, name, _ in decayed}, reverse=True))
    optimizer = evidence.model.optimizer
    groups = f"sn.parameter_groups(model, weight_decay={largest:g})"
    torchs = hasattr(import_module("torch.optim"), optimizer)  # neither another's nor several
    yield rule.finding(
        None,
        f"{optimizer} decays {parts} of {layers} of {len(evidence.layers)} batch norms by "
        f"{largest:g}, first of {decayed[0][0].name or 'the model'!r}",
        {
            "layers_decayed": layers,
            "layers": len(evidence.layers),
            "parameters_decayed": len(decayed),
            "weight_decay": largest,
            "first_layer": decayed[0][0].name,
        },
        line=f"torch.optim.{optimizer}({groups}, ...)" if torchs else f"groups = {groups}",
    )
