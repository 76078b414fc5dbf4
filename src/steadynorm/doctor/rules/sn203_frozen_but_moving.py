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

from collections.abc import Sequence

from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Rule

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    found = [(layer, reason) for layer in evidence.layers if (reason := _why_untrained(layer))]
    if not found:
        return
    names = [layer.name for layer, _ in found]
    parameters = sum(len(layer.usage.trained) for layer, _ in found if layer.usage is not None)
    yield rule.finding(
        found[0][0],
        f"{found[0][1]}, but a training forward updates running_mean and running_var",
        {
            "training": "yes",
            "parameters_held": parameters,
            "layers": ", ".join(name or "(model)" for name in names),
        },
        line=_line(names, len(evidence.layers)),
        layers=len(found),
    )


def _why_untrained(layer: NormEvidence) -> str:
    """Why a layer whose statistics move is not trained; "" where it is, or where none move."""
    usage = layer.usage
    if usage is None or not (usage.training and usage.moves):
        return ""
    if not usage.trained:
        before = [n.trained for n in usage.before or () if n.trained is not None]
        return "the layer before is frozen" if before and not any(before) else ""
    parts = " and ".join(usage.trained) + (" are" if len(usage.trained) > 1 else " is")
    if not any(usage.trained.values()):
        return f"{parts} frozen"
    if usage.left_out:
        return f"{parts} in no optimizer"
    without_gradient = layer.data is not None and layer.data.with_gradient is False
    return f"{parts} run without gradient" if without_gradient else ""


def _line(names: Sequence[str], layers: int) -> str:
    """Freezes these layers alone: others may be trained on purpose."""
    if len(names) == layers:
        return "sn.freeze(model)"
    if len(names) == 1:
        return f"sn.freeze(model.get_submodule({names[0]!r}))"
    listed = ", ".join(map(repr, names))
    return f"for name in ({listed}): sn.freeze(model.get_submodule(name))"
