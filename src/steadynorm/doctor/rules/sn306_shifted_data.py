"""The two sets of data differ in the statistics that batch norms see.

Running statistics belong to the data they were averaged over. On data of another contrast, camera
or scanner every layer normalizes with the wrong ones, though the weights may serve well: on
corrupted ImageNet the statistics of the corrupted pictures, without labels, win back much of what
is lost.

When: Both sets in inference, the first layer where they diverge by more than 0.02 (means 0.2
standard deviations apart, or standard deviations 15 %) and by more than four times what so little
data gives by itself. A warning: it may be meant.

Cure: Mix the statistics with those of the new data; no labels are needed.

Code: sn.adapt(model, batches)

Source: Schneider et al. 2020; Nado et al. 2020; Li et al. 2016 (AdaBN).
"""

from __future__ import annotations

from steadynorm.doctor.evidence.divergence import (
    EPS,
    Divergence,
    divergence,
    measured_layers,
    noise,
)
from steadynorm.doctor.rules.rule import WARNING, Evidence, Findings, NormEvidence, Numbers, Rule

rule = Rule(__name__, __doc__, WARNING, safe=False, explains=("SN301", "SN302"))


@rule.whole
def _check(evidence: Evidence) -> Findings:
    found = [
        (layer, how) for layer in measured_layers(evidence) if (how := _sets(layer)) and how.far
    ]
    if not found:
        return
    layer, how = found[0]
    own, other = _from_running(layer)
    numbers: Numbers = {
        "shift": how.typical_shift,
        "std_ratio": how.typical_ratio,
        "divergence": how.mean_kl,
        "layers_apart": len(found),
        "running_from_batches": own,
        "running_from_against": other,
    }
    message = (
        f"the second set has means {how.typical_shift:.2g} standard deviations off, standard "
        f"deviations {how.typical_ratio:.2g} times those of the first"
    )
    fits = "first" if own <= other else "second"
    message += f"; the running statistics fit the {fits} set (divergence "
    message += f"{min(own, other):.2g}, from the other {max(own, other):.2g})"
    new = "against" if own <= other else "batches"
    yield rule.finding(layer, message, numbers, line=f"sn.adapt(model, {new})")


def _sets(layer: NormEvidence) -> Divergence | None:
    data = layer.data
    if data is None or data.reference_mean is None or data.reference_var is None:
        return None
    return divergence(
        data.reference_mean,
        data.reference_var,
        data.inference_mean,
        data.inference_var,
        noise(data),
        layer.state.eps or EPS,
    )


def _from_running(layer: NormEvidence) -> tuple[float, float]:
    """How far the running statistics are from either set's."""
    data, state = layer.data, layer.state
    mean, var = state.running_mean, state.running_var
    assert data is not None
    assert data.reference_mean is not None
    assert data.reference_var is not None
    if mean is None or var is None:
        return 0.0, 0.0
    eps = state.eps or EPS
    own = divergence(mean, var, data.inference_mean, data.inference_var, 0.0, eps)
    other = divergence(mean, var, data.reference_mean, data.reference_var, 0.0, eps)
    return own.mean_kl, other.mean_kl
