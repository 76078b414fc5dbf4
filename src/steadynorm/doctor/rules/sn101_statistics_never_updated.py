"""The running statistics are the 0 and 1 that the layer was made with.

In inference such a layer normalizes nothing: it subtracts 0 and divides by 1, while weight and bias
were trained for normalized values. It happens where the layers were in inference mode while the
model trained, where momentum is 0, where statistics were reset or left out when weights were
loaded.

When: Every mean exactly 0 and every variance exactly 1, which no data gives. An error where
training shows elsewhere: in this layer's weight or bias, in its count of batches, or, for a layer
without weight and bias, in another layer's statistics. A warning where other layers were trained
and nothing of this one was: new, left out, or not loaded. Information where no forward reaches it,
or nothing of the model was trained yet. Time steps of a recurrent layer beyond the longest sequence
are left alone.

Cure: Measure the statistics on training data, with the weights held still.

Code: sn.calibrate(model, batches)

Source: Ioffe & Szegedy 2015, Alg. 2; pytorch/pytorch issues 4741 and 5406.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from steadynorm.doctor.evidence import NormState
from steadynorm.doctor.evidence.losses import loss_raised_by_calibration
from steadynorm.doctor.rules.rule import (
    ERROR,
    INFO,
    WARNING,
    Evidence,
    Findings,
    NormEvidence,
    Numbers,
    Rule,
)

rule = Rule(__name__, __doc__, ERROR, safe=True, explains=("SN301", "SN302"))


@rule.each_layer
def _check(layer: NormEvidence, evidence: Evidence) -> Findings:
    worse = loss_raised_by_calibration(evidence.data)
    for finding in _found(layer, evidence):
        if worse is None:
            yield finding
        else:
            yield replace(
                finding,
                cure=f"Train on with the layer in training mode. The weights were trained with "
                f"0 and 1: calibration alone would raise the loss from {worse.after:.3g} to "
                f"{worse.before:.3g}.",
                line="model.train()",
                safe=False,
            )


def _found(layer: NormEvidence, evidence: Evidence) -> Findings:
    state = layer.state
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
    if batches:
        yield rule.finding(layer, f"{message}, after {batches} batches", numbers)
    elif affine_moved(state):
        yield rule.finding(layer, f"{message}, but weight and bias were trained", numbers)
    elif others:
        message = f"{message}, but {others} of {len(evidence.layers)} layers have statistics"
        known = state.bias is not None or state.weight is not None
        if layer.usage is not None and layer.usage.calls == 0:
            message += "; no forward reaches this one"
            severity = INFO
        elif known:
            message += "; nothing of this one was trained"
            severity = WARNING
        else:
            severity = ERROR
        yield rule.finding(layer, message, numbers, severity=severity)
    else:
        message = f"{message}; nothing in this model was trained yet"
        yield rule.finding(layer, message, numbers, severity=INFO)


def _later_step(layer: NormEvidence, evidence: Evidence) -> bool:
    """A time step of a recurrent layer that no sequence was long enough for: earlier ones serve."""
    owner, found, number = layer.name.rpartition(".steps.")
    if not found or not number.isdecimal() or layer.state.num_batches_tracked:
        return False
    first = f"{owner}.steps.0"
    return any(other.name == first and not initial(other.state) for other in evidence.layers)


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
