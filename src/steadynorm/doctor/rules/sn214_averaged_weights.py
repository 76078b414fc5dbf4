"""The weights are an average of several models, and the running statistics are not of it.

Averaging weights (SWA, EMA) makes a new network: its layers give other means and variances than any
of the averaged ones, and no average of buffers is what the new weights give. torch's AveragedModel
takes the buffers of the last model that it averaged, unless `use_buffers=True`.

When: A module of torch's AveragedModel without `use_buffers`, after at least one average. With
batches a warning where the running statistics differ from theirs (the divergence of SN302), or
where calibration clearly lowers the loss, by a twentieth or more; nothing where neither is so.
Without batches information: whether `update_bn` or a calibration came after the last average cannot
be seen in the state, nor in a checkpoint.

Cure: Measure the statistics of the averaged weights.

Code: sn.calibrate(model, batches)

Source: Izmailov et al. 2018, Averaging Weights Leads to Wider Optima, section 3.2 (bn_update);
torch.optim.swa_utils.
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import first_divergent
from steadynorm.doctor.evidence.losses import loss_change
from steadynorm.doctor.rules.rule import INFO, WARNING, Evidence, Findings, Numbers, Rule

rule = Rule(__name__, __doc__, WARNING, safe=True, explains=("SN101", "SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    averaged = 0 if evidence.model is None else evidence.model.averaged
    if not averaged or not evidence.layers:
        return
    numbers: Numbers = {"averaged": averaged}
    message = f"the weights are the average of {averaged} models, the buffers those of one"
    if evidence.data is None:
        message += "; give batches to see whether the statistics were measured since"
        yield rule.finding(None, message, numbers, severity=INFO)
        return
    first, losses = first_divergent(evidence), evidence.data.loss
    gain = None if losses is None else loss_change(losses.inference, losses.calibrated)
    if first is not None:
        layer, divergence, count = first
        numbers |= {
            "divergence": divergence.mean_kl,
            "layers_affected": count,
            "first_layer": layer.name,
        }
        yield rule.finding(None, f"{message}: in {layer.name!r} {divergence}", numbers)
    elif gain is not None and gain.clear(2) and gain.relative > 0.05:
        numbers |= {"loss": gain.before, "loss_after_calibration": gain.after}
        message += f"; calibration lowers the loss from {gain.before:.3g} to {gain.after:.3g}"
        yield rule.finding(None, message, numbers)
