"""The running statistics are the 0 and 1 that the layer was made with.

In inference such a layer normalizes nothing: it subtracts 0 and divides by 1, while weight and bias
were trained for normalized values. It happens where the layers were in inference mode while the
model trained, where momentum is 0, where statistics were reset or left out when weights were
loaded.

When: Every mean exactly 0 and every variance exactly 1, which no data gives. An error where
training shows elsewhere: in this layer's weight or bias, in its count of batches, or, for a layer
without weight and bias, in another layer's statistics. A warning where other layers were trained
and nothing of this one was (new, left out, or not loaded), and for a frozen layer. Information
where no forward reaches it, or nothing of the model was trained yet: weights and biases that look
drawn from one distribution in all layers are an initialization's. Time steps of a recurrent layer
beyond the longest sequence are left alone.

Cure: Measure the statistics on training data, with the weights held still.

Code: sn.calibrate(model, batches)

Source: Ioffe & Szegedy 2015, Alg. 2; pytorch/pytorch issues 4741 and 5406.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from steadynorm.doctor.evidence.losses import loss_raised_by_calibration
from steadynorm.doctor.evidence.records import NormState
from steadynorm.doctor.rules.rule import (
    ERROR,
    INFO,
    WARNING,
    Evidence,
    Findings,
    NormEvidence,
    Numbers,
    Rule,
)  # fmt: skip

FROZEN: dict[str, Any] = {
    "cure": "Load the pretrained statistics: the layer applies its weight and bias alone.",
    "line": "",
    "safe": None,
}

rule = Rule(__name__, __doc__, ERROR, safe=True, explains=("SN301", "SN302"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    state, usage = layer.state, layer.usage
    if not initial(state) or _later_step(layer, evidence):
        return
    others = sum(not initial(other.state) for other in evidence.layers)
    batches = state.num_batches_tracked
    numbers: Numbers = {
        "running_mean": 0,
        "running_var": 1,
        "layers_updated": others,
        "layers": len(evidence.layers),
    }
    if batches is not None:
        numbers["num_batches_tracked"] = batches
    message = f"running_mean is 0 and running_var is 1 in all {state.num_features} channels"
    severity = ERROR
    changed: dict[str, Any] = {}
    if usage is not None and usage.policy == "Frozen":
        severity, changed = INFO if untrained(evidence) else WARNING, FROZEN
        message += " of a frozen layer, which neither training nor calibration changes"
    elif batches:
        message += f", after {batches} batches"
    elif untrained(evidence):
        severity = INFO
        message += "; nothing in this model was trained yet"
    elif affine_moved(state):
        message += ", but weight and bias were trained"
    elif others:
        message += f", but {others} of {len(evidence.layers)} layers have statistics"
        if usage is not None and usage.calls == 0:
            message += "; no forward reaches this one"
            severity = INFO
        elif state.bias is not None or state.weight is not None:
            message += "; nothing of this one was trained"
            severity = WARNING
    else:
        severity = INFO
        message += "; nothing of this layer was trained yet"
    worse = loss_raised_by_calibration(evidence.data)
    if worse is not None and not changed:
        why = "Nothing was" if untrained(evidence) else "The weights were"
        of = " yet" if untrained(evidence) else " with 0 and 1"
        changed = {
            "cure": f"Train on with the layer in training mode. {why} trained{of}: calibration "
            f"alone would raise the loss from {worse.after:.3g} to {worse.before:.3g}.",
            "line": "model.train()",
            "safe": False,
        }
    yield rule.finding(layer, message, numbers, severity=severity, **changed)


def _later_step(layer: NormEvidence, evidence: Evidence) -> bool:
    """A time step of a recurrent layer that no sequence was long enough for: earlier ones serve."""
    owner, found, number = layer.name.rpartition(".steps.")
    if not found or not number.isdecimal() or layer.state.num_batches_tracked:
        return False
    first = f"{owner}.steps.0"
    return any(other.name == first and not initial(other.state) for other in evidence.layers)


def untrained(evidence: Evidence) -> bool:
    """Whether all statistics are 0 and 1, no batch was counted, and weight and bias are as some
    initialization leaves them.
    """
    states = [layer.state for layer in evidence.layers]
    if any(state.num_batches_tracked or not initial(state) for state in states):
        return False
    return not any(map(affine_moved, states)) or drawn_at_random(states)


def drawn_at_random(states: Sequence[NormState]) -> bool:
    """Whether the weights of all layers, and their biases, look drawn from one distribution.

    A random initialization does that. Training parts the layers: it moves their means or spreads
    by more than such draws differ in, here five standard deviations of the sum of squares.
    """
    drawn = []
    for name in ("weight", "bias"):
        arrays = [array for state in states if (array := getattr(state, name)) is not None]
        if arrays:
            drawn.append(_one_distribution([a for a in arrays if a.size > 1]))
    return bool(drawn) and all(drawn)


def _one_distribution(arrays: Sequence[np.ndarray]) -> bool:
    """Means against s/√n, and logarithms of variances against √((kurtosis - 1)/n)."""
    if len(arrays) < 3 or not all(np.isfinite(array).all() for array in arrays):
        return False
    values = np.concatenate(arrays)
    center, var = values.mean(), values.var()
    if var == 0:
        return True
    sizes = np.array([array.size for array in arrays])
    variances = np.array([array.var(ddof=1) for array in arrays])
    if not variances.all():
        return False
    kurtosis = np.mean((values - center) ** 4) / var**2
    means = np.array([array.mean() for array in arrays])
    limit = len(arrays) + 5 * np.sqrt(2 * len(arrays))
    of_means = np.sum((means - center) ** 2 * sizes / var)
    of_variances = np.sum(np.log(variances / var) ** 2 * sizes / (kurtosis - 1))
    return bool(of_means < limit and of_variances < limit)


def initial(state: NormState) -> bool:
    """Whether the statistics are 0 and 1, as every framework makes them."""
    mean, var = state.running_mean, state.running_var
    if mean is None or var is None or not mean.size:
        return False
    return bool(np.all(mean == 0) and np.all(var == 1))


def affine_moved(state: NormState) -> bool:
    """Whether weight or bias are other than initialization leaves them.

    Every initialization leaves the bias at 0 and training moves it. The weight is looked at where
    there is no bias: some begin with random ones.
    """
    weight, bias = state.weight, state.bias
    if bias is not None:
        return bool(np.any(bias != 0))
    if weight is None or not weight.size:
        return False
    # Made equal in all channels, at 1, or at 0 where a residual branch ends; training parts them.
    return bool(np.any(weight != weight[0]) or (len(weight) == 1 and weight[0] not in (0.0, 1.0)))
