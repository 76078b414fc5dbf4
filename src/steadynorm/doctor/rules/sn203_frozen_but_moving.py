"""Weight and bias are not trained, but a training forward updates the statistics.

requires_grad = False holds parameters, not buffers; so do a forward under `torch.no_grad()` and an
optimizer that was not given them. In fine-tuning, a backbone that was meant to
stay as it is normalizes by the new data's batches and forgets its own statistics: what follows was
trained for other numbers, and the damage is saved with the checkpoint. eval() holds the statistics,
and the next model.train() undoes it.

When: The layer is in training mode and would update its statistics, it has weight or bias, and none
requires a gradient, or the optimizers given hold neither while they hold others of the model, or
with batches all its calls run without gradient while the model trains (activation checkpointing
left aside). For a layer without either, the layers that feed it must be frozen. In inference mode
nothing moves.

Cure: Freeze both halves, so that it survives model.train(); or train both. Leave it where the
statistics are meant to move, as in a momentum encoder.

Code: model, changes = sn.freeze(model)

Source: pytorch/pytorch issue 86590; Lightning-AI/pytorch-lightning issue 15063; keras-team/keras
issue 9965.
"""

from __future__ import annotations

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN301", "SN302"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    usage = layer.usage
    if usage is None or not (usage.training and usage.moves):
        return
    if usage.trained:
        held = not any(usage.trained.values()) or usage.left_out
        held = held or (layer.data is not None and layer.data.with_gradient is False)
        what = " and ".join(usage.trained) + " are" * (len(usage.trained) > 1)
        what = what if len(usage.trained) > 1 else f"{what} is"
    else:
        trained = [n.trained for n in usage.before or () if n.trained is not None]
        held = bool(trained) and not any(trained)
        what = "the layer before is"
    if held:
        yield rule.finding(
            layer,
            f"{what} {_how(layer)}, but a training forward updates running_mean and running_var",
            {"training": "yes", "parameters_held": len(usage.trained)},
            line=_line(layer),
        )


def _how(layer: NormEvidence) -> str:
    usage = layer.usage
    if usage is not None and any(usage.trained.values()):
        return "in no optimizer" if usage.left_out else "run without gradient"
    return "frozen"


def _line(layer: NormEvidence) -> str:
    """Freezes this one layer: others may be trained on purpose."""
    return f"sn.freeze(model.get_submodule({layer.name!r}))" if layer.name else "sn.freeze(model)"
