"""The running statistics are not those of the data under the present weights.

They are averages over the last few training batches, of inputs that earlier weights made: late
after fast learning, noisy after small batches, wrong after averaged (SWA, EMA) or partly loaded
weights, too wide behind dropout, which inference leaves out (by 30 % at a rate of one half).
Inference normalizes with them. Measuring them anew needs no labels and no gradients. Data that
differ from those of training look the same from here: give both sets, the second as `against`, to
tell.

When: A divergence of more than 0.02, averaged over channels: means 0.2 standard deviations off, or
standard deviations 15 % too large; plus four times what so little data gives by itself. Averaging
over batches of 8 independent values leaves 0.01. With a loss, by what calibration gains on these
batches: an error from half the loss that is left, a warning from a twentieth, if it is twice its
standard error; else information. Without one: an error from a divergence of 0.5, a warning from
0.05, else information. Information where nothing of the model was trained yet. Without a loss the
cure is a question: a network that was fine-tuned with frozen batch norms looks the same, and
calibration would harm it. With one, the finding advises against a calibration that would raise it.

Cure: Measure the statistics on training data, with the weights held still.

Code: sn.calibrate(model, batches)

Source: Wu & Johnson 2021, section 3 (PreciseBN); Izmailov et al. 2018 (SWA needs bn_update); Li et
al. 2019 (the variance shift of dropout).
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import CLEARLY, Divergence, first_divergent
from steadynorm.doctor.evidence.losses import LossChange, instead_of_calibration, loss_change
from steadynorm.doctor.rules.rule import ERROR, INFO, WARNING, Evidence, Findings, Rule, Severity
from steadynorm.doctor.rules.sn101_statistics_never_updated import untrained

ASK = (
    "Were these batch norms frozen while the network was trained, as in fine-tuning? Then its "
    "weights fit these statistics: leave them. If not, measure them on training data. Give a loss "
    "to tell."
)

rule = Rule(__name__, __doc__, ERROR, safe=True, explains=("SN301",))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    first, data = first_divergent(evidence), evidence.data
    if first is None or data is None:
        return
    layer, divergence, count = first
    losses = data.loss
    gain = None if losses is None else loss_change(losses.inference, losses.calibrated)
    numbers = {
        "shift": divergence.typical_shift,
        "std_ratio": divergence.typical_ratio,
        "divergence": divergence.mean_kl,
    }
    message = str(divergence)
    if data.mended is not None:
        numbers["output_change"] = data.mended
        message += f"; calibration moves the outputs by {data.mended:.2g} standard deviations"
    if gain is not None:
        numbers |= {"loss": gain.before, "loss_after_calibration": gain.after}
        message += f", the loss from {gain.before:.3g} to {gain.after:.3g}"
    severity = _severity(divergence, gain)
    if severity > INFO and untrained(evidence):
        severity = INFO
    cure = instead_of_calibration(data) or ({} if gain is not None else {"cure": ASK})
    yield rule.finding(layer, message, numbers, severity=severity, layers=count, **cure)


def _severity(divergence: Divergence, gain: LossChange | None) -> Severity:
    if gain is None:
        if divergence.mean_kl > 0.5:
            return ERROR
        return WARNING if divergence.mean_kl > CLEARLY else INFO
    if not gain.clear(2) or gain.relative < 0.05:
        return INFO
    return ERROR if gain.relative > 0.5 else WARNING
