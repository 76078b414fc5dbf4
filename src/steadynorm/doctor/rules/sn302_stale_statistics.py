"""SN302."""

from __future__ import annotations

from collections.abc import Iterator

from steadynorm.doctor.apart import Apart, first_apart
from steadynorm.doctor.evidence import Evidence
from steadynorm.doctor.finding import Finding, Severity
from steadynorm.doctor.gains import Gain, gain_of
from steadynorm.doctor.rules.rule import Rule


class StaleStatistics(Rule):
    """SN302: running statistics are not those of the data."""

    code = "SN302"
    name = "stale-statistics"
    summary = "The running statistics are not those of the data under the present weights."
    why = (
        "They are averages over the last few training batches, of inputs that earlier weights "
        "made: late after fast learning, noisy after small batches, wrong after averaged (SWA, "
        "EMA) or partly loaded weights, too wide behind dropout, which inference leaves out (by "
        "30 % at a rate of one half). Inference normalizes with them. Measuring them anew needs no "
        "labels and no gradients. Data that differ from those of training look the same from "
        "here: give both sets, the second as `against`, to tell."
    )
    source = (
        "Wu & Johnson 2021, section 3 (PreciseBN); Izmailov et al. 2018 (SWA needs bn_update); Li "
        "et al. 2019 (the variance shift of dropout)."
    )
    threshold = (
        "A divergence of more than 0.02, channels averaged: means 0.2 standard deviations off, or "
        "standard deviations 15 % too large; plus four times what so little data gives by itself. "
        "Averaging over batches of 8 independent values leaves 0.01. With a loss, by what "
        "calibration gains on these batches: an error from half the loss that is left, a warning "
        "from a twentieth, if it is twice its standard error; else information. Without one: an "
        "error from a divergence of 0.5, a warning from 0.05, else information."
    )
    cure = "Measure the statistics on training data, with the weights held still."
    line = "sn.calibrate(model, batches)"
    severity = Severity.ERROR
    safe = True
    needs = "data"
    explains = ("SN301",)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, in the first layer where statistics part."""
        first = first_apart(evidence)
        if first is None:
            return
        layer, how, count = first
        data = evidence.data
        losses = None if data is None else data.loss
        gain = None if losses is None else gain_of(losses.inference, losses.calibrated)
        numbers: dict[str, float | int | str] = {
            "shift": how.typical_shift,
            "std_ratio": how.typical_ratio,
            "divergence": how.mean_divergence,
            "layers_apart": count,
        }
        message = str(how)
        if count > 1:
            message += f"; {count} layers are off, this is the first"
        if data is not None and data.mended is not None:
            numbers["output_change"] = data.mended
            message += f"; calibration moves the outputs by {data.mended:.2g} standard deviations"
        if gain is not None:
            numbers |= {"loss": gain.before, "loss_after_calibration": gain.after}
            message += f", the loss from {gain.before:.3g} to {gain.after:.3g}"
        yield self.finding(layer, message, numbers, severity=_severity(how, gain))


def _severity(how: Apart, gain: Gain | None) -> Severity:
    if gain is None:
        if how.mean_divergence > 0.5:
            return Severity.ERROR
        return Severity.WARNING if how.mean_divergence > 0.05 else Severity.INFO
    if not gain.clear(2) or gain.relative < 0.05:
        return Severity.INFO
    return Severity.ERROR if gain.relative > 0.5 else Severity.WARNING
