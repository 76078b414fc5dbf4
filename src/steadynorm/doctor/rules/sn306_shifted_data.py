"""The two sets of data differ in the statistics that batch norms see.

Running statistics belong to the data they were averaged over. On data of another contrast, camera
or scanner every layer normalizes with the wrong ones, though the weights may serve well: on
corrupted ImageNet the statistics of the corrupted pictures, without labels, win back much of what
is lost.

When: Both sets in inference, the first layer where they diverge by more than 0.02 (means 0.2
standard deviations apart, or standard deviations 15 %) on top of what random halves of the same
samples do, and by more than 199 random deals of the samples into two sets give in any layer: in one
of 200 pairs of sets from the same distribution that happens by chance. A warning: it may be meant.

Cure: Measure the statistics on the new data, without labels, or mix them with those that there are.
With a loss, calibration and adaptation are tried, and the one that lowers it most is named.

Code: sn.calibrate(model, batches)

Source: Schneider et al. 2020; Nado et al. 2020; Li et al. 2016 (AdaBN).
"""

from __future__ import annotations

import numpy as np

from steadynorm.doctor.evidence.divergence import EPS, FAR, divergence, measured
from steadynorm.doctor.evidence.losses import loss_change
from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Numbers, Rule

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    found = []
    for layer, data in measured(evidence):
        if data.reference_mean is None or data.reference_var is None:
            continue
        eps = layer.state.eps or EPS
        first = data.inference_mean, data.inference_var
        second = data.reference_mean, data.reference_var
        shift = divergence(*second, *first, eps=eps)
        if shift.mean_kl > max(FAR + data.reference_noise, data.reference_limit):
            found.append((layer, first, second, shift))
    if not found:
        return
    layer, first, second, shift = found[0]
    own, other = (_from_running(layer, *statistics) for statistics in (first, second))
    fits_first = own <= other
    numbers: Numbers = {
        "shift": shift.typical_shift,
        "std_ratio": shift.typical_ratio,
        "divergence": shift.mean_kl,
        "layers_affected": len(found),
        "running_from_batches": own,
        "running_from_against": other,
    }
    message = (
        f"the second set has means {shift.typical_shift:.2g} standard deviations off, standard "
        f"deviations {shift.typical_ratio:.2g} times those of the first; the running statistics "
        f"fit the {'first' if fits_first else 'second'} set (divergence {min(own, other):.2g}, "
        f"from the other {max(own, other):.2g})"
    )
    losses, best = _tried(evidence, on_second=fits_first)
    new = "against" if fits_first else "batches"
    if not losses:
        yield rule.finding(layer, message, numbers, line=f"sn.calibrate(model, {new})")
        return
    told = ", ".join(
        f"{loss:.3g} after sn.{name}" if name else f"{loss:.3g}" for name, loss in losses.items()
    )
    numbers |= {f"loss_after_{name}" if name else "loss": loss for name, loss in losses.items()}
    yield rule.finding(
        layer,
        f"{message}; tried on the {'second' if fits_first else 'first'} set, the loss is {told}",
        numbers,
        cure=None if best else "Leave the statistics: no cure that was tried lowers the loss.",
        line=f"sn.{best}(model, {new})" if best else "",
    )


def _tried(evidence: Evidence, *, on_second: bool) -> tuple[dict[str, float], str]:
    """Mean losses on the data that the statistics do not fit, by cure ("" for none), and the cure
    that clearly lowers the loss the most, "" where none does.
    """
    data = evidence.data
    if data is None or data.loss is None:
        return {}, ""
    tried = dict(data.cures)
    if not on_second:
        tried = {"none": data.loss.inference, "calibrate": data.loss.calibrated}
    before = tried.pop("none", None)
    if before is None:
        return {}, ""
    changes = {name: change for name, a in tried.items() if (change := loss_change(before, a))}
    losses = {"": float(np.mean(before)), **{n: change.after for n, change in changes.items()}}
    improving = [name for name, change in changes.items() if change.clear(2)]
    return losses, min(improving, key=lambda name: losses[name], default="")


def _from_running(layer: NormEvidence, mean: np.ndarray, var: np.ndarray) -> float:
    """How far the running statistics are from those of a set; 0 where there are none."""
    state = layer.state
    if state.running_mean is None or state.running_var is None:
        return 0.0
    return divergence(
        state.running_mean, state.running_var, mean, var, eps=state.eps or EPS
    ).mean_kl
