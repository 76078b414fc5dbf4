"""SN203."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.evidence import Evidence, Layer
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.rules.rule import Rule


class FrozenButMoving(Rule):
    """SN203: parameters are frozen, statistics move."""

    code = "SN203"
    name = "frozen-but-moving"
    summary = "Weight and bias require no gradient, but a training forward updates the statistics."
    why = (
        "requires_grad = False holds parameters, not buffers. In fine-tuning, a backbone that was "
        "meant to stay as it is normalizes by the new data's batches and forgets its own "
        "statistics: what follows was trained for other numbers, and the damage is saved with the "
        "checkpoint. eval() holds the statistics, and the next model.train() undoes it."
    )
    source = (
        "pytorch/pytorch issue 86590; Lightning-AI/pytorch-lightning issue 15063; "
        "keras-team/keras issue 9965."
    )
    threshold = (
        "The layer is in training mode and would update its statistics, it has weight or bias and "
        "none requires a gradient; for a layer without either, the layers that feed it must be "
        "frozen. In inference mode nothing moves."
    )
    cure = "Freeze both halves, so that it survives model.train(); or train both."
    line = "model, changes = sn.freeze(model)"
    severity = Severity.WARNING
    safe = True
    needs = "model"
    explains = ("SN301", "SN302")

    def judge(self, layer: Layer, evidence: Evidence) -> Iterator[Finding]:
        """A finding where parameters are held and statistics are not."""
        place = layer.place
        if place is None or not (place.training and place.moves):
            return
        if place.trained:
            held = not any(place.trained.values())
            what = " and ".join(place.trained) + " are" * (len(place.trained) > 1)
            what = what if len(place.trained) > 1 else f"{what} is"
        else:
            trained = [n.trained for n in place.before or () if n.trained is not None]
            held = bool(trained) and not any(trained)
            what = "the layer before is"
        if held:
            yield self.finding(
                layer,
                f"{what} frozen, but a training forward updates running_mean and running_var",
                {"training": "yes", "parameters_held": len(place.trained)},
                line=_line(layer),
            )


def _line(layer: Layer) -> str:
    """Freezes this one layer: others may be trained on purpose."""
    return f"sn.freeze(model.get_submodule({layer.name!r}))" if layer.name else "sn.freeze(model)"
