"""The model's outputs in inference differ from those in training, on the same batches.

A batch norm normalizes by the batch in training and by its running statistics in inference. Where
the two disagree, every layer behind computes from other numbers than it was trained for: good in
train(), bad in eval(). Dropout and other parts are in inference in both measurements, so the
difference is the batch norms' own. The first layer whose running statistics part from its batches'
is where it begins; layers behind it are measured with the ones before normalized as in training, so
they are not blamed for it.

When: With a loss: an error where inference loses a fifth more than training and 0.02, and that is
three times its standard error over the batches; information where the outputs are half a standard
deviation apart and inference is no worse, as with batches so small that training is the noisier
one. Without a loss, from half a standard deviation: a warning where a layer's running statistics
are more than 0.05 (divergence) from its batches' too, else information, since noise of single
batches does it as well. Healthy networks at batch 16 to 64 are 0.1 to 0.3 apart. Where calibration
would raise the loss, the finding advises against it.

Cure: Apply the cure of the cause named beside it; else measure the statistics anew.

Code: sn.calibrate(model, batches)

Source: pytorch/pytorch issues 4741 and 5406; Ioffe & Szegedy 2015, section 3.1.
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import CLEARLY, first_divergent
from steadynorm.doctor.evidence.losses import instead_of_calibration, loss_change
from steadynorm.doctor.rules.rule import ERROR, INFO, WARNING, Evidence, Findings, Numbers, Rule
from steadynorm.doctor.rules.sn101_statistics_never_updated import untrained

rule = Rule(__name__, __doc__, ERROR, safe=True)


@rule.whole
def _check(evidence: Evidence) -> Findings:
    data = evidence.data
    if data is None or data.gap is None:
        return
    worse = None if data.loss is None else loss_change(data.loss.inference, data.loss.training)
    is_worse = worse is not None and worse.clear(3) and worse.relative > 0.2
    if not is_worse and data.gap < 0.5:
        return
    numbers: Numbers = {"output_distance": data.gap}
    message = f"outputs in inference are {data.gap:.2g} standard deviations from training's"
    if worse is not None:
        numbers |= {"loss_in_training": worse.after, "loss_in_inference": worse.before}
        message += f", and the loss is {worse.before:.3g} where training has {worse.after:.3g}"
    first = first_divergent(evidence)
    severity = ERROR if is_worse else INFO
    safe = worse is None or is_worse  # else there is no loss to win back
    if first is None:
        message += "; running statistics agree with the batches' on average, so it is how much "
        message += "single batches differ from one another"
    else:
        layer, divergence, count = first
        if worse is None and divergence.mean_kl > CLEARLY and not untrained(evidence):
            severity = WARNING
        message += (
            f"; running statistics differ from the batches' in {count} "
            f"{'layer' if count == 1 else 'layers'}, first in {layer.name!r}: {divergence} "
            f"(divergence {divergence.mean_kl:.2g})"
        )
        numbers |= {
            "first_layer": layer.name,
            "layers_affected": count,
            "shift": divergence.typical_shift,
            "std_ratio": divergence.typical_ratio,
            "divergence": divergence.mean_kl,
        }
    cure = instead_of_calibration(data) or {"safe": safe}
    yield rule.finding(None, message, numbers, severity=severity, **cure)
