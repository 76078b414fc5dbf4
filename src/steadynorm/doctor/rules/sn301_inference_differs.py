"""SN301."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.apart import first_apart
from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.gains import Gain, gain_of
from steadynorm.doctor.rules.rule import Rule


class InferenceDiffers(Rule):
    """SN301: the model answers otherwise in inference than in training."""

    code = "SN301"
    name = "inference-differs"
    summary = "The model answers otherwise in inference than in training, on the same batches."
    why = (
        "A batch norm normalizes by the batch in training and by its running statistics in "
        "inference. Where the two disagree, every layer behind computes from other numbers than it "
        "was trained for: good in train(), bad in eval(). Dropout and other parts are in inference "
        "in both measurements, so the difference is the batch norms' own. The first layer whose "
        "running statistics part from its batches' is where it begins; layers behind it are "
        "measured with the ones before normalized as in training, so they are not blamed for it."
    )
    source = "pytorch/pytorch issues 4741 and 5406; Ioffe & Szegedy 2015, section 3.1."
    threshold = (
        "With a loss: an error where inference loses a fifth more than training and 0.02, and that "
        "is three times its standard error over the batches; information where the outputs are "
        "half a standard deviation apart and inference is no worse, as with batches so small that "
        "training is the noisier one. Without a loss: a warning from half a standard deviation. "
        "Healthy networks at batch 16 to 64 are 0.1 to 0.3 apart, by the batches' own noise."
    )
    cure = "Mend the cause named beside it; else measure the statistics anew."
    line = "sn.calibrate(model, batches)"
    severity = Severity.ERROR
    safe = True
    needs = "data"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for the model, naming the first layer where statistics part."""
        data = evidence.data
        if data is None or data.gap is None:
            return
        worse = None if data.loss is None else gain_of(data.loss.inference, data.loss.training)
        is_worse = worse is not None and worse.clear(3) and worse.relative > 0.2
        if not is_worse and data.gap < 0.5:
            return
        severity = Severity.ERROR if is_worse else Severity.INFO
        if worse is None:
            severity = Severity.WARNING
        numbers: dict[str, float | int | str] = {"output_distance": data.gap}
        message = f"outputs in inference lie {data.gap:.2g} standard deviations from training's"
        if worse is not None:
            numbers |= {"loss_in_training": worse.after, "loss_in_inference": worse.before}
            message += _losses(worse)
        first = first_apart(evidence)
        if first is None:
            message += "; running statistics agree with the batches' on average, so it is how much "
            message += "single batches differ from one another"
        else:
            layer, how, count = first
            message += (
                f"; running statistics part from the batches' in {count} "
                f"{'layer' if count == 1 else 'layers'}, first in {layer.name!r}: {how} "
                f"(divergence {how.mean_divergence:.2g})"
            )
            numbers |= {
                "first_layer": layer.name,
                "layers_apart": count,
                "shift": how.typical_shift,
                "std_ratio": how.typical_ratio,
                "divergence": how.mean_divergence,
            }
        yield self.finding(None, message, numbers, severity=severity)


def _losses(worse: Gain) -> str:
    return f", and the loss is {worse.before:.3g} where training has {worse.after:.3g}"
